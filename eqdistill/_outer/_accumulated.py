from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .._checks import check_at_least
from .._chunks import CHUNK_BYTES
from .._conversions import as_int
from .._sharding import as_rows, num_shards
from ._data import AbstractData, of_example
from ._mean import Examples, mean_over_examples
from ._stream import read_batch


class Accumulated(AbstractData):
    """Several batches of a source in each outer step, read from within the step one
    after another. The model is fitted once per step, and only one batch is in memory.

    With all batches of an epoch, this is the full batch of data that do not fit into
    memory.

    !!! Example

        ```python
        data = eqd.datasets.Accumulated(rows, 40, num_classes=10)
        result = eqd.distill(start, model, data, steps=50)
        ```
    """

    source: Any = eqx.field(static=True)
    num_batches: int = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    struct: tuple = eqx.field(static=True)
    chunk_bytes: int = eqx.field(static=True)
    sharding: NamedSharding | None = eqx.field(static=True)

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
            `source[t * num_batches]` to `source[(t + 1) * num_batches - 1]`.
        - `num_batches`: the number of batches in a step.
        - `num_classes`: the number of classes.
        - `chunk_bytes`, `sharding`: as for [`eqdistill.FullBatch`][]. Each device reads
            the batches, and works on its part. (Keyword only arguments.)

        **Raises:**

        A `TypeError` or `ValueError` if the first batch is not one. A run stops with an
        [`eqdistill.DistillationError`][] if another batch raises an error, or has other
        shapes.
        """
        check_at_least(1, num_batches=num_batches)
        images, labels = _checked(source, 0, num_classes)
        self.source = source
        self.num_batches = as_int(num_batches)
        self.num_classes = as_int(num_classes)
        to_struct = lambda x: (x.shape, str(x.dtype))
        self.struct = to_struct(images), to_struct(labels)
        self.chunk_bytes = as_int(chunk_bytes)
        self.sharding = None if sharding is None else as_rows("sharding", sharding)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.struct[0][0][1:]

    def mean(self, fn, model, step, *, key):
        del key
        num = self.struct[0][0][0]
        share = -(-num // num_shards(self.sharding))
        part_of = lambda shape, dtype: jax.ShapeDtypeStruct((share, *shape[1:]), dtype)
        parts = tuple(part_of(*x) for x in self.struct)

        def read(i, device):
            batch = _checked(self.source, int(i), self.num_classes)
            if tuple((x.shape, str(x.dtype)) for x in batch) != self.struct:
                raise ValueError(
                    f"`source[{int(i)}]` must have the shapes and dtypes of the first "
                    f"batch, {self.struct}; got {[(x.shape, x.dtype) for x in batch]}."
                )
            rows = np.minimum(int(device) * share + np.arange(share), num - 1)
            return tuple(x[rows] for x in batch)

        def take(rows, step, i, device):
            del rows
            index = step * self.num_batches + i
            number = jnp.array(0) if device is None else device.index
            found = jax.pure_callback(read, parts, index, number, vmap_method="sequential")
            return *found, {}

        examples = Examples(
            (), step, take, num, self.chunk_bytes, self.sharding, self.num_batches
        )
        example = tuple(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in parts)
        return mean_over_examples(of_example, (fn, model), (*example, {}), examples)


def _checked(source: Any, step: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch, on the host. (JAX's operations may not run within a program.)"""
    images, labels = map(np.asarray, read_batch(source, step))
    if images.dtype != np.uint8:
        images = images.astype(jax.dtypes.canonicalize_dtype(images.dtype))
        if not np.isfinite(images).all():
            raise ValueError(f"the images of `source[{step}]` must be finite.")
    if labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"the labels of `source[{step}]` must be in [0, {num_classes}), one for "
            f"each of the {len(images)} images."
        )
    return images, labels.astype(np.int32)
