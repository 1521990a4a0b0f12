from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._conversions import as_ints
from ._distilled_set import DistilledSet
from ._pictures import height_and_width


class Frequencies(eqx.Module):
    r"""The low frequencies of images: what is learned are $k \times k$ coefficients
    $z$ of the discrete cosine transform of each image, from which `decode` makes

    $$x = C_h^\top z \, C_w,$$

    with the first $k$ rows $C_h$ and $C_w$ of the orthonormal transforms of the height
    and the width. The images are smooth, and take fewer bytes.

    Source: Shin, Shin and Moon, *Frequency Domain-based Dataset Distillation* (FreD),
    2023, which takes the frequencies of the largest variance.
    """

    coefficients: DistilledSet
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, coefficients: DistilledSet, shape: Sequence[int]):
        """**Arguments:**

        - `coefficients`: the coefficients in the place of images, of shape `(k, k)` or
            `(channels, k, k)`, with the labels, the ridge and the loss.
        - `shape`: the shape of an image, `(h, w)` or `(channels, h, w)`.

        **Raises:**

        A `ValueError` if an image of this shape has no such coefficients.
        """
        shape = as_ints("shape", shape)
        least = coefficients.images.shape[1:]
        size, other = height_and_width("coefficients", least)
        is_alike = len(shape) == len(least) and shape[:-2] == least[:-2]
        if size != other or not is_alike or size > min(shape[-2:]):
            raise ValueError(
                "`coefficients` must have the channels of an image, and as many of "
                "them for its height as for its width, no more than pixels; got "
                f"{least} for images of `shape` {shape}."
            )
        self.coefficients = coefficients
        self.shape = shape

    @classmethod
    def from_distilled(cls, distilled: DistilledSet, size: int) -> "Frequencies":
        """Takes the low frequencies of the images of a distilled set.

        **Arguments:**

        - `distilled`: images of shape `(h, w)` or `(channels, h, w)`.
        - `size`: $k$, from 1 to the smaller side of an image.

        **Raises:**

        A `ValueError` if `size` is out of its range.
        """
        shape = distilled.images.shape[1:]
        most = min(height_and_width("distilled", shape))
        if not 1 <= size <= most:
            raise ValueError(
                f"`size` must be from 1 to {most}, the smaller side of an image; got "
                f"{size}."
            )
        rows, columns = (_transform(side, size, distilled) for side in shape[-2:])
        images = rows @ distilled.images @ columns.T
        return cls(eqx.tree_at(lambda d: d.images, distilled, images), shape)

    def decode(self) -> DistilledSet:
        """The distilled set, with images of the size of real ones."""
        z = self.coefficients.images
        rows, columns = (
            _transform(side, z.shape[-1], self.coefficients) for side in self.shape[-2:]
        )
        return eqx.tree_at(lambda d: d.images, self.coefficients, rows.T @ z @ columns)

    @property
    def nbytes(self) -> int:
        """The size of the coefficients and the labels, in bytes."""
        return self.coefficients.nbytes


def _transform(side: int, size: int, like: DistilledSet) -> Float[Array, "k side"]:
    """The first rows of the orthonormal discrete cosine transform."""
    frequencies, pixels = np.arange(size)[:, None], np.arange(side)
    cosines = np.cos(np.pi * frequencies * (2 * pixels + 1) / (2 * side))
    norms = np.where(frequencies > 0, 2, 1) / side
    return jnp.asarray(np.sqrt(norms) * cosines, like.images.dtype)
