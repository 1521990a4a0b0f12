import equinox as eqx
from jaxtyping import Array, Float, PyTree

from ._auto_solver import AutoSolver
from ._checks import check_data
from ._dataset import Dataset
from ._distilled_set import DistilledSet
from ._fit import fit
from ._inner_solver import AbstractInnerSolver
from ._losses import classification_loss


def outer_loss(
    distilled: DistilledSet,
    classifier: PyTree,
    data: Dataset,
    inner: AbstractInnerSolver = AutoSolver(),
    *,
    throw: bool = True,
) -> Float[Array, ""]:
    r"""The loss on real data of the classifier fitted to a distilled set,

    $$F(\theta) = \frac{1}{N} \sum_{i=1}^N \ell(y_i, w^\star(\theta)(x_i)).$$

    Its gradient is the hypergradient: `equinox.filter_grad(outer_loss)` is all that is
    needed to use it in a training loop of one's own.

    **Arguments:**

    - `distilled`: the distilled set.
    - `classifier`: as for [`eqdistill.fit`][].
    - `data`: the real data.
    - `inner`: how to fit the classifier.
    - `throw`: as for [`eqdistill.fit`][]. (Keyword only argument.)

    **Returns:**

    The mean cross-entropy, in nats per image.

    **Raises:**

    As [`eqdistill.fit`][], and a `ValueError` if the real images are not of the
    distilled images' shape, or are of more classes than the classifier has.
    """
    check_data("data", data, distilled, classifier)
    fitted = fit(distilled, classifier, inner, throw=throw)
    return _data_loss(fitted.classifier, data)


@eqx.filter_jit
def _data_loss(classifier, data):
    return classification_loss(classifier, data.floating(), data.labels)
