import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ._dataset import Dataset
from ._losses import cross_entropies


class AbstractLayout(eqx.Module):
    """Real images, laid out once for many passes over them."""

    num_images: eqx.AbstractVar[int]

    @abc.abstractmethod
    def value(self, classifier: PyTree) -> Float[Array, ""]:
        """Mean cross-entropy of a classifier on all images."""

    @abc.abstractmethod
    def value_and_grad(self, classifier: PyTree) -> tuple[Float[Array, ""], PyTree]:
        """The same, and its gradient in the floating-point arrays of the classifier."""

    @property
    @abc.abstractmethod
    def mean_square(self) -> Float[Array, ""]:
        r"""The mean of $\|x\|^2$ over the images."""


@eqx.filter_custom_vjp
def data_loss(classifier: PyTree, layout: AbstractLayout) -> Float[Array, ""]:
    """Mean cross-entropy of a classifier on all images, differentiable in it."""
    return layout.value(classifier)


@data_loss.def_fwd
def _(perturbed, classifier, layout):
    # The gradient is taken with the value, while the images are in the cache.
    del perturbed
    return layout.value_and_grad(classifier)


@data_loss.def_bwd
def _(gradient, loss_cotangent, perturbed, classifier, layout):
    del perturbed, classifier, layout
    # The loss may be in a wider precision than the classifier.
    scaled = optax.tree.scale(loss_cotangent, gradient)
    return optax.tree.cast_like(scaled, gradient)


class RowLayout(AbstractLayout):
    """Images for any classifier, in chunks: on a CPU, a chunk's images and a network's
    activations stay in the cache between the forward and the backward pass."""

    images: Float[Array, "rows *shape"]
    labels: Int[Array, " rows"]
    num_images: int = eqx.field(static=True)
    num_chunks: int = eqx.field(static=True)

    @staticmethod
    def of(data: Dataset) -> "RowLayout":
        # A network's activations are many times as large as its images.
        num_chunks = count_chunks(len(data), math.prod(data.shape), chunk_bytes=2**19)
        images, labels = _pad(data, num_chunks)
        return RowLayout(
            images=images,
            labels=labels,
            num_images=len(data),
            num_chunks=num_chunks,
        )

    def batch(self, indices: Int[Array, " batch"]) -> "RowLayout":
        """Some of the images, for one pass over them."""
        num_images = len(indices)
        chunk_size = len(self.labels) // self.num_chunks
        num_chunks = -(-num_images // chunk_size)
        rows = jnp.pad(indices, (0, -num_images % num_chunks), mode="edge")
        return RowLayout(
            images=self.images[rows],
            labels=self.labels[rows],
            num_images=num_images,
            num_chunks=num_chunks,
        )

    def value(self, classifier):
        return self._over_chunks(_sum_of_losses, classifier)

    def value_and_grad(self, classifier):
        return self._over_chunks(eqx.filter_value_and_grad(_sum_of_losses), classifier)

    @property
    def mean_square(self):
        squares = jnp.sum(self.images[: self.num_images] ** 2)
        return squares / self.num_images

    def _over_chunks(self, fn, classifier):
        """The sum of a function of a chunk over all chunks, divided by the number of
        images."""
        is_real = jnp.arange(len(self.labels)) < self.num_images
        chunks = jax.tree.map(
            lambda x: x.reshape(self.num_chunks, -1, *x.shape[1:]),
            (self.images, self.labels, is_real),
        )
        first = jax.tree.map(lambda x: x[0], chunks)
        zero = optax.tree.zeros_like(jax.eval_shape(lambda: fn(classifier, *first)))

        def body(total, chunk):
            return optax.tree.add(total, fn(classifier, *chunk)), None

        total, _ = jax.lax.scan(body, zero, chunks)
        return jax.tree.map(lambda x: x / self.num_images, total)


def count_chunks(num_images: int, num_features: int, chunk_bytes: int) -> int:
    # An accelerator is quickest at all of the data at once.
    if jax.default_backend() != "cpu":
        return 1
    num_bytes = 4 * num_images * num_features
    return min(-(-num_bytes // chunk_bytes), num_images)


@eqx.filter_jit
def _pad(data: Dataset, num_chunks: int):
    # By the last image again, since a network need not be differentiable at zero.
    padding = [(0, -len(data) % num_chunks)]
    images = data.floating()
    images = jnp.pad(images, padding + [(0, 0)] * (images.ndim - 1), mode="edge")
    return images, jnp.pad(data.labels, padding, mode="edge")


def _sum_of_losses(classifier, images, labels, is_real):
    losses = cross_entropies(jax.vmap(classifier)(images), labels)
    return jnp.sum(losses, where=is_real)
