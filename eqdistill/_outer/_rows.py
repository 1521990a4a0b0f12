import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from .._data._dataset import Dataset
from .._losses import cross_entropies
from ._mean_loss import AbstractLayout


class Rows(AbstractLayout):
    """Images for any model, in chunks. On a CPU, the images and the activations of
    a chunk stay in the cache between the forward and the backward pass. A chunk becomes
    floating point only when it is used."""

    images: Float[Array, "rows *shape"] | UInt8[Array, "rows *shape"]
    labels: Int[Array, " rows"]
    num_images: int = eqx.field(static=True)
    num_chunks: int = eqx.field(static=True)

    def __init__(self, images: Array, labels: Array):
        self.num_images = len(images)
        # The activations of a network are many times as large as its images.
        pixels = math.prod(images.shape[1:])
        self.num_chunks = count_chunks(len(images), pixels, chunk_bytes=2**19)
        # Padded by the last image: a network need not be differentiable at zero.
        short = -len(images) % self.num_chunks
        pad = lambda x: x[np.minimum(np.arange(len(x) + short), len(x) - 1)]
        self.images, self.labels = (pad(x) if short else x for x in (images, labels))

    def value(self, model):
        arrays, static = eqx.partition(model, eqx.is_array)
        return self._over_chunks(_sum_of_losses, arrays, static)

    def value_and_grad(self, moving, fixed):
        return self._over_chunks(jax.value_and_grad(_sum_of_losses), moving, fixed)

    def _over_chunks(self, fn, moving, fixed):
        """The sum of a function of a chunk over all chunks, divided by the number of
        images."""
        is_real = jnp.arange(len(self.labels)) < self.num_images
        chunks = jax.tree.map(
            lambda x: x.reshape(self.num_chunks, -1, *x.shape[1:]),
            (self.images, self.labels, is_real),
        )
        first = jax.tree.map(lambda x: x[0], chunks)
        zero = optax.tree.zeros_like(jax.eval_shape(lambda: fn(moving, fixed, *first)))

        def body(total, chunk):
            return optax.tree.add(total, fn(moving, fixed, *chunk)), None

        if self.num_chunks == 1:
            total = fn(moving, fixed, *first)
        else:
            total, _ = jax.lax.scan(body, zero, chunks)
        return jax.tree.map(lambda x: x / self.num_images, total)


def count_chunks(num_images: int, num_features: int, chunk_bytes: int) -> int:
    # An accelerator is quickest at all of the data at once.
    if jax.default_backend() != "cpu":
        return 1
    num_bytes = 4 * num_images * num_features
    return min(-(-num_bytes // chunk_bytes), num_images)


def _sum_of_losses(moving, fixed, images, labels, is_real):
    model = eqx.combine(moving, fixed)
    images = Dataset.to_floating(images)
    losses = cross_entropies(jax.vmap(model)(images), labels)
    return jnp.sum(losses, where=is_real)
