import functools as ft
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._chunks import CHUNK_BYTES
from .._conversions import as_int
from .._data._augmentation import AbstractAugmentation, augment_part
from .._data._dataset import Dataset
from .._data._permutation import batch_at
from .._sharding import place, replicate, to_host
from ._data import AbstractData, Cached, FullBatch, mean_of_some


class Batches(AbstractData):
    """Some of the real examples in each outer step: drawn at random, without
    replacement, until fewer are left than a batch needs. Then a new epoch starts, in
    a new order.

    The order is a function of the key and the epoch. If batches are balanced, each
    class has its own epochs.
    """

    data: FullBatch
    size: int = eqx.field(static=True, converter=as_int)
    augmentation: AbstractAugmentation | None
    by_class: Int[Array, " N"] | None
    counts: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        *,
        balanced: bool = False,
        augmentation: AbstractAugmentation | None = None,
        cached: Sequence[Cached] = (),
        chunk_bytes: int = CHUNK_BYTES,
        sharding: NamedSharding | None = None,
    ):
        """**Arguments:**

        - `dataset`: the real data.
        - `size`: the number of examples in a batch.

        All other arguments are keyword only.

        - `balanced`: whether a batch has the same number of examples of each class. The
            examples of smaller classes are used more often. Weights are then relative
            to the mean weight of the class.
        - `augmentation`: changes each image at random, differently in each step.
        - `cached`, `chunk_bytes`, `sharding`: as for [`eqdistill.FullBatch`][]. Every
            device works on its own part of a batch, and the batches are the same for
            any number of devices.

        **Raises:**

        A `ValueError` if `size` is not from 1 to the number of examples; if a balanced
        batch cannot have the same number of examples of each class; if images with
        cached outputs are to be augmented; and as for [`eqdistill.FullBatch`][].
        """
        if not 1 <= size <= len(dataset):
            raise ValueError(
                f"`size` must be from 1 to {len(dataset)}, the number of examples in "
                f"`dataset`; got {size}."
            )
        if augmentation is not None and cached:
            raise ValueError(
                "`augmentation` must be None with `cached` outputs, which are computed "
                f"once; got a {type(augmentation).__name__}."
            )
        if balanced and dataset.weights is not None:
            weights = _balance(dataset, to_host(dataset.weights))
            dataset = eqx.tree_at(lambda d: d.weights, dataset, weights)
        self.data = FullBatch(
            dataset, cached=cached, chunk_bytes=chunk_bytes, sharding=sharding
        )
        self.size = size
        self.augmentation = augmentation
        self.by_class, self.counts = None, ()
        if balanced:
            share, rest = divmod(size, dataset.num_classes)
            counts = dataset.class_counts
            if rest or not counts.min():
                raise ValueError(
                    "For balanced batches, `size` must be a multiple of "
                    f"{dataset.num_classes}, the number of classes, and each class "
                    f"needs an example; got {size}, and {counts.min()} examples of "
                    f"{dataset.class_name(int(counts.argmin()))}."
                )
            labels = to_host(dataset.labels)
            copies = -(-share // np.minimum(share, counts))
            order = np.argsort(labels, kind="stable")
            by_class = jnp.asarray(np.repeat(order, copies[labels[order]]))
            self.by_class = replicate(by_class, self.data.sharding)
            self.counts = tuple((copies * counts).tolist())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.data.shape

    @property
    def num_classes(self) -> int:
        return self.data.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.data.class_names

    @property
    def sharding(self) -> NamedSharding | None:
        return self.data.sharding

    def mean(self, fn, model, step, *, key):
        """**Raises:** a `ValueError` if the augmentation changes the images' shape."""
        draws = _Draws(self.by_class, self.augmentation, step, key)
        take = ft.partial(_take, self.size, self.data.num, self.counts)
        return mean_of_some(self.data, fn, model, self.size, draws, take)

    def rows(self, step: Int[Array, ""], *, key: PRNGKeyArray) -> tuple:
        """The images of a step, their labels and their weights, on one device."""
        draws = _Draws(self.by_class, self.augmentation, step, key)
        rows = self.data.images, self.data.labels, self.data.weights
        return _take(self.size, self.data.num, self.counts, rows, draws, None, None)


def _balance(dataset: Dataset, weights: np.ndarray) -> Array:
    """The weights, divided by the mean over their class."""
    counts, labels = dataset.class_counts, to_host(dataset.labels)
    total = np.bincount(labels, weights=weights, minlength=dataset.num_classes)
    mean = total / np.maximum(counts, 1)
    return place((weights / mean[labels]).astype(weights.dtype), dataset.sharding)


class _Draws(eqx.Module):
    """Everything that determines the examples of a batch."""

    by_class: Int[Array, " N"] | None
    augmentation: AbstractAugmentation | None
    step: Int[Array, ""]
    key: PRNGKeyArray


def _take(size: int, num: int, counts, rows: PyTree, draws: _Draws, _, device):
    """One device's part of a batch of `size` out of `num` examples."""
    chosen = _chosen(size, num, counts, draws)
    if device is None:
        place = jnp.arange(size)
        images, *others = jax.tree.map(lambda x: x[chosen], rows)
    else:
        # Each device fills in the examples that it has, and zeros elsewhere. The sum
        # over devices sends each example to the device that needs it.
        share = -(-size // device.count)
        chosen = jnp.pad(chosen, (0, share * device.count - size), mode="edge")
        place = device.index * share + jnp.arange(share)

        def collect(x: Array) -> Array:
            index = chosen - device.index * len(x)
            is_here = (index >= 0) & (index < len(x))
            mask = is_here.reshape(-1, *[1] * (x.ndim - 1))
            found = jnp.where(mask, x[jnp.where(is_here, index, 0)], 0)
            return jax.lax.psum_scatter(found, device.axes, tiled=True)

        images, *others = jax.tree.map(collect, rows)
    if draws.augmentation is not None:
        # No epoch and no class has this number.
        key = jr.fold_in(jr.fold_in(draws.key, np.uint32(2**32 - 1)), draws.step)
        images = Dataset.to_floating(images)
        images = augment_part(draws.augmentation, images, place, key)
    return images, *others


def _chosen(size: int, num: int, counts, draws: _Draws) -> Int[Array, " size"]:
    """The indices of the examples in a batch."""
    step, key, by_class = draws.step, draws.key, draws.by_class
    if by_class is None:
        return batch_at(step, size, num, key=key)
    size = size // len(counts)
    ends = jnp.cumsum(jnp.array(counts))

    def of_class(class_, count, end):
        own_key = jr.fold_in(key, class_)
        return by_class[end - count + batch_at(step, size, count, key=own_key)]

    classes = jnp.arange(len(counts))
    return jax.vmap(of_class)(classes, jnp.array(counts), ends).ravel()
