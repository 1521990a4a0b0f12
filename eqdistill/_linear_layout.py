import math
import os
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
    background: Float[Array, " p"] | None
    sum_of_squares: Float[Array, ""]
    num_images: int = eqx.field(static=True)

    @staticmethod
    def of(data: Dataset, rows: np.ndarray | None = None) -> "LinearLayout":
        # On the host: the shapes of the chunks depend on what is in the images.
        pixels = np.asarray(data.images).reshape(len(data), -1)
        labels = np.asarray(data.labels)
        dtype = jax.eval_shape(Dataset.floating, data).dtype
        scale = dtype.type(255 if pixels.dtype == np.uint8 else 1)
        rows = np.arange(len(pixels)) if rows is None else rows
        num_chunks = count_chunks(len(rows), pixels.shape[1], chunk_bytes=2**23)
        num_chunks = min(num_chunks, _MOST_CHUNKS)
        chunk_size = -(-len(rows) // num_chunks)
        chunk_size += -chunk_size % _LANES
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = np.array_split(rows, -(-len(rows) // 4096))
            extrema = pool.map(lambda part: _extrema(pixels[part]), parts)
            minima, maxima = zip(*extrema, strict=True)
            background = np.min(minima, axis=0)
            is_constant = np.max(maxima, axis=0) == background
            order = _by_frequency(pixels, background, is_constant)
            # In so few steps as fit a byte, to be quick.
            levels = np.linspace(0, 255, len(order)).astype(np.uint8)
            rarity = np.empty_like(levels)
            rarity[order] = levels
            rarest = pool.map(
                lambda part: np.max((pixels[part] != background) * rarity, axis=1),
                parts,
            )
            rarest = np.concatenate(list(rarest))
            num_varying = max(np.sum(~is_constant), 1)

            floating = np.divide(background, scale, dtype=dtype)
            has_background = bool(background.any())

            def cut(at):
                q = np.searchsorted(levels, rarest[at[-1]], side="right")
                chosen = rows[at]
                varying = order[: min(q, num_varying)]
                chunk = _aligned((len(varying), len(chosen)), dtype)
                squares = 0.0
                # As many at a time as a cache holds, since they are transposed.
                for i in range(0, len(chosen), 512):
                    some = pixels[chosen[i : i + 512]].T[varying]
                    some = np.divide(some - background[varying][:, None], scale)
                    chunk[:, i : i + 512] = some
                    # Of |x|^2, what is not of the background alone.
                    cross = 2 * floating[varying][:, None] if has_background else 0
                    squares += float(np.sum(some * (some + cross)))
                return chunk, labels[chosen], squares

            by_rarity = np.argsort(rarest, kind="stable")
            cuts = np.split(by_rarity, range(chunk_size, len(rows), chunk_size))
            *chunks, squares = zip(*pool.map(cut, cuts), strict=True)
        squares = sum(squares) + len(rows) * float(np.sum(floating**2))
        return LinearLayout(
            chunks=tuple(map(_Chunk, *jax.device_put(chunks))),
            order=jnp.asarray(order),
            background=jnp.asarray(floating) if has_background else None,
            sum_of_squares=jnp.asarray(squares, dtype),
            num_images=len(rows),
        )

    @property
    def mean_square(self):
        return self.sum_of_squares / self.num_images

    def value(self, classifier):
        losses, _ = self._by_chunk(classifier)
        return _sum(losses) / self.num_images

    def value_and_grad(self, classifier):
        losses, residuals = self._by_chunk(classifier)
        weights = jnp.zeros_like(classifier.weights)
        for chunk, residual in zip(self.chunks, residuals, strict=True):
            product = chunk.multiply_back(residual)
            weights = weights.at[: len(product)].add(product)
        weights = jnp.zeros_like(weights).at[self.order].set(weights)
        intercept = _sum([jnp.sum(residual, axis=1) for residual in residuals])
        if self.background is not None:
            weights = weights + jnp.outer(self.background, intercept)
        gradient = eqx.tree_at(lambda c: c.weights, classifier, weights)
        if classifier.intercept is not None:
            gradient = eqx.tree_at(lambda c: c.intercept, gradient, intercept)
        total = (_sum(losses), gradient)
        return jax.tree.map(lambda x: x / self.num_images, total)

    def _by_chunk(self, classifier: PyTree):
        """The sum of the losses of each chunk, and its gradient in the logits."""
        offset = classifier.intercept
        if self.background is not None:
            constant = self.background @ classifier.weights
            offset = constant if offset is None else offset + constant
        weights = classifier.weights[self.order].T
        losses, residuals = [], []
        for chunk in self.chunks:
            logits = chunk.multiply(weights)
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


class _Chunk(eqx.Module):
    """Of `m` images, the first `q` of the sorted pixels, less the background."""

    pixels: Float[Array, "q m"]
    labels: Int[Array, " m"]

    def multiply(self, weights: Float[Array, "c p"]) -> Float[Array, "c m"]:
        return weights[:, : len(self.pixels)] @ self.pixels

    def multiply_back(self, residual: Float[Array, "c m"]) -> Float[Array, "q c"]:
        num_classes = len(residual)
        padded = jnp.pad(residual, ((0, -num_classes % _LANES), (0, 0)))
        return (self.pixels @ padded.T)[:, :num_classes]


def _loss_and_residual(logits: Float[Array, "c m"], labels: Int[Array, " m"]):
    """The sum of the cross-entropies, and its gradient in the logits."""
    log_p = jax.nn.log_softmax(logits, axis=0)
    targets = jax.nn.one_hot(labels, len(logits), axis=0, dtype=logits.dtype)
    return -jnp.sum(targets * log_p), jnp.exp(log_p) - targets


def _extrema(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pixels.min(axis=0), pixels.max(axis=0)


def _sum(arrays: list[Array]) -> Array:
    return jnp.sum(jnp.stack(arrays), axis=0)


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
