import itertools
import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check_between
from .._conversions import as_ints
from ._distilled_set import DistilledSet
from ._parameterisation import AbstractParameterisation
from ._pictures import height_and_width


# From decorrelated channels to colours: a root of the covariance of the colours of
# natural images, whose largest column has norm one.
_ROOT = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
_COLOURS = _ROOT / np.linalg.norm(_ROOT, axis=0).max()


class Pyramid(AbstractParameterisation):
    r"""Images that are sums of levels of all sizes,

    $$\theta_i = C \sum_{k=0}^{K-1} \mathrm{up}(l_{ik}),$$

    where level $k$ has $2^k \times 2^k$ pixels, or as many as the image if that is
    fewer, and $\mathrm{up}$ enlarges it to the size of the image by bilinear
    interpolation. Learning all levels moves large structures faster than single pixels,
    so there is less of the noise that works for one network only. Images with three
    channels have their colours decorrelated by the fixed $3 \times 3$ matrix $C$. For
    other images $C$ is the identity.

    !!! Example
        ```python
        real = eqd.DistilledSet.from_real(train, l2=1e-3, key=jax.random.key(0))
        start = eqd.Pyramid.from_distilled(real)
        result = eqd.distill(start, model, data, learn=lambda s: s.levels.images)
        result.distilled  # the images
        ```

        Levels can also be added during a run. Each `distill` continues from the result
        of the one before:

        ```python
        start = eqd.Pyramid.from_distilled(real, 3)  # levels of 1, 4 and 16 pixels
        for _ in range(3):
            start = eqd.distill(start, model, data, steps=500).start.refined()
        ```

    Source: Cazenavette, Torralba and Sitzmann, *Dataset Distillation for Pre-Trained
    Self-Supervised Vision Models*, 2025. Their images also pass through a sigmoid. The
    matrix is from Olah, Mordvintsev and Schubert, *Feature Visualization*, 2017.
    """

    levels: DistilledSet
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, levels: DistilledSet, shape: Sequence[int]):
        """**Arguments:**

        - `levels`: a distilled set with one row in place of each image. The row holds
            the pixels of the image's levels, coarsest first, one after another. Each
            level has shape `(*channels, height, width)`.
        - `shape`: the shape of an image, `(h, w)` or `(channels, h, w)`.
        """
        self.levels, self.shape = levels, as_ints("shape", shape)
        height_and_width("shape", self.shape)
        ends, found = _ends(self.shape), levels.images.shape[1:]
        if len(found) != 1 or found[0] not in ends:
            raise ValueError(
                f"`levels` must have rows of {', '.join(map(str, ends))} numbers, for "
                f"one level or more of images of shape {self.shape}; got shape {found}."
            )

    @classmethod
    def from_distilled(
        cls, distilled: DistilledSet, num_levels: int | None = None
    ) -> "Pyramid":
        """The pyramid of the images of a distilled set. Each level is the downsampled
        residual of the coarser levels.

        **Arguments:**

        - `distilled`: a set of images of shape `(h, w)` or `(channels, h, w)`.
        - `num_levels`: the number of levels, starting with the coarsest. Defaults to
            all of them, whose sum is the image up to rounding.
        """
        shape = distilled.images.shape[1:]
        height_and_width("distilled", shape)
        shapes = _level_shapes(shape)
        num_levels = len(shapes) if num_levels is None else num_levels
        check_between(1, len(shapes), num_levels=num_levels)
        rest, rows = _mix(np.linalg.inv(_COLOURS), distilled.images), []
        for level_shape in shapes[:num_levels]:
            level = jax.image.resize(rest, (len(rest), *level_shape), "bilinear")
            rest = rest - jax.image.resize(level, rest.shape, "bilinear")
            rows.append(level.reshape(len(rest), -1))
        return cls(_with_images(distilled, jnp.concatenate(rows, axis=1)), shape)

    def decode(self) -> DistilledSet:
        """Returns the distilled set, with images of the size of real ones."""
        rows = self.levels.images
        total = jnp.zeros((len(rows), *self.shape), rows.dtype)
        ends = [0, *_ends(self.shape)]
        for i, shape in enumerate(_level_shapes(self.shape)):
            if ends[i + 1] <= rows.shape[1]:
                level = rows[:, ends[i] : ends[i + 1]].reshape(-1, *shape)
                total += jax.image.resize(level, total.shape, "bilinear")
        return _with_images(self.levels, _mix(_COLOURS, total))

    def refined(self) -> "Pyramid":
        """Adds the next finer level, of zeros, so the images stay the same. Raises a
        `ValueError` if the pyramid already has all levels."""
        rows = self.levels.images
        larger = [end for end in _ends(self.shape) if end > rows.shape[1]]
        if not larger:
            raise ValueError(
                "`refined` needs a pyramid without its finest level; this one has all "
                f"levels of images of shape {self.shape}."
            )
        rows = jnp.pad(rows, [(0, 0), (0, larger[0] - rows.shape[1])])
        return Pyramid(_with_images(self.levels, rows), self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the levels and the labels, in bytes."""
        return self.levels.nbytes


def _level_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of all levels of an image, coarsest first."""
    *channels, height, width = shape
    sides = [2**k for k in range((max(height, width) - 1).bit_length() + 1)]
    return [(*channels, min(side, height), min(side, width)) for side in sides]


def _ends(shape: tuple[int, ...]) -> list[int]:
    """The index in a row at which the pixels of each level end."""
    sizes = map(math.prod, _level_shapes(shape))
    return [*itertools.accumulate(sizes)]


def _mix(
    matrix: np.ndarray, images: Float[Array, "n *shape"]
) -> Float[Array, "n *shape"]:
    """Multiplies the three channels of colour images by a matrix."""
    if images.ndim != 4 or images.shape[1] != 3:
        return images
    rounded = jnp.asarray(matrix, images.dtype)
    return jnp.einsum("cd,ndhw->nchw", rounded, images, precision="highest")


def _with_images(distilled: DistilledSet, images: Array) -> DistilledSet:
    return eqx.tree_at(lambda d: d.images, distilled, images)
