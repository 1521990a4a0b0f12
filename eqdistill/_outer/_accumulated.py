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
from ._stream import check_source, read_batch


class Accumulated:
    """Several batches of a source in each outer step, read from within the step one
    after another. The model is fitted once per step, and only one batch is in memory.

    With all batches of an epoch, this is the full batch of data that do not fit in
    memory. Like an [`eqdistill.datasets.Stream`][], it is a function from the number of
    the step to its data.

    !!! Example

        ```python
        data = eqd.datasets.Accumulated(rows, 40, num_classes=10)
        result = eqd.distill(start, model, data, steps=50)
        ```

    **Attributes:** `error`: the error that reading a batch raised, or `None`.
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
        - `num_classes`: the number of classes, or of columns of targets.
        - `chunk_bytes`, `sharding`: as for [`eqdistill.FullBatch`][]. Each device reads
            the batches, and works on its part. (Keyword only arguments.)

        **Raises:**

        Any error from reading the first batch. A run stops with an
        [`eqdistill.DistillationError`][] if another batch cannot be read, is not
        finite, or has different shapes.
        """
        check_source(source)
        check_at_least(1, num_batches=num_batches)
        check_positive(chunk_bytes=chunk_bytes)
        first = Dataset(*read_batch(source, 0), num_classes)
        struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        self.source = source
        self.num_classes = as_int(num_classes)
        self.struct = struct(first.images), struct(first.labels)
        self.error: Exception | None = None
        self._data = _Accumulated(
            self,
            as_int(num_batches),
            as_int(chunk_bytes),
            None if sharding is None else as_rows("sharding", sharding),
        )

    def __call__(self, step: int) -> AbstractData:
        """Returns the data, which are the same for each step."""
        del step
        return self._data

    def read(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads a batch with NumPy, because JAX must not be called within a program."""
        images, labels = map(np.asarray, read_batch(self.source, step))
        shapes = tuple(x.shape for x in self.struct)
        is_byte = images.dtype == self.struct[0].dtype == np.uint8
        is_same_kind = is_byte or images.dtype.kind == self.struct[0].dtype.kind == "f"
        has_targets = len(shapes[1]) == 2
        is_label = has_targets or labels.dtype.kind in "iu"
        if (images.shape, labels.shape) != shapes or not is_same_kind or not is_label:
            raise ValueError(
                f"`source[{step}]` must have the shapes and dtypes of `source[0]`, "
                f"{self.struct}; got {images.dtype} of shape {images.shape} and "
                f"{labels.dtype} of shape {labels.shape}."
            )
        if not is_byte and not np.isfinite(images).all():
            raise ValueError(f"The images of `source[{step}]` must be finite.")
        if has_targets and not np.isfinite(labels).all():
            raise ValueError(f"The targets of `source[{step}]` must be finite.")
        if not has_targets and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"The labels of `source[{step}]` must be in [0, {self.num_classes}); "
                f"got {labels.min()} to {labels.max()}."
            )
        image, label = self.struct
        return images.astype(image.dtype), labels.astype(label.dtype)


class _Accumulated(AbstractData):
    reader: Accumulated = eqx.field(static=True)
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
        struct = (*self.reader.struct, jax.ShapeDtypeStruct((1,), np.float32))
        num = len(struct[0])
        share = -(-num // num_shards(self.sharding))
        parts = [jax.ShapeDtypeStruct((share, *x.shape[1:]), x.dtype) for x in struct]

        def read(i, device):
            rows = np.minimum(int(device) * share + np.arange(share), num - 1)
            try:
                batch = [x[rows] for x in self.reader.read(int(i))]
                return *batch, np.zeros(share, np.float32)
            except Exception as e:
                # An error from within a program would leave other devices waiting. NaN
                # stops the run through its status.
                self.reader.error = e
                empty = [np.zeros(x.shape, x.dtype) for x in parts[:2]]
                return *empty, np.full(share, np.nan, np.float32)

        def take(rows, step, i, device):
            del rows
            index = step * self.num_batches + i
            number = jnp.array(0) if device is None else device.index
            return jax.pure_callback(
                read, tuple(parts), index, number, vmap_method="sequential"
            )

        args = (), step, take, num, self.chunk_bytes, self.sharding, self.num_batches
        example = tuple(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in parts)
        return mean_over_examples(_of_read, (fn, model), example, Examples(*args))


def _of_read(model, example):
    """Like `of_example`. `zero` is NaN if the batch could not be read."""
    image, label, zero = example
    value = of_example(model, (image, label, None, {}))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), value)
