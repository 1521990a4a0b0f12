import abc
import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._checks import array_difference, check_at_least, check_between
from .._conversions import as_float, as_int


Image = Float[Array, "*channels height width"]


class AbstractAugmentation(eqx.Module):
    """A random change to one image, differentiable in the image.
    [`eqdistill.augment.augment`][] applies an augmentation to a batch."""

    @abc.abstractmethod
    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        """Returns the changed image, with the same shape and dtype. Images are
        floating-point arrays of shape `(height, width)` or `(channels, height,
        width)`."""


class Compose(AbstractAugmentation):
    """Several augmentations, applied one after another."""

    augmentations: tuple[AbstractAugmentation, ...]

    def __init__(self, *augmentations: AbstractAugmentation):
        """**Arguments:** the augmentations, in order."""
        self.augmentations = augmentations

    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        return _apply(self, None, image, key)


class OneOf(AbstractAugmentation):
    """One of several augmentations, drawn at random with equal probability, for each
    image or for each batch.

    !!! Example
        The augmentation of DSA and FRePo for images of 32 x 32 pixels:

        ```python
        from eqdistill import augment

        augmentation = augment.OneOf(
            augment.ColourJitter(),
            augment.Crop(4),
            augment.Cutout(16),
            augment.Flip(),
            augment.Affine(scale=1.2),
            augment.Affine(rotation=15),
            per_batch=True,
        )
        ```

    Source: Zhao and Bilen, *Dataset Condensation with Differentiable Siamese
    Augmentation*, 2021.
    """

    augmentations: tuple[AbstractAugmentation, ...]
    per_batch: bool = eqx.field(static=True)

    def __init__(self, *augmentations: AbstractAugmentation, per_batch: bool = False):
        """**Arguments:**

        - `augmentations`: at least one.
        - `per_batch`: whether [`eqdistill.augment.augment`][] draws one augmentation
            for all images, which is several times faster. Its random numbers still
            differ between images. A custom augmentation that calls a `OneOf` sees
            single images, so it then draws one for each image.
        """
        if not augmentations:
            raise ValueError(
                "`augmentations` must have at least one augmentation; got none."
            )
        self.augmentations = augmentations
        self.per_batch = per_batch

    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        return _apply(self, None, image, key)


def augment(
    augmentation: AbstractAugmentation,
    images: Float[Array, "n *shape"],
    *,
    key: PRNGKeyArray,
) -> Float[Array, "n *shape"]:
    r"""Augments each image of a batch with its own random key, $x_i' = A(x_i, k_i)$.
    The key $k_i$ is `key` with the index $i$ folded in."""
    return augment_part(augmentation, images, jnp.arange(len(images)), key)


def augment_part(
    augmentation: AbstractAugmentation,
    images: Float[Array, "n *shape"],
    places: Int[Array, " n"],
    key: PRNGKeyArray,
) -> Float[Array, "n *shape"]:
    """Augments the images at these places in a batch, exactly as `augment` would."""
    changed = _apply(augmentation, places, images, key)
    if difference := array_difference(images, changed):
        raise ValueError(
            "`augmentation` must keep the shape and the dtype of images; "
            f"`{type(augmentation).__name__}` did not: {difference}."
        )
    return changed


def _apply(
    augmentation: AbstractAugmentation,
    places: Int[Array, " n"] | None,
    x: Array,
    key: PRNGKeyArray,
) -> Any:
    """Applies an augmentation to images at these places in a batch, or to one image."""
    if isinstance(augmentation, Compose):
        keys = jr.split(key, len(augmentation.augmentations))
        for part, own_key in zip(augmentation.augmentations, keys, strict=True):
            x = _apply(part, places, x, own_key)
        return x
    is_one = places is None
    if isinstance(augmentation, OneOf) and (augmentation.per_batch or is_one):
        branches = [ft.partial(_apply, a, places) for a in augmentation.augmentations]
        choice_key, own_key = jr.split(key)
        index = jr.randint(choice_key, (), 0, len(branches))
        return jax.lax.switch(index, branches, x, own_key)
    if not is_one:
        of_image = ft.partial(_apply, augmentation, None)
        keys = jax.vmap(jr.fold_in, (None, 0))(key, places)
        return jax.vmap(of_image)(x, keys)
    return augmentation(x, key=key)


class Affine(AbstractAugmentation):
    r"""A random scaling, rotation and shift around the centre $m$ of the image,

    $$x'(u) = x(m + s \odot R_\alpha (u - m) + t),$$

    with bilinear interpolation at each pixel $u$. The image $x$ is zero outside its
    borders. The angle $\alpha$, the factors $s$ of the two axes and the shift $t$ have
    uniform distributions.

    **Arguments:**

    - `shift`: the largest shift along either axis, in pixels, at least 0.
    - `rotation`: the largest angle in either direction, in degrees, at least 0.
    - `scale`: the largest factor along either axis, at least 1. The smallest factor is
        `1 / scale`.

    Source: Zhao and Bilen, *Dataset Condensation with Differentiable Siamese
    Augmentation*, 2021, who use `Affine(rotation=15)` and `Affine(scale=1.2)`.
    """

    shift: float = eqx.field(default=0.0, converter=as_float, kw_only=True)
    rotation: float = eqx.field(default=0.0, converter=as_float, kw_only=True)
    scale: float = eqx.field(default=1.0, converter=as_float, kw_only=True)

    def __check_init__(self):
        check_at_least(0, shift=self.shift, rotation=self.rotation)
        check_at_least(1, scale=self.scale)

    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        keys, dtype = jr.split(key, 3), image.dtype
        shift = jr.uniform(keys[0], (2,), dtype, -self.shift, self.shift)
        degrees = jr.uniform(keys[1], (), dtype, -self.rotation, self.rotation)
        scale = jr.uniform(keys[2], (2,), dtype, 1 / self.scale, self.scale)
        angle = jnp.deg2rad(degrees)
        height, width = image.shape[-2:]
        middle = (height - 1) / 2, (width - 1) / 2
        y, x = jnp.indices((height, width), image.dtype)
        y, x = y - middle[0], x - middle[1]
        # Not a matrix product, because some accelerators round its factors to 10 bits.
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        rows = middle[0] + scale[0] * (cos * y - sin * x) + shift[0]
        columns = middle[1] + scale[1] * (sin * y + cos * x) + shift[1]
        sample = lambda channel: map_coordinates(channel, (rows, columns), order=1)
        return jnp.vectorize(sample, signature="(h,w)->(h,w)")(image)


class Crop(AbstractAugmentation):
    """Pads the image with zeros and crops it to its original size at a random position.

    **Arguments:** `padding`: the number of pixels to add on each side, at least 0.

    Source: He et al., *Deep Residual Learning*, 2016; Zhao and Bilen (2021) pad by an
    eighth of the image.
    """

    padding: int = eqx.field(converter=as_int)

    def __check_init__(self):
        check_at_least(0, padding=self.padding)

    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        channels = [0] * (image.ndim - 2)
        padded = jnp.pad(
            image, [(x, x) for x in (*channels, self.padding, self.padding)]
        )
        first = jr.randint(key, (2,), 0, 2 * self.padding + 1)
        return jax.lax.dynamic_slice(padded, (*channels, *first), image.shape)


class Flip(AbstractAugmentation):
    """Reflects the image from left to right, with a `probability` from 0 to 1.

    Source: Zhao and Bilen (2021).
    """

    probability: float = eqx.field(default=0.5, converter=as_float)

    def __check_init__(self):
        check_between(0, 1, probability=self.probability)

    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        is_flipped = jr.uniform(key, (), image.dtype) < self.probability
        return jnp.where(is_flipped, image[..., ::-1], image)


class Cutout(AbstractAugmentation):
    """Sets a square with a random centre in the image to zero. Near an edge, part of
    the square is outside the image.

    **Arguments:** `size`: the side of the square in pixels, at least 0.

    Source: DeVries and Taylor, *Improved Regularization of Convolutional Neural
    Networks with Cutout*, 2017; Zhao and Bilen (2021) take half the side of the image.
    """

    size: int = eqx.field(converter=as_int)

    def __check_init__(self):
        check_at_least(0, size=self.size)

    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        height, width = image.shape[-2:]
        centre = jr.randint(key, (2,), 0, jnp.array([height, width]))
        y, x = jnp.indices((height, width)) - (centre - self.size // 2)[:, None, None]
        is_cut = (y >= 0) & (y < self.size) & (x >= 0) & (x < self.size)
        return jnp.where(is_cut, 0, image)


class ColourJitter(AbstractAugmentation):
    r"""A random change in brightness, then in saturation, then in contrast,

    $$x \leftarrow x + b, \qquad x \leftarrow \bar x_c + s (x - \bar x_c), \qquad
    x \leftarrow \bar x + k (x - \bar x),$$

    with the mean $\bar x_c$ of the channels of each pixel and the mean $\bar x$ of the
    image. The numbers $b$, $s$ and $k$ have uniform distributions. The saturation of
    grey images does not change.

    **Arguments:**

    - `brightness`, `saturation`, `contrast`: the largest $|b|$, $|s - 1|$ and $|k -
        1|$, at least 0.

    Source: Zhao and Bilen (2021), whose strengths are the defaults.
    """

    brightness: float = eqx.field(default=0.5, converter=as_float, kw_only=True)
    saturation: float = eqx.field(default=1.0, converter=as_float, kw_only=True)
    contrast: float = eqx.field(default=0.5, converter=as_float, kw_only=True)

    def __check_init__(self):
        check_at_least(0, **vars(self))

    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        draws = jr.uniform(key, (3,), image.dtype, -1, 1)
        image = image + self.brightness * draws[0]
        if image.ndim > 2:
            mean = jnp.mean(image, axis=-3, keepdims=True)
            image = image + self.saturation * draws[1] * (image - mean)
        return image + self.contrast * draws[2] * (image - jnp.mean(image))
