import abc
import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray


class AbstractAugmentation(eqx.Module):
    """A random change of one image, differentiable in the image.

    [`eqdistill.augment`][] applies an augmentation to several images.
    """

    @abc.abstractmethod
    def __call__(
        self, image: Float[Array, "*channels height width"], *, key: PRNGKeyArray
    ) -> Float[Array, "*channels height width"]:
        """**Arguments:**

        - `image`: one image, shape `(height, width)` or `(channels, height, width)`,
            floating point.
        - `key`: a `jax.random.key` for the change. (Keyword only argument.)

        **Returns:**

        The changed image, of the same shape and dtype.
        """


class Compose(AbstractAugmentation):
    """Several augmentations, one after the other."""

    augmentations: tuple[AbstractAugmentation, ...]

    def __init__(self, *augmentations: AbstractAugmentation):
        """**Arguments:**

        - `augmentations`: the augmentations, in order.
        """
        self.augmentations = augmentations

    def __call__(
        self, image: Float[Array, "*channels height width"], *, key: PRNGKeyArray
    ) -> Float[Array, "*channels height width"]:
        """As [`eqdistill.AbstractAugmentation`][]."""
        keys = jr.split(key, len(self.augmentations))
        for augmentation, own_key in zip(self.augmentations, keys, strict=True):
            image = augmentation(image, key=own_key)
        return image


class OneOf(AbstractAugmentation):
    """One of several augmentations, drawn at random, all equally likely: for each
    image anew, or for all images of a batch.

    !!! Example

        The augmentation of DSA and FRePo, of images of 32 x 32 pixels:

        ```python
        augmentation = eqd.OneOf(
            eqd.ColourJitter(),
            eqd.Crop(4),
            eqd.Cutout(16),
            eqd.Flip(),
            eqd.Affine(scale=1.2),
            eqd.Affine(rotation=15),
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

        - `augmentations`: the augmentations, at least one.
        - `per_batch`: whether [`eqdistill.augment`][] draws one augmentation for all
            images, whose random numbers differ from image to image. Several times
            quicker. Inside of an augmentation of one's own there are no batches: the
            draw is for each image. (Keyword only argument.)

        **Raises:**

        A `ValueError` if there are none.
        """
        if not augmentations:
            raise ValueError("`augmentations` must be at least one; got none.")
        self.augmentations = augmentations
        self.per_batch = per_batch

    def __call__(
        self, image: Float[Array, "*channels height width"], *, key: PRNGKeyArray
    ) -> Float[Array, "*channels height width"]:
        """As [`eqdistill.AbstractAugmentation`][]."""
        # By default, `a` would be the last augmentation in each of them.
        branches = [lambda x, key, a=a: a(x, key=key) for a in self.augmentations]
        return _one_of(branches, image, key)


def _one_of(branches: list[Callable], images: Array, key: PRNGKeyArray) -> Array:
    choice_key, own_key = jr.split(key)
    index = jr.randint(choice_key, (), 0, len(branches))
    return jax.lax.switch(index, branches, images, own_key)


def augment(
    augmentation: AbstractAugmentation,
    images: Float[Array, "n *shape"],
    *,
    key: PRNGKeyArray,
    siamese: bool = False,
) -> Float[Array, "n *shape"]:
    r"""Several images, each of which is changed at random, $x_i' = A(x_i, k_i)$.

    **Arguments:**

    - `augmentation`: the augmentation $A$.
    - `images`: shape `(n, *shape)`, floating point.
    - `key`: a `jax.random.key`. (Keyword only argument.)
    - `siamese`: whether all images are changed in the same way, by one key
        $k_i = k$: then a second call with this key changes other images in the same
        way, too. (Keyword only argument.)

    **Returns:**

    The changed images.

    **Raises:**

    A `ValueError` if the augmentation changes the shape or the dtype of an image.

    Source: Zhao and Bilen, *Dataset Condensation with Differentiable Siamese
    Augmentation*, 2021.
    """
    if siamese:
        changed = jax.vmap(lambda image: augmentation(image, key=key))(images)
    else:
        changed = _each(augmentation, images, key)
    if not eqx.is_array(changed) or changed.shape != images.shape:
        got = jax.tree.map(lambda x: x.shape[1:], changed)
        raise ValueError(
            "`augmentation` must keep the shape of an image, which is "
            f"{images.shape[1:]}; that of a {type(augmentation).__name__} is {got}."
        )
    if changed.dtype != images.dtype:
        raise ValueError(
            f"`augmentation` must keep the dtype of an image, which is {images.dtype}; "
            f"that of a {type(augmentation).__name__} is {changed.dtype}."
        )
    return changed


def _each(augmentation: AbstractAugmentation, images: Array, key: PRNGKeyArray):
    """The images, each of which is changed by random numbers of its own."""
    if isinstance(augmentation, Compose):
        keys = jr.split(key, len(augmentation.augmentations))
        for part, own_key in zip(augmentation.augmentations, keys, strict=True):
            images = _each(part, images, own_key)
        return images
    if isinstance(augmentation, OneOf) and augmentation.per_batch:
        branches = [ft.partial(_each, a) for a in augmentation.augmentations]
        return _one_of(branches, images, key)
    apply = lambda image, key: augmentation(image, key=key)
    return jax.vmap(apply)(images, jr.split(key, len(images)))
