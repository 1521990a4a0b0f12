from jaxtyping import PyTree

from ._argmin_solver import ArgminSolver
from ._classifier import LogisticRegression
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver, Fitted
from ._span_solver import SpanSolver


class AutoSolver(AbstractInnerSolver):
    r"""Chooses an inner solver by the classifier: [`eqdistill.SpanSolver`][] for a
    [`eqdistill.LogisticRegression`][], and [`eqdistill.ArgminSolver`][] for all else.

    In single precision, the first is not exact for soft labels with a ridge below 1e-4
    if $\min(n, p) \, c$ is above 2,000.
    """

    def __call__(
        self, classifier: PyTree, distilled: DistilledSet, tilt: PyTree | None = None
    ) -> Fitted:
        """As [`eqdistill.AbstractInnerSolver`][]."""
        is_linear = isinstance(classifier, LogisticRegression)
        solver = SpanSolver() if is_linear else ArgminSolver()
        return solver(classifier, distilled, tilt)
