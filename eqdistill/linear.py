"""Tools that apply only to models that are linear in their parameters: the models,
their solvers, and functions for their convex inner problem."""

from ._classifier import (
    last_layer as last_layer,
    LinearClassifier as LinearClassifier,
    LogisticRegression as LogisticRegression,
)
from ._inner._linearised_solver import (
    Linearised as Linearised,
    LinearisedSolver as LinearisedSolver,
)
from ._inner._relative_ridge import RelativeRidge as RelativeRidge
from ._inner._ridge_solver import RidgeSolver as RidgeSolver
from ._inner._span_solver import SpanSolver as SpanSolver
from ._outer._exact import distill_exactly as distill_exactly
from ._outer._hypergradient_error import (
    hypergradient_error as hypergradient_error,
    HypergradientError as HypergradientError,
)
from ._outer._whitened import whitened as whitened
