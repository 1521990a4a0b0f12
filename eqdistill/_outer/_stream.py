from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from .._checks import check_at_least, check_between, check_positive
from .._chunks import CHUNK_BYTES
from .._conversions import ArrayOrList, as_int
from .._data._dataset import Dataset
from .._typechecking import describe
from ._data import FullBatch


class Stream:
    """Batches that are read while a run uses them: a function from the number of the
    step to the batch of this step.

    A thread reads the next batches, checks them, and puts them on their devices, while
    a step runs. The batch is a function of the step alone, so that a run that was
    killed resumes where it stopped.

    !!! Example

        ```python
        source = grain.MapDataset.source(pairs).shuffle(seed=0).repeat().batch(256)
        stream = eqd.datasets.Stream(source, num_classes=10)
        result = eqd.distill(start, model, stream, steps=1000)
        ```
    """

    def __init__(
        self,
        source: Any,
        num_classes: int,
        *,
        ahead: int = 2,
        chunk_bytes: int = CHUNK_BYTES,
        sharding: NamedSharding | None = None,
    ):
        """**Arguments:**

        - `source`: any object whose item `source[step]` is a batch: a pair of NumPy
            arrays, images and labels, as for [`eqdistill.Dataset`][]. All batches must
            have the same shape. A thread reads them.
        - `num_classes`: the number of classes, or of columns of targets.
        - `ahead`: how many batches are read ahead. (Keyword only argument.)
        - `chunk_bytes`, `sharding`: as for [`eqdistill.FullBatch`][]. (Keyword only
            arguments.)

        **Raises:**

        A `TypeError` if `source` has no items. A run stops with an
        [`eqdistill.DistillationError`][] if reading a batch raises an error, or the
        images of a batch are not finite.
        """
        check_source(source)
        check_at_least(0, ahead=ahead)
        check_positive(chunk_bytes=chunk_bytes)
        check_between(1, 2**31 - 1, num_classes=num_classes)
        self.source = source
        self.num_classes = as_int(num_classes)
        self.ahead = as_int(ahead)
        self.options: Any = {"chunk_bytes": chunk_bytes, "sharding": sharding}
        self._thread = ThreadPoolExecutor(1, "eqdistill-stream")
        self._reading: dict[int, Future] = {}

    def __call__(self, step: int) -> FullBatch:
        """Returns the batch of a step, and begins to read the next ones."""
        wanted = range(step, step + 1 + self.ahead)
        for i in self._reading.keys() - set(wanted):
            self._reading.pop(i).cancel()
        for i in wanted:
            if i not in self._reading:
                # The other thread does not see the setting of a `with` block.
                is_double = jnp.result_type(float) == jnp.float64
                self._reading[i] = self._thread.submit(self._read, i, is_double)
        return self._reading.pop(step).result()

    def _read(self, step: int, is_double: bool) -> FullBatch:
        with jax.enable_x64(is_double):
            dataset = Dataset(*read_batch(self.source, step), self.num_classes)
            return jax.block_until_ready(FullBatch(dataset, **self.options))


def check_source(source: Any) -> None:
    if not hasattr(source, "__getitem__"):
        raise TypeError(
            "`source` must have items, so that `source[step]` is the batch of a step; "
            f"got {describe(source)}."
        )


def read_batch(source: Any, step: int) -> tuple[ArrayOrList, ArrayOrList]:
    """Reads the images and the labels of a batch."""
    batch = source[step]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(
            f"`source[{step}]` must be a pair of images and labels; got "
            f"{describe(batch)}."
        )
    return batch[0], batch[1]
