from jaxtyping import PyTree

from ._argmin_solver import ArgminSolver
from ._classifier import LogisticRegression
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver, Fitted
from ._span_solver import SpanSolver


class AutoSolver(AbstractInnerSolver):
    """Chooses an inner solver by the classifier and the number of images:
    [`eqdistill.SpanSolver`][] for a [`eqdistill.LogisticRegression`][] with at most
    2,000 unknowns $n c$, and [`eqdistill.ArgminSolver`][] for all else.
    """

    def __call__(
        self, classifier: PyTree, distilled: DistilledSet, tilt: PyTree | None = None
    ) -> Fitted:
        """As [`eqdistill.AbstractInnerSolver`][]."""
        if isinstance(classifier, LogisticRegression):
            _, num_classes = classifier.weights.shape
            if len(distilled) * num_classes <= 2000:
                return SpanSolver()(classifier, distilled, tilt)
        return ArgminSolver()(classifier, distilled, tilt)
