from jaxtyping import PyTree

from .._classifier import LinearClassifier, takes_pixels
from .._data._distilled_set import DistilledSet
from .._losses import CrossEntropy, SquaredError
from ._argmin_solver import ArgminSolver
from ._inner_solver import AbstractInnerSolver
from ._relative_ridge import RelativeRidge
from ._ridge_solver import RidgeSolver
from ._span_solver import SpanSolver


class AutoSolver(AbstractInnerSolver[PyTree]):
    r"""Chooses an inner solver for the model and the loss of the distilled set:

    | model | cross-entropy | squared error |
    |---|---|---|
    | linear in the pixels | [`eqdistill.linear.SpanSolver`][] | [`eqdistill.linear.RidgeSolver`][] |
    | linear in other features, such as the last layer of a network | the same with a ridge relative to the features, [`eqdistill.linear.RelativeRidge`][] | likewise |
    | any other | [`eqdistill.ArgminSolver`][] | [`eqdistill.ArgminSolver`][] |

    In single precision, `SpanSolver` is not exact for soft labels with a ridge below
    1e-4 if $\min(n, p) \, c$ is above 2,000.
    """  # noqa: E501

    def init(self, distilled, model, *, key):
        return _choose(distilled, model).init(distilled, model, key=key)

    def __call__(self, distilled, model, state, *, key):
        return _choose(distilled, model)(distilled, model, state, key=key)


def _choose(distilled: DistilledSet, model: PyTree) -> AbstractInnerSolver:
    loss = distilled.loss
    is_linear = isinstance(model, LinearClassifier)
    if not is_linear or not isinstance(loss, CrossEntropy | SquaredError):
        return ArgminSolver()
    solver = SpanSolver() if isinstance(loss, CrossEntropy) else RidgeSolver()
    return solver if takes_pixels(model) else RelativeRidge(solver)
