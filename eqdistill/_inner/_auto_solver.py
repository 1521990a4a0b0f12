from jaxtyping import PyTree

from .._classifier import LinearClassifier
from .._data._distilled_set import DistilledSet
from .._losses import CrossEntropy, SquaredError
from ._argmin_solver import ArgminSolver
from ._inner_solver import AbstractInnerSolver
from ._ridge_solver import RidgeSolver
from ._span_solver import SpanSolver


class AutoSolver(AbstractInnerSolver[PyTree]):
    r"""Chooses an inner solver by the model and the loss. For an
    [`eqdistill.LinearClassifier`][] it is [`eqdistill.SpanSolver`][] with cross-entropy
    and [`eqdistill.RidgeSolver`][] with squared error. It is
    [`eqdistill.ArgminSolver`][] otherwise.

    In single precision, `SpanSolver` is not exact for soft labels with a ridge below
    1e-4 if $\min(n, p) \, c$ is above 2,000.
    """

    def init(self, distilled, model, *, key):
        return _choose(distilled, model).init(distilled, model, key=key)

    def __call__(self, distilled, model, state, *, key):
        solver = _choose(distilled, model)
        return solver(distilled, model, state, key=key)


def _choose(distilled: DistilledSet, model: PyTree) -> AbstractInnerSolver:
    if isinstance(model, LinearClassifier):
        if isinstance(distilled.loss, CrossEntropy):
            return SpanSolver()
        if isinstance(distilled.loss, SquaredError):
            return RidgeSolver()
    return ArgminSolver()
