import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ._classifier import LogisticRegression
from ._dataset import Dataset
from ._losses import cross_entropies


class Layout(eqx.Module):
    r"""Real images, laid out once for many passes over them.

    On a CPU they are taken in chunks, which stay in its cache between the forward and
    the backward pass. A [`eqdistill.LogisticRegression`][] is not given the pixels that
    are the same in all images: what these add to the logits is one vector.
    """

    images: Float[Array, "rows *shape"]
    labels: Int[Array, " rows"]
    varying: Int[Array, " q"] | None
    constants: Float[Array, " p"] | None
    num_images: int = eqx.field(static=True)
    num_chunks: int = eqx.field(static=True)

    @staticmethod
    def of(data: Dataset, classifier: PyTree) -> "Layout":
        if not isinstance(classifier, LogisticRegression):
            # A network's activations are many times as large as its images.
            num_chunks = _num_chunks(data, math.prod(data.shape), chunk_bytes=2**19)
            images, labels = _arrange(data, None, num_chunks)
            return Layout(images, labels, None, None, len(data), num_chunks)
        pixels = np.asarray(data.images).reshape(len(data), -1)
        is_constant = pixels.min(axis=0) == pixels.max(axis=0)
        is_constant[0] &= not is_constant.all()
        first = Dataset(data.images[:1], data.labels[:1], data.num_classes)
        constants = np.where(is_constant, np.ravel(first.floating()), 0)
        varying = jnp.asarray(np.flatnonzero(~is_constant))
        num_chunks = _num_chunks(data, len(varying), chunk_bytes=2**23)
        images, labels = _arrange(data, varying, num_chunks)
        constants = jnp.asarray(constants) if constants.any() else None
        return Layout(images, labels, varying, constants, len(data), num_chunks)

    def batch(self, indices: Int[Array, " batch"]) -> "Layout":
        """Some of the images, for one pass over them."""
        num_images = len(indices)
        chunk_size = len(self.labels) // self.num_chunks
        num_chunks = -(-num_images // chunk_size)
        rows = jnp.pad(indices, (0, -num_images % num_chunks), mode="edge")
        images, labels = self.images[rows], self.labels[rows]
        return Layout(
            images, labels, self.varying, self.constants, num_images, num_chunks
        )

    def restrict(self, classifier: PyTree) -> PyTree:
        """The classifier of an image as it is laid out."""
        if self.varying is None:
            return classifier
        intercept = classifier.intercept
        if self.constants is not None:
            constant = self.constants @ classifier.weights
            intercept = constant if intercept is None else intercept + constant
        return _Linear(classifier.weights[self.varying].T, intercept)


class _Linear(eqx.Module):
    weights: Float[Array, "c q"]
    intercept: Float[Array, " c"] | None

    def logits(self, images: Float[Array, "chunk q"]) -> Float[Array, "chunk c"]:
        logits = _multiply(self.weights, images)
        return logits if self.intercept is None else logits + self.intercept


@eqx.filter_custom_vjp
def _multiply(weights, images):
    # CPUs multiply by eight numbers at once.
    num_classes = len(weights)
    padded = jnp.pad(weights, ((0, -num_classes % 8), (0, 0)))
    return (images @ padded.T)[:, :num_classes]


@_multiply.def_fwd
def _(perturbed, weights, images):
    del perturbed
    return _multiply(weights, images), None


@_multiply.def_bwd
def _(residuals, cotangent, perturbed, weights, images):
    del residuals, perturbed, weights
    # Not with the padding, as it would be by default.
    return cotangent.T @ images


def _num_chunks(data: Dataset, num_features: int, chunk_bytes: int) -> int:
    # An accelerator is quickest at all of the data at once.
    if jax.default_backend() != "cpu":
        return 1
    num_bytes = 4 * len(data) * num_features
    return min(-(-num_bytes // chunk_bytes), len(data))


@eqx.filter_jit
def _arrange(data: Dataset, varying, num_chunks: int):
    images = data.images
    if varying is not None:
        images = images.reshape(len(data), -1)[:, varying]
    images = Dataset.floating(eqx.tree_at(lambda d: d.images, data, images))
    # The last image again, since a network need not be differentiable at zero.
    padding = [(0, -len(data) % num_chunks)]
    images = jnp.pad(images, padding + [(0, 0)] * (images.ndim - 1), mode="edge")
    return images, jnp.pad(data.labels, padding, mode="edge")


def data_loss(classifier: PyTree, layout: Layout) -> Float[Array, ""]:
    """Mean cross-entropy of a classifier on all images: a sum over the chunks."""
    return _data_loss(layout.restrict(classifier), layout)


@eqx.filter_custom_vjp
def _data_loss(classifier, layout):
    return _over_chunks(_chunk_loss, classifier, layout)


@_data_loss.def_fwd
def _(perturbed, classifier, layout):
    # The gradient is taken with the value, while a chunk is in the cache.
    del perturbed
    return _over_chunks(eqx.filter_value_and_grad(_chunk_loss), classifier, layout)


@_data_loss.def_bwd
def _(gradient, loss_cotangent, perturbed, classifier, layout):
    del perturbed, classifier, layout
    return optax.tree.scale(loss_cotangent, gradient)


def _chunk_loss(classifier, images, labels, is_real):
    is_linear = isinstance(classifier, _Linear)
    logits = classifier.logits(images) if is_linear else jax.vmap(classifier)(images)
    losses = cross_entropies(logits, labels)
    return jnp.sum(losses, where=is_real)


def _over_chunks(fn, classifier, layout):
    """The sum of a function of a chunk over all chunks."""
    is_real = jnp.arange(len(layout.labels)) < layout.num_images
    chunks = jax.tree.map(
        lambda x: x.reshape(layout.num_chunks, -1, *x.shape[1:]),
        (layout.images, layout.labels, is_real),
    )
    first = jax.tree.map(lambda x: x[0], chunks)
    zero = optax.tree.zeros_like(jax.eval_shape(lambda: fn(classifier, *first)))

    def body(total, chunk):
        return optax.tree.add(total, fn(classifier, *chunk)), None

    total, _ = jax.lax.scan(body, zero, chunks)
    return jax.tree.map(lambda x: x / layout.num_images, total)
