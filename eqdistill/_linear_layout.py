import functools
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ._dataset import Dataset
from ._layout import AbstractLayout, count_chunks


class LinearLayout(AbstractLayout):
    r"""Images for a [`eqdistill.LogisticRegression`][], in which rare pixels are
    multiplied for rare images alone.

    The background is the least value of each pixel, and is taken off. The pixels are
    sorted by how often they are more than that, and the images by the rarest pixel in
    which they are. A chunk of the sorted images then needs but the pixels up to its
    rarest. Of MNIST that leaves 450 of 784 pixels an image.

    A chunk lies in memory by pixels, which is how CPUs multiply it fastest both for the
    logits, $W^\top X$, and for the gradient, $X R$.
    """

    chunks: tuple["_Chunk", ...]
    order: Int[Array, " p"]
    rank: Int[Array, " p"]
    background: Float[Array, " p"] | None
    sum_of_squares: Float[Array, ""]
    num_images: int = eqx.field(static=True)

    @staticmethod
    def of(data: Dataset) -> "LinearLayout":
        # On the host: the shapes of the chunks depend on what is in the images.
        pixels = np.asarray(data.images).reshape(len(data), -1)
        labels = np.asarray(data.labels)
        dtype = jax.eval_shape(Dataset.floating, data).dtype
        scale = dtype.type(255 if pixels.dtype == np.uint8 else 1)
        starts = range(0, len(pixels), _AT_ONCE)
        blocks = [slice(start, start + _AT_ONCE) for start in starts]
        num_chunks = count_chunks(len(pixels), pixels.shape[1], chunk_bytes=2**23)
        num_chunks = min(num_chunks, _MOST_CHUNKS)
        chunk_size = -(-len(pixels) // num_chunks)
        chunk_size += -chunk_size % _LANES
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            extrema = pool.map(lambda block: _extrema(pixels[block]), blocks)
            minima, maxima = zip(*extrema, strict=True)
            background = np.min(minima, axis=0)
            is_constant = np.max(maxima, axis=0) == background
            order = _by_frequency(pixels, background, is_constant)
            # In so few steps as fit a byte, to be quick.
            levels = np.linspace(0, 255, len(order)).astype(np.uint8)
            rarity = np.empty_like(levels)
            rarity[order] = levels

            def rarest_of(block):
                is_other = (pixels[block] != background).view(np.uint8)
                return np.max(np.multiply(is_other, rarity, out=is_other), axis=1)

            rarest = np.concatenate(list(pool.map(rarest_of, blocks)))
            num_varying = max(np.sum(~is_constant), 1)

            floating = np.divide(background, scale, dtype=dtype)
            has_background = bool(background.any())

            def cut(at):
                q = np.searchsorted(levels, rarest[at[-1]], side="right")
                varying = order[: min(q, num_varying)]
                # What is left of the last chunk is zero, with labels of no class.
                chunk = _aligned((len(varying), chunk_size), dtype)
                chunk[:, len(at) :] = 0
                classes = np.full(chunk_size, -1, labels.dtype)
                classes[: len(at)] = labels[at]
                squares = 0.0
                # As many at a time as a cache holds, since they are transposed.
                for i in range(0, len(at), 512):
                    some = pixels[at[i : i + 512]].T[varying]
                    if has_background:
                        some = some - background[varying][:, None]
                    out = chunk[:, i : i + some.shape[1]]
                    np.divide(some, scale, out=out)
                    # Of |x|^2, what is not of the background alone.
                    out = out.astype(np.promote_types(dtype, np.float32), copy=False)
                    by_pixel = np.einsum("qm,qm->q", out, out)
                    if has_background:
                        by_pixel += 2 * floating[varying] * np.sum(out, axis=1)
                    squares += float(np.sum(by_pixel))
                return chunk, classes, squares

            by_rarity = np.argsort(rarest, kind="stable")
            cuts = np.split(by_rarity, range(chunk_size, len(pixels), chunk_size))
            *chunks, squares = zip(*pool.map(cut, cuts), strict=True)
        squares = sum(squares) + len(pixels) * float(np.sum(floating**2))
        # All by this, as `jnp.asarray` compiles a program for each shape.
        chunks, order, rank, background, squares = jax.device_put(
            (
                chunks,
                order,
                np.argsort(order),
                floating if has_background else None,
                np.asarray(squares, dtype),
            )
        )
        return LinearLayout(
            chunks=tuple(map(_Chunk, *chunks)),
            order=order,
            rank=rank,
            background=background,
            sum_of_squares=squares,
            num_images=len(pixels),
        )

    @property
    def mean_square(self):
        return self.sum_of_squares / self.num_images

    def value(self, classifier):
        losses, _ = self._by_chunk(classifier)
        return _sum(losses) / self.num_images

    def value_and_grad(self, classifier):
        losses, residuals = self._by_chunk(classifier)
        products = [
            _multiply_back(chunk.pixels, residual)
            for chunk, residual in zip(self.chunks, residuals, strict=True)
        ]
        num_pixels = len(self.order)
        weights = _sum(
            jnp.pad(product, ((0, num_pixels - len(product)), (0, 0)))
            for product in products
        )
        weights = _with_last_class(_take(weights, self.rank))
        intercept = _sum(jnp.sum(residual, axis=1) for residual in residuals)
        intercept = _with_last_class(intercept)
        if self.background is not None:
            weights = weights + jnp.outer(self.background, intercept)
        gradient = eqx.tree_at(lambda c: c.weights, classifier, weights)
        if classifier.intercept is not None:
            gradient = eqx.tree_at(lambda c: c.intercept, gradient, intercept)
        gradient = jax.tree.map(
            lambda x, old: (x / self.num_images).astype(old.dtype), gradient, classifier
        )
        return _sum(losses) / self.num_images, gradient

    def _by_chunk(self, classifier: PyTree):
        """The sum of the losses of each chunk, and its gradient in the logits less
        those of the last class, by which all is multiplied once less."""
        weights, offset = jax.tree.map(
            lambda x: x[..., :-1] - x[..., -1:],
            (classifier.weights, classifier.intercept),
        )
        if self.background is not None:
            constant = self.background @ weights
            offset = constant if offset is None else offset + constant
        weights = _take(weights, self.order).T
        losses, residuals = [], []
        for chunk in self.chunks:
            logits = weights[:, : len(chunk.pixels)] @ chunk.pixels
            if offset is not None:
                logits = logits + offset[:, None]
            loss, residual = _loss_and_residual(logits, chunk.labels)
            losses.append(loss)
            residuals.append(residual)
        return losses, residuals


# More are no quicker to multiply, but slower to compile: they are not in a loop.
_MOST_CHUNKS = 8
# CPUs multiply by so many numbers at once.
_LANES = 16
# Images that the host looks at at once.
_AT_ONCE = 1024


class _Chunk(eqx.Module):
    """Of `m` images, the first `q` of the sorted pixels, less the background. Those
    without a class, of label -1, only fill it up."""

    pixels: Float[Array, "q m"]
    labels: Int[Array, " m"]


def _product(
    pixels: Float[Array, "q m"], residual: Float[Array, "c m"]
) -> Float[Array, "q c"]:
    num_classes = len(residual)
    padded = jnp.pad(residual, ((0, -num_classes % _LANES), (0, 0)))
    return (pixels @ padded.T)[:, :num_classes]


_multiply_back = jax.custom_batching.custom_vmap(_product)


@_multiply_back.def_vmap
def _(axis_size, is_batched, pixels, residual):
    if is_batched == [False, True]:
        # Many classifiers are as one of many classes, which is padded less.
        together = residual.reshape(-1, residual.shape[2])
        product = _multiply_back(pixels, together).reshape(len(pixels), axis_size, -1)
        return jnp.moveaxis(product, 1, 0), True
    axes = [0 if batched else None for batched in is_batched]
    return jax.vmap(_product, axes)(pixels, residual), True


# Traced once for all chunks.
@jax.jit
def _loss_and_residual(logits: Float[Array, "k m"], labels: Int[Array, " m"]):
    """The sum of the cross-entropies, and its gradient in the logits, if there is one
    more class after these, with a logit of zero."""
    largest = jnp.max(logits, axis=0, initial=0)
    exponentials = jnp.exp(logits - largest)
    total = jnp.sum(exponentials, axis=0) + jnp.exp(-largest)
    is_label = jnp.arange(len(logits))[:, None] == labels
    is_real = (labels >= 0).astype(logits.dtype)
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=0)
    loss = jnp.sum(is_real * (largest - of_label + jnp.log(total)))
    return loss, exponentials * (is_real / total) - is_label


def _with_last_class(gradient: Float[Array, "*p k"]) -> Float[Array, "*p c"]:
    """The gradient in a linear map to the logits, if it is this for all classes but the
    last: that is the last's less each of the others' logits, all of them together."""
    last = -jnp.sum(gradient, axis=-1, keepdims=True)
    return jnp.concatenate([gradient, last], axis=-1)


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


def _take(array: Float[Array, "p c"], order: Int[Array, " p"]) -> Float[Array, "p c"]:
    return array.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _extrema(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pixels.min(axis=0), pixels.max(axis=0)


def _by_frequency(
    pixels: np.ndarray, background: np.ndarray, is_constant: np.ndarray
) -> np.ndarray:
    """The pixels, from those most often not in the background to those never."""
    some = pixels[:: -(-len(pixels) // 4096)]
    frequency = np.mean(some != background, axis=0)
    return np.argsort(is_constant - frequency, kind="stable")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX need not copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
