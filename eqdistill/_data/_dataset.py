import os
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from .._checks import check_between, check_concrete, check_positive
from .._chunks import CHUNK_BYTES, chunk_size
from .._conversions import ArrayOrList, as_array, as_int, as_weights, Labels
from .._sharding import num_shards, place, sharding_of, to_host
from .._typechecking import describe
from ._class_names import check_class_names, describe_class
from ._stored import load_or_compute


class Dataset(eqx.Module):
    r"""Labelled real images, or other arrays such as the rows of a table, from which a
    set is distilled, or on which it is evaluated.

    **Attributes:** the same as the arguments below.
    """

    images: Float[Array, "N *shape"] | UInt8[Array, "N *shape"]
    labels: Labels
    weights: Float[Array, " N"] | None
    num_classes: int = eqx.field(static=True, converter=as_int)
    class_names: tuple[str, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        images: ArrayOrList,
        labels: ArrayOrList,
        num_classes: int | None = None,
        *,
        class_names: list[str] | tuple[str, ...] | None = None,
        weights: ArrayOrList | None = None,
    ):
        r"""**Arguments:**

        - `images`: an array or a list of shape `(N, *shape)`. Either `uint8` from 0
            to 255, as on disk, or floating point in any units, finite in JAX's
            precision. An array whose first axis is spread over devices stays there.
        - `labels`: class indices in `[0, num_classes)`, an array or a list of any
            integer type, of shape `(N,)`. Or targets of shape `(N, c)`, finite numbers
            of any type: what a regression predicts, 0 or 1 for each class that an image
            may have, or soft labels. The loss determines their meaning.
        - `num_classes`: the number of classes, or of columns of the targets, $c$.
            Defaults to the number of columns, or of `class_names`. Without either, it
            is the largest label plus one, and each class must have an image.
        - `class_names`: the name of each class or column, all different, or `None` if
            they have no names.
        - `weights`: how much each example counts in means such as the outer loss and
            the accuracy, positive numbers of shape `(N,)`. They are divided by their
            mean. By default, all count equally. The choice of initial images and of
            batches ignores them.
        """
        check_concrete("Dataset", images=images, labels=labels, weights=weights)
        # Work on the host, because a dataset is made once, from concrete arrays.
        images_ = as_array("images", images)
        labels_ = to_host(as_array("labels", labels))
        sharding = sharding_of(images_)
        images_ = to_host(images_) if sharding is None else place(images_, sharding)
        is_bytes = images_.dtype == np.uint8
        is_image = is_bytes or jnp.issubdtype(images_.dtype, jnp.floating)
        if not is_image or images_.ndim < 2 or images_.size == 0:
            raise ValueError(
                "`images` must be uint8 or floating point (divide uint16 by 65535), of "
                f"shape (N, *shape), with at least one pixel; got {describe(images_)}."
            )
        is_target = labels_.ndim == 2 and labels_.size > 0
        is_index = labels_.ndim == 1 and np.issubdtype(labels_.dtype, np.integer)
        if not (is_target or is_index) or len(labels_) != len(images_):
            raise ValueError(
                "`labels` must be integer class indices of shape (N,), or targets of "
                f"shape (N, c), for each of the {len(images_)} images; got "
                f"{describe(labels_)}."
            )
        if is_target and num_classes not in (None, labels_.shape[1]):
            raise ValueError(
                f"`num_classes` must be the number of columns of the targets, "
                f"{labels_.shape[1]}; got {num_classes}."
            )
        if is_target:
            num_classes = int(labels_.shape[1])
        elif num_classes is None:
            num_classes = len(class_names) if class_names else _count(labels_)
        names = check_class_names(class_names, num_classes)
        check_between(1, 2**31 - 1, num_classes=num_classes)
        if is_index and not 0 <= labels_.min() <= labels_.max() < num_classes:
            raise ValueError(
                f"`labels` must be in [0, {num_classes}), as set by `num_classes` or "
                f"`class_names`; got {labels_.min()} to {labels_.max()}."
            )
        if not is_bytes:
            with np.errstate(over="ignore"):
                images_ = images_.astype(jax.dtypes.canonicalize_dtype(images_.dtype))
            is_finite = np.isfinite if sharding is None else jnp.isfinite
            if bad := int((~is_finite(images_)).sum()):
                raise ValueError(
                    f"`images` must be finite; {bad} of {images_.size} pixels are NaN "
                    "or infinite."
                )
        labels_ = labels_.astype(jnp.result_type(float if is_target else np.int32))
        if not np.isfinite(labels_).all():
            bad = int((~np.isfinite(labels_)).sum())
            raise ValueError(
                f"`labels` must be finite; {bad} of {labels_.size} targets are NaN or "
                "infinite."
            )
        self.images = place(images_, sharding)
        self.labels = place(labels_, sharding)
        self.weights = None
        if weights is not None:
            relative = as_weights(weights, len(images_))
            self.weights = place(relative.astype(jnp.result_type(float)), sharding)
        self.num_classes = num_classes
        self.class_names = names

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.images.shape[1:]

    @property
    def has_targets(self) -> bool:
        """Whether the labels are targets rather than class indices."""
        return self.labels.ndim == 2

    @property
    def class_counts(self) -> Int[np.ndarray, " c"]:
        """The number of images of each class. Raises a `ValueError` for targets."""
        if self.has_targets:
            raise ValueError(
                "`dataset` must have class indices as labels; it has targets of shape "
                f"{self.labels.shape}."
            )
        return np.bincount(to_host(self.labels), minlength=self.num_classes)

    def class_name(self, index: int) -> str:
        """A class in words, such as `class 3 ('dog')`."""
        return describe_class(index, self.class_names)

    @property
    def sharding(self) -> NamedSharding | None:
        """How the images are spread over devices, or `None` if they are not."""
        return sharding_of(self.images)

    def split(
        self, fraction: float, *, key: PRNGKeyArray
    ) -> tuple["Dataset", "Dataset"]:
        """Holds out a random `fraction` of the images, for early stopping and other
        choices. Returns the remaining images and the held-out images, both in random
        order. Neither part may be empty. Each device gets the same number of images of
        each part, if the images are spread over devices."""
        shards = num_shards(self.sharding)
        parts = len(self) // shards
        num_held_out = shards * round(fraction * parts) if 0 < fraction < 1 else 0
        if not 0 < num_held_out < len(self):
            raise ValueError(
                "`fraction` must be between 0 and 1, and give each part at least one "
                f"of the {len(self)} images; got {fraction}."
            )
        order = jr.permutation(key, len(self))
        where = self.sharding
        read = jax.jit(lambda x, rows: x[rows], out_shardings=where)
        arrays = self.images, self.labels, self.weights
        take = lambda rows: self._with(*jax.tree.map(lambda x: read(x, rows), arrays))
        return take(order[num_held_out:]), take(order[:num_held_out])

    def map(
        self,
        fn: Callable,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        directory: str | os.PathLike | None = None,
    ) -> "Dataset":
        """Returns a dataset of the images $f(x_i)$ with the same labels. The function
        $f$ maps one image, in the units of [`eqdistill.Dataset.floating`][], to a
        floating-point image of any shape. It may be an
        [`eqdistill.datasets.AbstractPreprocessing`][]. The activations of $f$ take
        about `chunk_bytes` bytes at a time. With a `directory`, the new images are kept
        there, as with [`eqdistill.Cached`][]."""
        check_positive(chunk_bytes=chunk_bytes)
        images = map_images(fn, self.images, self.sharding, chunk_bytes, directory)
        return self._with(images, self.labels, self.weights)

    def _with(self, images, labels, weights) -> "Dataset":
        names, c = self.class_names, self.num_classes
        return Dataset(images, labels, c, class_names=names, weights=weights)

    def floating(self) -> Float[Array, "N *shape"]:
        """The images in floating point: `uint8` is scaled to the range 0 to 1."""
        return self.to_floating(self.images)

    @staticmethod
    def to_floating(
        images: Float[Array, "N *shape"] | UInt8[Array, "N *shape"],
    ) -> Float[Array, "N *shape"]:
        """Converts some images of a dataset, like [`eqdistill.Dataset.floating`][]."""
        if images.dtype == jnp.uint8:
            return images.astype(jnp.result_type(float)) / 255
        return images


def map_images(
    fn: Callable,
    images: Array,
    sharding: NamedSharding | None,
    chunk_bytes: int,
    directory: str | os.PathLike | None = None,
) -> Array:
    """Applies a function to each image. Each device maps its own images, in chunks."""
    if directory is not None:
        example = Dataset.to_floating(images[:1])[0]
        compute = lambda: to_host(map_images(fn, images, sharding, chunk_bytes))
        found = load_or_compute(directory, fn, example, to_host(images), compute)
        return place(found, sharding)
    if sharding is not None:
        return _map_on_devices(fn, images, sharding, chunk_bytes)
    size = _chunk_size(fn, images, chunk_bytes)
    # Loop in Python, because XLA's convolutions are slow inside a compiled loop.
    chunks = (images[i : i + size] for i in range(0, len(images), size))
    return jnp.asarray(np.concatenate([np.asarray(_map(fn, x)) for x in chunks]))


@eqx.filter_jit
def _map(fn: Callable, images: Array) -> Array:
    return jax.vmap(lambda image: fn(Dataset.to_floating(image)))(images)


def _chunk_size(fn: Callable, images: Array, chunk_bytes: int) -> int:
    return chunk_size(lambda chunk: _map(fn, chunk), images, chunk_bytes)


@eqx.filter_jit
def _map_on_devices(fn, images, sharding, chunk_bytes):
    arrays, static = eqx.partition(fn, eqx.is_array)
    rows = P(sharding.spec[0])

    def of_device(arrays, images):
        fn = eqx.combine(arrays, static)
        size = _chunk_size(fn, images, chunk_bytes)
        of_image = lambda image: fn(Dataset.to_floating(image))
        return jax.lax.map(of_image, images, batch_size=size)

    specs = {"in_specs": (P(), rows), "out_specs": rows, "check_vma": False}
    return jax.shard_map(of_device, mesh=sharding.mesh, **specs)(arrays, images)


def _count(labels: np.ndarray) -> int:
    """The number of classes, each of which must have an image."""
    found = np.unique(labels)
    if found[0] != 0 or found[-1] != len(found) - 1:
        raise ValueError(
            "`labels` must have every class from 0 to the largest; got "
            f"{len(found)} different labels from {found[0]} to {found[-1]}. Pass "
            "`num_classes` if some classes have no image."
        )
    return len(found)
