from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .._checks import check_at_least, check_positive
from .._chunks import CHUNK_BYTES
from .._conversions import as_int
from .._data._dataset import Dataset
from .._sharding import as_rows, num_shards
from ._data import AbstractData, of_example
from ._mean import Examples, mean_over_examples
from ._stream import read_batch


class Accumulated:
    """Several batches of a source in each outer step, read from within the step one
    after another. The model is fitted once per step, and only one batch is in memory.

    With all batches of an epoch, this is the full batch of data that do not fit into
    memory. As a [`eqdistill.datasets.Stream`][], it is a function from the number of
    the step to its data.

    !!! Example

        ```python
        data = eqd.datasets.Accumulated(rows, 40, num_classes=10)
        result = eqd.distill(start, model, data, steps=50)
        ```
    """

    def __init__(
        self,
        source: Any,
        num_batches: int,
        num_classes: int,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        sharding: NamedSharding | None = None,
    ):
        """**Arguments:**

        - `source`: as for [`eqdistill.datasets.Stream`][]. Step $t$ uses the batches
            `source[t * num_batches]` to `source[(t + 1) * num_batches - 1]`. Several
            threads may read at once.
        - `num_batches`: the number of batches in a step.
        - `num_classes`: the number of classes.
        - `chunk_bytes`, `sharding`: as for [`eqdistill.FullBatch`][]. Each device reads
            the batches, and works on its part. (Keyword only arguments.)

        **Raises:**

        What reading the first batch raises. A run stops with an
        [`eqdistill.DistillationError`][] if reading another batch raises an error, or
        it is not finite or has other shapes.
        """
        check_at_least(1, num_batches=num_batches)
        check_positive(chunk_bytes=chunk_bytes)
        sharding = None if sharding is None else as_rows("sharding", sharding)
        self._reader = _Reader(source, as_int(num_classes))
        num_batches, chunk_bytes = as_int(num_batches), as_int(chunk_bytes)
        self._data = _Accumulated(self._reader, num_batches, chunk_bytes, sharding)

    def __call__(self, step: int) -> AbstractData:
        """Returns the data, which are the same for each step. Raises the error that the
        last reading has raised."""
        if self._reader.error is not None:
            raise self._reader.error
        return self._data


class _Reader:
    """Reads batches on the host, all with the shapes and dtypes of the first one."""

    def __init__(self, source: Any, num_classes: int):
        self.source, self.num_classes = source, num_classes
        self.struct: Any = None
        self.error: Exception | None = None
        self.struct = _struct(self.read(0))

    def read(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Checked here, as JAX's operations may not run within a program."""
        images, labels = map(np.asarray, read_batch(self.source, step))
        if images.dtype != np.uint8:
            images = images.astype(jax.dtypes.canonicalize_dtype(images.dtype))
            if not np.isfinite(images).all():
                raise ValueError(f"The images of `source[{step}]` must be finite.")
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"The labels of `source[{step}]` must be in [0, {self.num_classes}); "
                f"got {labels.min()} to {labels.max()}."
            )
        batch = images, labels.astype(np.int32)
        if self.struct is None and (
            labels.shape != images.shape[:1] or not labels.size
        ):
            raise ValueError(
                f"`source[{step}]` must have one label for each image; got shapes "
                f"{labels.shape} and {images.shape}."
            )
        if self.struct is not None and _struct(batch) != self.struct:
            raise ValueError(
                f"`source[{step}]` must have the shapes and dtypes of `source[0]`, "
                f"{self.struct}; got {_struct(batch)}."
            )
        return batch


class _Accumulated(AbstractData):
    reader: _Reader = eqx.field(static=True)
    num_batches: int = eqx.field(static=True)
    chunk_bytes: int = eqx.field(static=True)
    sharding: NamedSharding | None = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.struct[0].shape[1:]

    @property
    def num_classes(self) -> int:
        return self.reader.num_classes

    def mean(self, fn, model, step, *, key):
        del key
        struct = self.reader.struct
        num = len(struct[1])
        share = -(-num // num_shards(self.sharding))
        resize = lambda x: jax.ShapeDtypeStruct((share, *x.shape[1:]), x.dtype)
        parts = (*map(resize, struct), jax.ShapeDtypeStruct((), np.float32))

        def read(i, device):
            rows = np.minimum(int(device) * share + np.arange(share), num - 1)
            try:
                return *(x[rows] for x in self.reader.read(int(i))), np.float32(0)
            except Exception as e:
                # An error from within a program would leave other devices waiting. NaN
                # stops the run, and the error is raised before the next step.
                self.reader.error = e
                empty = (np.zeros(x.shape, x.dtype) for x in parts[:2])
                return *empty, np.float32(np.nan)

        def take(rows, step, i, device):
            del rows
            index = step * self.num_batches + i
            number = jnp.array(0) if device is None else device.index
            images, labels, zero = jax.pure_callback(
                read, parts, index, number, vmap_method="sequential"
            )
            images = Dataset.to_floating(images)
            return images + zero.astype(images.dtype), labels, {}

        args = (), step, take, num, self.chunk_bytes, self.sharding, self.num_batches
        example = (*(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in struct), {})
        return mean_over_examples(of_example, (fn, model), example, Examples(*args))


def _struct(batch) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in batch)
