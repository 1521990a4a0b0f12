from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .._conversions import as_int
from .._data._augmentation import AbstractAugmentation, augment
from .._data._dataset import Dataset
from .._data._permutation import batch_at
from ._data import AbstractData, Cached, FullBatch, of_example
from ._mean import mean_over_examples


class Batches(AbstractData):
    """Some of the real examples in each outer step: drawn at random, without
    replacement, until fewer are left than a batch needs. Then another epoch starts, in
    another order.

    The order is a function of the key and the epoch: of the run, or, if batches are
    balanced, of each class.
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
        chunk_bytes: int = 2**24,
    ):
        """**Arguments:**

        - `dataset`: the real data.
        - `size`: the number of examples in a batch.

        All other arguments are keyword only.

        - `balanced`: whether a batch has the same number of examples of each class.
        - `augmentation`: changes each image at random, differently in each step.
        - `cached`, `chunk_bytes`: as for [`eqdistill.FullBatch`][].

        **Raises:**

        A `ValueError` if `size` is not from 1 to the number of examples; if a balanced
        batch would not have the same number of examples of each class, or more than the
        smallest class has; if images with cached outputs are to be augmented; and as
        [`eqdistill.FullBatch`][].
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
        self.data = FullBatch(dataset, cached=cached, chunk_bytes=chunk_bytes)
        self.size = size
        self.augmentation = augmentation
        self.by_class, self.counts = None, ()
        if balanced:
            labels = np.asarray(dataset.labels)
            counts = np.bincount(labels, minlength=dataset.num_classes)
            most = counts.min() * dataset.num_classes
            if size % dataset.num_classes or size > most:
                raise ValueError(
                    f"`size` must be a multiple of the {dataset.num_classes} classes, "
                    f"and at most {most}, since class {counts.argmin()} has "
                    f"{counts.min()} examples; got {size}."
                )
            self.by_class = jnp.asarray(np.argsort(labels, kind="stable"))
            self.counts = tuple(counts.tolist())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.data.shape

    @property
    def num_classes(self) -> int:
        return self.data.num_classes

    def mean(self, fn, model, step, *, key):
        """**Raises:** a `ValueError` if the augmentation changes the images' shape."""
        data = self.data
        rows = self._rows(step, key)
        images, labels, cached = jax.tree.map(
            lambda x: x[rows], (data.images, data.labels, data.cached)
        )
        if self.augmentation is not None:
            # No epoch and no class has this number.
            key = jr.fold_in(jr.fold_in(key, np.uint32(2**32 - 1)), step)
            images = augment(self.augmentation, Dataset.to_floating(images), key=key)
        examples = images, labels, cached
        return mean_over_examples(of_example, (fn, model), examples, data.chunk_bytes)

    def _rows(self, step: Int[Array, ""], key: PRNGKeyArray) -> Int[Array, " size"]:
        if self.by_class is None:
            num = len(self.data.labels)
            return batch_at(step, self.size, num, key=key)
        by_class, size = self.by_class, self.size // len(self.counts)
        counts = jnp.array(self.counts)
        first = jnp.cumsum(counts) - counts

        def of_class(class_, count, first):
            own_key = jr.fold_in(key, class_)
            return by_class[first + batch_at(step, size, count, key=own_key)]

        classes = jnp.arange(len(self.counts))
        return jax.vmap(of_class)(classes, counts, first).ravel()
