from collections.abc import Sequence

import equinox as eqx
import jax

from .._conversions import as_ints
from ._distilled_set import DistilledSet
from ._parameterisation import AbstractParameterisation
from ._pictures import height_and_width


class Packed(AbstractParameterisation):
    r"""Stores $f^2$ downsampled images in the space of one. Images of $h / f \times w /
    f$ pixels are learned, and `decode` enlarges them to $h \times w$ by bilinear
    interpolation.

    !!! Example
        ```python
        real = eqd.DistilledSet.from_real(train, 40, l2=1e-3, key=jax.random.key(0))
        start = eqd.Packed.from_distilled(real, 2)  # as many pixels as ten images
        result = eqd.distill(start, model, train, learn=lambda s: s.small.images)
        result.start.small  # the small images
        result.distilled  # forty images of the size of real ones
        ```

    Source: Kim et al., *Dataset Condensation via Efficient Synthetic-Data
    Parameterization* (IDC), 2022.
    """

    small: DistilledSet
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, small: DistilledSet, shape: Sequence[int]):
        """**Arguments:**

        - `small`: the small images, of shape `(h / f, w / f)` or
            `(channels, h / f, w / f)`, with the labels, the ridge and the loss.
        - `shape`: the shape of an enlarged image, `(h, w)` or `(channels, h, w)`.
        """
        self.small, self.shape = small, as_ints("shape", shape)
        least = small.images.shape[1:]
        height, width = height_and_width("small", least)
        factor = max(self.shape[-1] // width, 1) if self.shape else 1
        if self.shape != (*least[:-2], factor * height, factor * width):
            raise ValueError(
                "`shape` must be that of a small image with its height and width "
                f"multiplied by the same integer; got {self.shape} for {least}."
            )

    @classmethod
    def from_distilled(cls, distilled: DistilledSet, factor: int = 2) -> "Packed":
        """Downsamples the images of a distilled set, of shape `(h, w)` or
        `(channels, h, w)`: each pixel becomes the mean of a square of pixels. The side
        of the square, `factor`, must divide the height and the width."""
        shape = distilled.images.shape
        height, width = height_and_width("distilled", shape[1:])
        if factor < 1 or height % factor or width % factor:
            raise ValueError(
                f"`factor` must divide the height {height} and the width {width} of "
                f"the images; got {factor}."
            )
        sides = (height // factor, factor, width // factor, factor)
        images = distilled.images.reshape(*shape[:-2], *sides).mean((-3, -1))
        return cls(eqx.tree_at(lambda d: d.images, distilled, images), shape[1:])

    def decode(self) -> DistilledSet:
        """Returns the distilled set, with images of the size of real ones."""
        shape = (len(self.small), *self.shape)
        images = jax.image.resize(self.small.images, shape, "bilinear")
        return eqx.tree_at(lambda d: d.images, self.small, images)

    @property
    def nbytes(self) -> int:
        """The size of the small images and the labels, in bytes."""
        return self.small.nbytes
