import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._classifier import Frozen, LinearClassifier, takes_pixels
from .._conversions import as_int
from .._data._augmentation import AbstractAugmentation, augment
from .._data._dataset import Dataset
from .._data._permutation import batch_at, half_bits
from ._data import AbstractFeatureData, check_features, check_seen, features_of
from ._mean_loss import mean_loss
from ._rows import Rows


class Batches(AbstractFeatureData):
    """Some of the real images in each outer step: drawn at random, without replacement,
    until there are fewer left than a batch; then all over again in another order.

    The order is a function of the key and the epoch.

    For an [`eqdistill.LinearClassifier`][] the features of the images are computed
    once, here, as in a [`eqdistill.FullBatch`][]: a step then takes no pass of real
    images through a frozen network.
    """

    dataset: Dataset
    features: Frozen | None
    size: int = eqx.field(static=True, converter=as_int)
    augmentation: AbstractAugmentation | None
    shape: tuple[int, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        model: PyTree = None,
        *,
        augmentation: AbstractAugmentation | None = None,
    ):
        """**Arguments:**

        - `dataset`: the real images.
        - `size`: the number of images in a batch.
        - `model`: as for [`eqdistill.FullBatch`][].
        - `augmentation`: changes each image at random, in each step anew. (Keyword only
            argument.)

        **Raises:**

        A `ValueError` if `size` is not from 1 to the number of images, if features are
        not finite, or if images whose features are computed once are to be changed.
        """
        if not 1 <= size <= len(dataset):
            raise ValueError(
                f"`size` must be from 1 to {len(dataset)}, the number of images in "
                f"`dataset`; got {size}."
            )
        self.dataset, self.features = _seen(dataset, model, augmentation)
        self.size = size
        self.augmentation = augmentation
        self.shape = dataset.shape
        self.num_classes = dataset.num_classes

    def loss(self, model, step, *, key):
        """As [`eqdistill.AbstractData`][].

        **Raises:**

        A `ValueError` if `key` is `None`, if the augmentation changes the shape of an
        image, or as [`eqdistill.FullBatch`][].
        """
        key = _given(self, key)
        num_images = len(self.dataset)
        chosen = batch_at(step, self.size, num_images, half_bits(num_images), key=key)
        return _loss_of(self, model, chosen, step, key)


class BalancedBatches(AbstractFeatureData):
    """As many real images of each class in each outer step: drawn at random, without
    replacement, until there are fewer left of the class than a batch takes; then all
    over again in another order, for this class alone.

    The order of a class is a function of the key, the class and its epoch. Features
    are as in [`eqdistill.Batches`][].
    """

    dataset: Dataset
    features: Frozen | None
    by_class: Int[Array, " N"]
    counts: tuple[int, ...] = eqx.field(static=True)
    per_class: int = eqx.field(static=True, converter=as_int)
    augmentation: AbstractAugmentation | None
    shape: tuple[int, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)

    def __init__(
        self,
        dataset: Dataset,
        per_class: int,
        model: PyTree = None,
        *,
        augmentation: AbstractAugmentation | None = None,
    ):
        """**Arguments:**

        - `dataset`: the real images.
        - `per_class`: the number of images of each class in a batch.
        - `model`: as for [`eqdistill.FullBatch`][].
        - `augmentation`: as for [`eqdistill.Batches`][]. (Keyword only argument.)

        **Raises:**

        A `ValueError` if `per_class` is not from 1 to the number of images of the
        smallest class; and as [`eqdistill.Batches`][].
        """
        labels = np.asarray(dataset.labels)
        counts = np.bincount(labels, minlength=dataset.num_classes)
        if not 1 <= per_class <= counts.min():
            raise ValueError(
                f"`per_class` must be from 1 to {counts.min()}, the number of images "
                f"of class {counts.argmin()} in `dataset`; got {per_class}."
            )
        self.dataset, self.features = _seen(dataset, model, augmentation)
        self.by_class = jnp.asarray(np.argsort(labels, kind="stable"))
        self.counts = tuple(counts.tolist())
        self.per_class = per_class
        self.augmentation = augmentation
        self.shape = dataset.shape
        self.num_classes = dataset.num_classes

    def loss(self, model, step, *, key):
        """As [`eqdistill.AbstractData`][].

        **Raises:**

        A `ValueError` as [`eqdistill.Batches`][].
        """
        key = _given(self, key)
        counts = jnp.array(self.counts)
        halves = jnp.array([half_bits(count) for count in self.counts])
        first = jnp.cumsum(counts) - counts

        def of_class(class_, count, half, first):
            own_key = jr.fold_in(key, class_)
            place = batch_at(step, self.per_class, count, half, key=own_key)
            return self.by_class[first + place]

        classes = jnp.arange(self.num_classes)
        chosen = jax.vmap(of_class)(classes, counts, halves, first).ravel()
        return _loss_of(self, model, chosen, step, key)


def _seen(
    dataset: Dataset, model: PyTree, augmentation: AbstractAugmentation | None
) -> tuple[Dataset, Frozen | None]:
    """The real images, or their features and what these were computed by."""
    check_seen(dataset, model)
    if not isinstance(model, LinearClassifier) or takes_pixels(model):
        return dataset, None
    if augmentation is not None:
        raise ValueError(
            "`augmentation` must be None for a linear model on features, which "
            f"are computed once; got a {type(augmentation).__name__}. Leave out "
            "`model`: then the features are computed in each step."
        )
    return features_of(dataset, model), model.features


def _given(data: Batches | BalancedBatches, key: PRNGKeyArray | None) -> PRNGKeyArray:
    if key is None:
        raise ValueError(
            f"`key` must be given with `{type(data).__name__}`, which draw at random; "
            "got None."
        )
    return key


def _loss_of(
    data: Batches | BalancedBatches,
    model: PyTree,
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
    return mean_loss(
        check_features(data, model), Rows(images, data.dataset.labels[chosen])
    )
