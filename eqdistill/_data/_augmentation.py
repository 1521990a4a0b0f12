import abc
import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import array_difference


Image = Float[Array, "*channels height width"]


class AbstractAugmentation(eqx.Module):
    """A random change of one image, differentiable in the image.
    [`eqdistill.augment.augment`][] applies an augmentation to a batch."""

    @abc.abstractmethod
    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        """Returns the changed image, in the same shape and dtype. Images are in
        floating point, of shape `(height, width)` or `(channels, height, width)`."""


class Compose(AbstractAugmentation):
    """Several augmentations, applied one after another."""

    augmentations: tuple[AbstractAugmentation, ...]

    def __init__(self, *augmentations: AbstractAugmentation):
        """**Arguments:** the augmentations, in order."""
        self.augmentations = augmentations

    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        return _apply(self, False, image, key)


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
            for all images. Its random numbers still differ between images. This is
            several times faster. A custom augmentation that calls a `OneOf` sees single
            images, so the draw is then for each image.
        """
        if not augmentations:
            raise ValueError("`augmentations` must have at least one; got none.")
        self.augmentations = augmentations
        self.per_batch = per_batch

    def __call__(self, image: Image, *, key: PRNGKeyArray) -> Image:
        return _apply(self, False, image, key)


def augment(
    augmentation: AbstractAugmentation,
    images: Float[Array, "n *shape"],
    *,
    key: PRNGKeyArray,
) -> Float[Array, "n *shape"]:
    r"""Augments each image of a batch with its own random key, $x_i' = A(x_i, k_i)$.
    The $k_i$ are split from `key`."""
    changed = _apply(augmentation, True, images, key)
    if difference := array_difference(images, changed):
        raise ValueError(
            "`augmentation` must keep the shape and the dtype of images; "
            f"`{type(augmentation).__name__}` did not: {difference}."
        )
    return changed


def _apply(
    augmentation: AbstractAugmentation, is_batch: bool, x: Array, key: PRNGKeyArray
) -> Any:
    """Applies an augmentation to a batch, or to one image."""
    if isinstance(augmentation, Compose):
        keys = jr.split(key, len(augmentation.augmentations))
        for part, own_key in zip(augmentation.augmentations, keys, strict=True):
            x = _apply(part, is_batch, x, own_key)
        return x
    if isinstance(augmentation, OneOf) and (augmentation.per_batch or not is_batch):
        branches = [ft.partial(_apply, a, is_batch) for a in augmentation.augmentations]
        choice_key, own_key = jr.split(key)
        index = jr.randint(choice_key, (), 0, len(branches))
        return jax.lax.switch(index, branches, x, own_key)
    if is_batch:
        of_image = ft.partial(_apply, augmentation, False)
        return jax.vmap(of_image)(x, jr.split(key, len(x)))
    return augmentation(x, key=key)
