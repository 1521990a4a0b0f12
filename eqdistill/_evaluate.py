import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._auto_solver import AutoSolver
from ._checks import check_data
from ._dataset import Dataset
from ._distilled_set import DistilledSet
from ._fit import fit
from ._inner_solver import AbstractInnerSolver, Fitted
from ._losses import cross_entropy


class Evaluation(eqx.Module):
    """How well a classifier does on real data, when it is fitted to a distilled set.

    **Attributes:**

    - `loss`: the mean cross-entropy, in nats per image.
    - `accuracy`: the fraction of images that are classified right, from 0 to 1.
    - `fitted`: the classifier, as [`eqdistill.fit`][] returned it.
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    fitted: Fitted


def evaluate(
    distilled: DistilledSet,
    classifier: PyTree,
    test: Dataset,
    *,
    inner: AbstractInnerSolver = AutoSolver(),
) -> Evaluation:
    """Fits a classifier to a distilled set from scratch, and measures it on real data.

    **Arguments:**

    - `distilled`: the distilled set.
    - `classifier`: as for [`eqdistill.fit`][]. It need not be the one that the set was
        distilled with.
    - `test`: the real data.
    - `inner`: how to fit the classifier. (Keyword only argument.)

    **Returns:**

    An [`eqdistill.Evaluation`][].

    **Raises:**

    As [`eqdistill.outer_loss`][].
    """
    check_data("test", test, distilled, classifier)
    fitted = fit(distilled, classifier, inner)
    loss, accuracy = _measure(fitted.classifier, test)
    return Evaluation(loss, accuracy, fitted)


@eqx.filter_jit
def _measure(classifier, test):
    # In batches, so that a network's activations on all the data need not fit in
    # memory at once.
    logits = jax.lax.map(classifier, test.floating(), batch_size=1000)
    correct = jnp.argmax(logits, axis=1) == test.labels
    return cross_entropy(logits, test.labels), jnp.mean(correct.astype(logits.dtype))
