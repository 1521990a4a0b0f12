from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from .._checks import check_at_least
from .._conversions import ArrayOrList, as_array, as_int


class Dataset(eqx.Module):
    r"""Labelled real images: the data that a distilled set is measured against.

    **Attributes:**

    - `images`: shape `(N, *shape)`. Either `uint8` in 0 to 255, as on disk, or
        floating point in whatever units the classifier expects.
    - `labels`: class indices in `[0, num_classes)`, shape `(N,)`.
    - `num_classes`: the number of classes $c$.
    - `class_names`: the name of each class, or `None` if the classes have no names.
    """

    images: Float[Array, "N *shape"] | UInt8[Array, "N *shape"]
    labels: Int[Array, " N"]
    num_classes: int = eqx.field(static=True, converter=as_int)
    class_names: tuple[str, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        images: ArrayOrList,
        labels: ArrayOrList,
        num_classes: int | None = None,
        *,
        class_names: list[str] | tuple[str, ...] | None = None,
    ):
        r"""**Arguments:**

        - `images`: real images, shape `(N, *shape)`, `uint8` or floating point. An
            array, or a list.
        - `labels`: class indices, shape `(N,)`, any integer type.
        - `num_classes`: the number of classes. Defaults to the number of names, or
            without names to the largest label plus one: then each class must have an
            image.
        - `class_names`: one name for each class, or `None`. (Keyword only argument.)

        **Raises:**

        A `ValueError` or `TypeError` if there are no images, if there is not one label
        for each image, if the labels are not integers in `[0, num_classes)`, if a class
        has no image and `num_classes` does not say that it is one, if there is not one
        name for each class, or if any image is not finite in the precision that JAX
        gives it.
        """
        # Checked on the host: a dataset is made once, from concrete arrays.
        images_ = np.asarray(as_array("images", images))
        labels_ = np.asarray(as_array("labels", labels))
        is_bytes = images_.dtype == np.uint8
        if not (is_bytes or jnp.issubdtype(images_.dtype, jnp.floating)):
            raise TypeError(
                f"`images` must be uint8 or floating point; got dtype {images_.dtype}."
            )
        if images_.ndim < 2 or images_.size == 0:
            raise ValueError(
                "`images` must have shape (N, *shape) and hold at least one pixel; got "
                f"shape {images_.shape}."
            )
        if not np.issubdtype(labels_.dtype, np.integer):
            raise TypeError(
                f"`labels` must be integer class indices; got dtype {labels_.dtype}."
            )
        if labels_.shape != images_.shape[:1]:
            raise ValueError(
                "`labels` must have one entry for each image; got labels of shape "
                f"{labels_.shape} for images of shape {images_.shape}."
            )
        given = "`num_classes`" if num_classes is not None else "`class_names`"
        if num_classes is None:
            num_classes = len(class_names) if class_names else _count(labels_)
        if class_names is not None and not (
            len(class_names) == len(set(class_names)) == num_classes
        ):
            raise ValueError(
                f"`class_names` must have one name for each of the {num_classes} "
                f"classes, all different; got {len(class_names)}."
            )
        check_at_least(1, num_classes=num_classes)
        if num_classes > np.iinfo(np.int32).max:
            raise ValueError(
                f"`num_classes` must be a number of 31 bits; got {num_classes}."
            )
        if labels_.min() < 0 or labels_.max() >= num_classes:
            raise ValueError(
                f"`labels` must be in [0, {num_classes}), as {given} says; got values "
                f"from {labels_.min()} to {labels_.max()}."
            )
        if not is_bytes:
            with np.errstate(over="ignore"):  # What is too large becomes infinite.
                images_ = images_.astype(jax.dtypes.canonicalize_dtype(images_.dtype))
        if not is_bytes and not np.isfinite(images_).all():
            raise ValueError(
                f"`images` must be finite; {(~np.isfinite(images_)).sum()} of "
                f"{images_.size} pixels are NaN or infinite."
            )
        self.images = jnp.asarray(images_)
        self.labels = jnp.asarray(labels_.astype(np.int32))
        self.num_classes = num_classes
        self.class_names = None if class_names is None else tuple(class_names)

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.images.shape[1:]

    def split(
        self, fraction: float, *, key: PRNGKeyArray
    ) -> tuple["Dataset", "Dataset"]:
        """Holds out a random part of the images, for early stopping and other choices.

        **Arguments:**

        - `fraction`: the fraction of the images to hold out, between 0 and 1.
        - `key`: a `jax.random.key` for their choice. (Keyword only argument.)

        **Returns:**

        The images that are kept, and those held out, in random order.

        **Raises:**

        A `ValueError` if either part would be empty.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"`fraction` must be between 0 and 1; got {fraction}.")
        num_held_out = round(fraction * len(self))
        if not 0 < num_held_out < len(self):
            raise ValueError(
                f"`fraction` must leave at least one of {len(self)} images on either "
                f"side; got {fraction}."
            )
        order = jr.permutation(key, len(self))
        kept, held_out = (
            Dataset(
                self.images[part],
                self.labels[part],
                self.num_classes,
                class_names=self.class_names,
            )
            for part in (order[num_held_out:], order[:num_held_out])
        )
        return kept, held_out

    def map(self, fn: Callable) -> "Dataset":
        """The dataset whose images are $f(x_i)$, for the images $x_i$ of this one.

        **Arguments:**

        - `fn`: a function $f$ from one image, in floating point as
            [`Dataset.floating`][] gives it, to another image of any shape; such as an
            [`eqdistill.AbstractPreprocessing`][].

        **Returns:**

        A `Dataset` with floating-point images, and the same labels.

        **Raises:**

        A `TypeError` or `ValueError` if the images that `fn` gives cannot be those of a
        dataset.
        """
        # Chunk by chunk, not in one program: XLA's convolutions are slow in a loop.
        images = [
            np.asarray(_map_chunk(fn, self.images[i : i + 1000]))
            for i in range(0, len(self), 1000)
        ]
        return Dataset(
            np.concatenate(images),
            self.labels,
            self.num_classes,
            class_names=self.class_names,
        )

    def floating(self) -> Float[Array, "N *shape"]:
        """The images in floating point: `uint8` is scaled to the range 0 to 1."""
        return self.to_floating(self.images)

    @staticmethod
    def to_floating(
        images: Float[Array, "N *shape"] | UInt8[Array, "N *shape"],
    ) -> Float[Array, "N *shape"]:
        """Some images of a dataset in floating point, as [`Dataset.floating`][] gives
        all of them."""
        if images.dtype == jnp.uint8:
            return images.astype(jnp.result_type(float)) / 255
        return images


@eqx.filter_jit
def _map_chunk(fn: Callable, images: Array) -> Array:
    return jax.vmap(fn)(Dataset.to_floating(images))


def _count(labels: np.ndarray) -> int:
    """The number of classes.

    **Raises:**

    A `ValueError` if the labels are not from 0, or leave one out.
    """
    found = np.unique(labels)
    if found[0] != 0 or found[-1] != len(found) - 1:
        raise ValueError(
            "`labels` must be from 0 to the number of classes less one, each of them "
            "at least once, unless `num_classes` is given; got "
            f"{len(found)} different labels from {found[0]} to {found[-1]}."
        )
    return len(found)
