from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import NamedSharding

from .._checks import check_at_least, check_between
from .._conversions import ArrayOrList, as_int
from .._data._dataset import Dataset
from .._typechecking import describe
from ._data import FullBatch


class Stream:
    """Real data that are read while they are used: a function from the number of the
    step to the batch of this step.

    A thread reads the next batches, checks them, and puts them on their devices, while
    a step runs. The batch is a function of the step alone, so that a run that was
    killed resumes where it was.

    !!! Example

        ```python
        class Rows:
            def __init__(self, images, labels, size):
                self.images, self.labels, self.size = images, labels, size

            def __getitem__(self, step):
                first = step * self.size % (len(self.labels) - self.size + 1)
                rows = slice(first, first + self.size)
                return self.images[rows], self.labels[rows]

        images = np.load("images.npy", mmap_mode="r")
        labels = np.load("labels.npy")
        stream = eqd.datasets.Stream(Rows(images, labels, 256), num_classes=10)
        result = eqd.distill(start, model, stream, steps=1000)
        ```

        A `grain.MapDataset` of pairs of an image and its label is a source too:
        `Stream(dataset.shuffle(seed=0).repeat().batch(256), num_classes=10)`.
    """

    def __init__(
        self,
        source: Any,
        num_classes: int,
        *,
        ahead: int = 2,
        sharding: NamedSharding | None = None,
    ):
        """**Arguments:**

        - `source`: any object whose item `source[step]` is a batch: a pair of images
            and labels, as for [`eqdistill.Dataset`][]. All batches have one shape. A
            thread reads them.
        - `num_classes`: the number of classes.
        - `ahead`: how many batches are read ahead. (Keyword only argument.)
        - `sharding`: as for [`eqdistill.FullBatch`][]. (Keyword only argument.)

        **Raises:**

        A `TypeError` if `source` has no items. A run stops with an
        [`eqdistill.DistillationError`][] if reading a batch raises an error, or its
        images are not finite.
        """
        if not hasattr(source, "__getitem__"):
            raise TypeError(
                "`source` must have items, so that `source[step]` is the batch of a "
                f"step; got {describe(source)}."
            )
        check_at_least(0, ahead=ahead)
        check_between(1, 2**31 - 1, num_classes=num_classes)
        self.source = source
        self.num_classes = as_int(num_classes)
        self.ahead = as_int(ahead)
        self.sharding = sharding
        self._thread = ThreadPoolExecutor(1, "eqdistill-stream")
        self._reading: dict[int, Future] = {}

    def __call__(self, step: int) -> FullBatch:
        """Returns the batch of a step, and begins to read the next ones."""
        wanted = range(step, step + 1 + self.ahead)
        for i in self._reading.keys() - set(wanted):
            self._reading.pop(i).cancel()
        for i in wanted:
            if i not in self._reading:
                self._reading[i] = self._thread.submit(self._read, i)
        return self._reading.pop(step).result()

    def _read(self, step: int) -> FullBatch:
        images, labels = read_batch(self.source, step)
        dataset = Dataset(images, labels, self.num_classes)
        return jax.block_until_ready(FullBatch(dataset, sharding=self.sharding))


def read_batch(source: Any, step: int) -> tuple[ArrayOrList, ArrayOrList]:
    """Reads the images and the labels of a batch."""
    batch = source[step]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(
            f"`source[{step}]` must be a pair of images and labels; got "
            f"{describe(batch)}."
        )
    return batch[0], batch[1]
