import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

from .._data._augmentation import AbstractAugmentation, augment
from .._data._dataset import Dataset
from ._data import AbstractData
from ._mean_loss import mean_loss
from ._rows import Rows


class Batches(AbstractData):
    """Some of the real images in each outer step: drawn at random, without replacement,
    until there are fewer left than a batch; then all over again in another order.

    The order is a function of the key and the epoch.
    """

    dataset: Dataset
    size: int = eqx.field(static=True)
    augmentation: AbstractAugmentation | None
    shape: tuple[int, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        *,
        augmentation: AbstractAugmentation | None = None,
    ):
        """**Arguments:**

        - `dataset`: the real images.
        - `size`: the number of images in a batch.
        - `augmentation`: changes each image at random, in each step anew. (Keyword only
            argument.)

        **Raises:**

        A `ValueError` if `size` is not from 1 to the number of images.
        """
        if not 1 <= size <= len(dataset):
            raise ValueError(
                f"`size` must be from 1 to {len(dataset)}, the number of images in "
                f"`dataset`; got {size}."
            )
        self.dataset = dataset
        self.size = size
        self.augmentation = augmentation
        self.shape = dataset.shape
        self.num_classes = dataset.num_classes

    def loss(self, classifier, step, *, key):
        """As [`eqdistill.AbstractData`][].

        **Raises:**

        A `ValueError` if `key` is `None`, or if the augmentation changes the shape of
        an image.
        """
        key = _given(self, key)
        num_images = len(self.dataset)
        epoch, batch = jnp.divmod(step, num_images // self.size)
        place = batch * self.size + jnp.arange(self.size)
        key_of_epoch = jr.fold_in(key, epoch)
        chosen = _permute(place, num_images, _half_bits(num_images), key_of_epoch)
        return _loss_of(self, classifier, chosen, step, key)


class BalancedBatches(AbstractData):
    """As many real images of each class in each outer step: drawn at random, without
    replacement, until there are fewer left of the class than a batch takes; then all
    over again in another order, for this class alone.

    The order of a class is a function of the key, the class and its epoch.
    """

    dataset: Dataset
    by_class: Int[Array, " N"]
    counts: tuple[int, ...] = eqx.field(static=True)
    per_class: int = eqx.field(static=True)
    augmentation: AbstractAugmentation | None
    shape: tuple[int, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)

    def __init__(
        self,
        dataset: Dataset,
        per_class: int,
        *,
        augmentation: AbstractAugmentation | None = None,
    ):
        """**Arguments:**

        - `dataset`: the real images.
        - `per_class`: the number of images of each class in a batch.
        - `augmentation`: as for [`eqdistill.Batches`][]. (Keyword only argument.)

        **Raises:**

        A `ValueError` if `per_class` is not from 1 to the number of images of the
        smallest class.
        """
        labels = np.asarray(dataset.labels)
        counts = np.bincount(labels, minlength=dataset.num_classes)
        if not 1 <= per_class <= counts.min():
            raise ValueError(
                f"`per_class` must be from 1 to {counts.min()}, the number of images "
                f"of class {counts.argmin()} in `dataset`; got {per_class}."
            )
        self.dataset = dataset
        self.by_class = jnp.asarray(np.argsort(labels, kind="stable"))
        self.counts = tuple(counts.tolist())
        self.per_class = per_class
        self.augmentation = augmentation
        self.shape = dataset.shape
        self.num_classes = dataset.num_classes

    def loss(self, classifier, step, *, key):
        """As [`eqdistill.AbstractData`][].

        **Raises:**

        A `ValueError` as [`eqdistill.Batches`][].
        """
        key = _given(self, key)
        counts = jnp.array(self.counts)
        half_bits = jnp.array([_half_bits(count) for count in self.counts])
        first = jnp.cumsum(counts) - counts

        def of_class(class_, count, half_bits, first):
            epoch, batch = jnp.divmod(step, count // self.per_class)
            place = batch * self.per_class + jnp.arange(self.per_class)
            key_of_epoch = jr.fold_in(jr.fold_in(key, class_), epoch)
            return self.by_class[
                first + _permute(place, count, half_bits, key_of_epoch)
            ]

        classes = jnp.arange(self.num_classes)
        chosen = jax.vmap(of_class)(classes, counts, half_bits, first).ravel()
        return _loss_of(self, classifier, chosen, step, key)


def _given(data: Batches | BalancedBatches, key: PRNGKeyArray | None) -> PRNGKeyArray:
    if key is None:
        raise ValueError(
            f"`key` must be given with `{type(data).__name__}`, which draw at random; "
            "got None."
        )
    return key


def _loss_of(
    data: Batches | BalancedBatches,
    classifier: PyTree,
    chosen: Int[Array, " size"],
    step: Int[Array, ""],
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """The mean cross-entropy on the chosen images."""
    images = data.dataset.images[chosen]
    if data.augmentation is not None:
        # No epoch and no class has this number.
        key = jr.fold_in(jr.fold_in(key, np.uint32(2**32 - 1)), step)
        images = augment(data.augmentation, Dataset.to_floating(images), key=key)
    return mean_loss(classifier, Rows(images, data.dataset.labels[chosen]))


def _half_bits(num_images: int) -> int:
    """Half of the number of bits, rounded up, of the number of any image."""
    return max(1, -(-(num_images - 1).bit_length() // 2))


def _permute(
    place: Int[Array, " size"],
    num_images: int | Int[Array, ""],
    half_bits: int | Int[Array, ""],
    key: PRNGKeyArray,
) -> Int[Array, " size"]:
    """Where a random permutation of all images takes some places.

    A Feistel network permutes the numbers of an even number of bits. Numbers that are
    no image are permuted again, until all are: at most four times as many numbers as
    images make that quick. `jax.random.permutation` would sort all of the images in
    each step, which takes 47 ms for 60,000.

    Source: Black and Rogaway, *Ciphers with arbitrary finite domains*, 2002.
    """
    half = jnp.asarray(half_bits, jnp.uint32)
    mask = (np.uint32(1) << half) - 1
    round_keys = jr.bits(key, (8,), jnp.uint32)

    def once(x: UInt32[Array, " size"]) -> UInt32[Array, " size"]:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            # The finaliser of MurmurHash3 mixes the bits.
            mixed = (right ^ round_key) * np.uint32(0x85EBCA6B)
            mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
            left, right = right, left ^ ((mixed ^ (mixed >> 16)) & mask)
        return (left << half) | right

    is_no_image = lambda x: x >= num_images
    found = jax.lax.while_loop(
        lambda x: jnp.any(is_no_image(x)),
        lambda x: jnp.where(is_no_image(x), once(x), x),
        once(place.astype(jnp.uint32)),
    )
    return found.astype(place.dtype)
