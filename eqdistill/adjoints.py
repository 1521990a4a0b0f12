"""Ways to differentiate fits: for unrolled runs and for implicit differentiation."""

from ._inner._hessian_solvers import (
    DampedCG as DampedCG,
    NeumannSeries as NeumannSeries,
)
from ._inner._lbfgs import LBFGS as LBFGS
from ._inner._reversible_solver import ReversibleSolver as ReversibleSolver
from ._inner._unrolled_adjoint import (
    AbstractUnrolledAdjoint as AbstractUnrolledAdjoint,
    AbstractWindow as AbstractWindow,
    DirectAdjoint as DirectAdjoint,
    GradientWindow as GradientWindow,
    LastSteps as LastSteps,
    RandomWindow as RandomWindow,
    RecursiveCheckpointAdjoint as RecursiveCheckpointAdjoint,
)
from ._outer._optimisers import clip_by_running_norm as clip_by_running_norm
