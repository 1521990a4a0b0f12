import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from .._inner._auto_solver import AutoSolver
from .._inner._fit import fit
from .._inner._inner_solver import AbstractInnerSolver, Fitted
from .._losses import cross_entropy
from ._outer_loss import as_logits, check_data


class Evaluation(eqx.Module):
    """How well a model does on real data, when it is fitted to a distilled set.

    **Attributes:**

    - `loss`: the mean cross-entropy, in nats per image.
    - `accuracy`: the fraction of images that are classified right, from 0 to 1.
    - `fitted`: the model, as [`eqdistill.fit`][] returned it.
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    fitted: Fitted


def evaluate(
    distilled: DistilledSet,
    model: PyTree,
    test: Dataset,
    inner: AbstractInnerSolver = AutoSolver(),
    *,
    key: PRNGKeyArray | None = None,
) -> Evaluation:
    """Fits a model to a distilled set from scratch, and measures it on real data.

    **Arguments:**

    - `distilled`: the distilled set.
    - `model`: as for [`eqdistill.fit`][]. It need not be the one that the set was
        distilled with.
    - `test`: the real data.
    - `inner`: how to fit the model.
    - `key`: as for [`eqdistill.fit`][]. (Keyword only argument.)

    **Returns:**

    An [`eqdistill.Evaluation`][].

    **Raises:**

    As [`eqdistill.fit`][], and as [`eqdistill.outer_loss`][] for the data.
    """
    check_data("test", test, distilled, model, inner)
    fitted = fit(distilled, model, inner, key=key)
    reader = as_logits(eqx.nn.inference_mode(fitted.model), distilled.loss)
    loss, accuracy = _measure(reader, test)
    return Evaluation(loss, accuracy, fitted)


@eqx.filter_jit
def _measure(reader, test):
    # In batches, so that a network's activations on all the data need not fit in
    # memory at once; and in small ones, so that on a CPU they fit in the cache. XLA's
    # convolutions are slow in a loop only backwards.
    images, labels = test.images, test.labels
    of_image = lambda image: reader(Dataset.to_floating(image))
    logits = jax.lax.map(of_image, images, batch_size=100)
    # The greatest of logits with a NaN would be the first.
    is_finite = jnp.isfinite(logits).all(axis=1)
    correct = (jnp.argmax(logits, axis=1) == labels) & is_finite
    return cross_entropy(logits, labels), jnp.mean(correct.astype(logits.dtype))
