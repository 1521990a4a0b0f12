import functools
import itertools as it
import math
from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class LinearLayout(eqx.Module):
    r"""Features of images, stored so that mostly-constant features are cheap for a
    linear head.

    The background, which is the smallest value of each feature, is subtracted. The
    features are sorted by how often they differ from the background, and the images by
    the rarest feature in which they differ. A chunk of the sorted images then needs
    only the features up to the rarest one in the chunk: for MNIST, on average 450 of
    784 pixels.

    The features are the first axis of a chunk, because a CPU is then fastest at both
    products, the logits $W X$ and the gradient $R X^\top$.
    """

    chunks: tuple["_Chunk", ...]
    order: Int[Array, " p"]
    rank: Int[Array, " p"]
    background: Float[Array, " p"] | None
    num_images: int = eqx.field(static=True)

    def __init__(self, features: np.ndarray, labels: np.ndarray):
        """`features` has shape `(N, p)`. Bytes are scaled to the range 0 to 1."""
        # NumPy, since the shapes of the chunks depend on the values.
        is_bytes = features.dtype == np.uint8
        dtype = np.dtype(jnp.result_type(float)) if is_bytes else features.dtype
        scale = dtype.type(255 if is_bytes else 1)
        background = features.min(axis=0)
        is_constant = features.max(axis=0) == background
        some = features[:: -(-len(features) // 4096)]
        frequency = np.mean(some != background, axis=0)
        order = np.argsort(is_constant - frequency, kind="stable")
        num_varying = max(int(np.sum(~is_constant)), 1)
        # The number of sorted features that each image needs.
        rank = np.argsort(order)
        count = (rank + 1).astype(np.min_scalar_type(len(order)))
        needed = np.concatenate(
            [
                np.max((block != background) * count, axis=1, initial=1)
                for block in _blocks(features)
            ]
        )
        by_need = np.argsort(needed, kind="stable")
        num_chunks = min(-(-4 * features.size // 2**23), _MOST_CHUNKS, len(features))
        chunk_size = -(-len(features) // num_chunks)
        chunk_size += -chunk_size % _LANES
        chunks = []
        for rows in np.split(by_need, range(chunk_size, len(features), chunk_size)):
            columns = order[: min(int(needed[rows[-1]]), num_varying)]
            chunk = _aligned((len(columns), chunk_size), dtype)
            chunk[:, len(rows) :] = 0
            for i, block in zip(it.count(0, _BLOCK), _blocks(rows), strict=False):
                part = features[block].T[columns] - background[columns][:, None]
                np.divide(part, scale, out=chunk[:, i : i + len(block)])
            # A label of -1 marks the unused end of a chunk.
            classes = np.full(chunk_size, -1, labels.dtype)
            classes[: len(rows)] = labels[rows]
            chunks.append((chunk, classes))
        background = np.divide(background, scale, dtype=dtype)
        # In one call: `jnp.asarray` would compile a program for each shape.
        chunks, self.order, self.rank, self.background = jax.device_put(
            (chunks, order, rank, background if background.any() else None)
        )
        self.chunks = tuple(_Chunk(*chunk) for chunk in chunks)
        self.num_images = len(features)

    def value(self, head: eqx.nn.Linear) -> Float[Array, ""]:
        """The mean cross-entropy of the head's outputs."""
        losses, _ = self._by_chunk(head)
        return _sum(losses) / self.num_images

    def value_and_grad(
        self, head: eqx.nn.Linear
    ) -> tuple[Float[Array, ""], eqx.nn.Linear]:
        """The mean cross-entropy, and its gradient in the head."""
        losses, residuals = self._by_chunk(head)
        products = [
            _multiply_back(chunk.features, residual)
            for chunk, residual in zip(self.chunks, residuals, strict=True)
        ]
        num_features = len(self.order)
        weight = _sum(
            jnp.pad(product, ((0, num_features - len(product)), (0, 0)))
            for product in products
        )
        weight = _with_last_class(_take(weight, self.rank))
        bias = _with_last_class(_sum(jnp.sum(x, axis=1) for x in residuals))
        if self.background is not None:
            weight = weight + jnp.outer(self.background, bias)
        gradient = eqx.tree_at(lambda head: head.weight, head, weight.T)
        if head.bias is not None:
            gradient = eqx.tree_at(lambda head: head.bias, gradient, bias)
        gradient = jax.tree.map(
            lambda x, old: (x / self.num_images).astype(old.dtype), gradient, head
        )
        return _sum(losses) / self.num_images, gradient

    def _by_chunk(self, head: eqx.nn.Linear):
        """The sum of the losses of each chunk, and its gradient in the logits relative
        to the logit of the last class, which saves one class in each product."""
        weight = head.weight[:-1] - head.weight[-1:]
        offset = None if head.bias is None else head.bias[:-1] - head.bias[-1:]
        if self.background is not None:
            constant = weight @ self.background
            offset = constant if offset is None else offset + constant
        weight = _take(weight.T, self.order).T
        losses, residuals = [], []
        for chunk in self.chunks:
            logits = weight[:, : len(chunk.features)] @ chunk.features
            if offset is not None:
                logits = logits + offset[:, None]
            loss, residual = _loss_and_residual(logits, chunk.labels)
            losses.append(loss)
            residuals.append(residual)
        return losses, residuals


# The chunks are not in a loop: more of them take longer to compile, and gain nothing.
_MOST_CHUNKS = 8
# The number of float32 in a vector register.
_LANES = 16
# The number of images in a block of NumPy operations.
_BLOCK = 512


class _Chunk(eqx.Module):
    """The first `q` of the sorted features of `m` images, minus the background. Images
    with label -1 are padding."""

    features: Float[Array, "q m"]
    labels: Int[Array, " m"]


def _product(
    features: Float[Array, "q m"], residual: Float[Array, "c m"]
) -> Float[Array, "q c"]:
    num_classes = len(residual)
    padded = jnp.pad(residual, ((0, -num_classes % _LANES), (0, 0)))
    return (features @ padded.T)[:, :num_classes]


_multiply_back = jax.custom_batching.custom_vmap(_product)


@_multiply_back.def_vmap
def _(axis_size, is_batched, features, residual):
    if is_batched == [False, True]:
        # Many heads are one head with many classes, which needs less padding.
        together = residual.reshape(-1, residual.shape[2])
        product = _multiply_back(features, together)
        product = product.reshape(len(features), axis_size, -1)
        return jnp.moveaxis(product, 1, 0), True
    axes = [0 if batched else None for batched in is_batched]
    return jax.vmap(_product, axes)(features, residual), True


# Traced once for all chunks.
@jax.jit
def _loss_and_residual(logits: Float[Array, "k m"], labels: Int[Array, " m"]):
    """The sum of the cross-entropies, and its gradient in the logits. The logit of the
    last class, which is not among them, is zero."""
    largest = jnp.max(logits, axis=0, initial=0)
    exponentials = jnp.exp(logits - largest[None])
    total = jnp.sum(exponentials, axis=0) + jnp.exp(-largest)
    is_label = jnp.arange(len(logits))[:, None] == labels[None]
    is_real = (labels >= 0).astype(logits.dtype)
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=0)
    loss = jnp.sum(is_real * (largest - of_label + jnp.log(total)))
    return loss, exponentials * (is_real / total)[None] - is_label


def _with_last_class(gradient: Float[Array, "*p k"]) -> Float[Array, "*p c"]:
    """Appends the gradient of the last class: over all classes it sums to zero."""
    last = -jnp.sum(gradient, axis=-1, keepdims=True)
    return jnp.concatenate([gradient, last], axis=-1)


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


def _take(array: Float[Array, "p c"], order: Int[Array, " p"]) -> Float[Array, "p c"]:
    return array.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    """Blocks of rows that fit in the cache."""
    return [rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK)]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array with the alignment that lets JAX use it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
