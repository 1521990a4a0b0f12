import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from .._classifier import takes_pixels
from .._data._dataset import Dataset
from .._losses import CrossEntropy, DefaultOuterLoss
from ._data import AbstractData, example_loss, FullBatch
from ._linear_layout import LinearLayout


class SortedPixels(AbstractData):
    """A full batch with a fast path: a [`LinearLayout`][] computes the cross-entropy of
    class indices for a model that is linear in the pixels. Anything else is computed as
    in a full batch."""

    full_batch: FullBatch
    sorted_pixels: LinearLayout

    def __init__(self, dataset: Dataset):
        self.full_batch = FullBatch(dataset)
        rows = np.asarray(dataset.images).reshape(len(dataset), -1)
        self.sorted_pixels = LinearLayout(rows, np.asarray(dataset.labels))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full_batch.shape

    @property
    def num_classes(self) -> int:
        return self.full_batch.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.full_batch.class_names

    def mean(self, fn, model, step, *, key):
        loss = model[0] if fn is example_loss else None
        if isinstance(loss, DefaultOuterLoss):
            loss = loss.inner.default_outer_loss(self.full_batch.labels)
        if type(loss) is not CrossEntropy or not takes_pixels(model[1]):
            return self.full_batch.mean(fn, model, step, key=key)
        head = model[1].head
        if loss.log_temperature is not None:
            scale = jnp.exp(-loss.log_temperature)
            head = jax.tree.map(lambda x: x * scale.astype(x.dtype), head)
        return _mean_cross_entropy(head, self.sorted_pixels)


@eqx.filter_custom_jvp
def _mean_cross_entropy(head: eqx.nn.Linear, pixels: LinearLayout) -> Float[Array, ""]:
    return pixels.value(head)


@_mean_cross_entropy.def_jvp
def _(primals, tangents):
    # The gradient is computed with the value, while the pixels are in the cache.
    (head, pixels), (head_dot, pixels_dot) = primals, tangents
    if jax.tree.leaves(pixels_dot):
        raise NotImplementedError(
            "The outer loss cannot be differentiated with respect to the data."
        )
    loss, gradient = pixels.value_and_grad(head)
    is_none = lambda x: x is None
    has_tangent = jax.tree.map(lambda x: x is not None, head_dot, is_leaf=is_none)
    gradient = eqx.filter(gradient, has_tangent)
    dot = optax.tree.cast_like(head_dot, gradient)
    return loss, jnp.asarray(optax.tree.vdot(gradient, dot), loss.dtype)
