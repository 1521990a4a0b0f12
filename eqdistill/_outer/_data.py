import abc
import os
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_concrete, check_lengths, check_positive
from .._chunks import CHUNK_BYTES
from .._conversions import Labels
from .._data._dataset import Dataset, map_images
from .._losses import AbstractLoss
from .._sharding import as_rows, num_shards, place, sharding_of, to_host
from ._mean import Examples, mean_over_examples


class AbstractData(eqx.Module):
    """Real data as an outer step sees them: an argument of the compiled step.

    **Attributes:** none are required. If there is a `sharding`, a
    `jax.sharding.NamedSharding`, the state of a run is replicated on its devices. The
    `shape` of an image, `num_classes` and `class_names` are checked if they exist."""

    @abc.abstractmethod
    def mean(
        self, fn: Callable, model: PyTree, step: Int[Array, ""], *, key: PRNGKeyArray
    ) -> PyTree[Array]:
        """The mean over the real examples of a step, $\\frac{1}{N} \\sum_{i=1}^N r_i
        f(m, x_i, y_i)$, with the weights $r$ of a dataset, which are one by default.

        **Arguments:**

        - `fn`: a function `fn(model, x, y)` of one example $x$ and its label $y$, which
            returns an array or a tree of arrays. It must not close over traced arrays:
            everything that is differentiated is in `model`.
        - `model`: any pytree.
        - `step`: the number of the outer step, from 0.
        - `key`: a `jax.random.key`, the same in all steps of a run. (Keyword only
            argument.)

        **Returns:**

        The mean, with the structure that `fn` returns, differentiable in `model`.
        """


class Cached(eqx.Module):
    """A part of a model whose outputs on the real examples are computed only once.

    [`eqdistill.FullBatch`][] and [`eqdistill.Batches`][] evaluate it for all examples
    if it is one of their `cached` parts. An outer step then reads these outputs instead
    of computing them. On other inputs, such as distilled images, it is computed as
    usual.

    !!! Example

        ```python
        backbone = eqd.Cached(network_without_its_last_layer, "backbone")
        head = eqd.linear.LogisticRegression(512, 10).head
        model = eqd.linear.LinearClassifier(backbone, head)
        data = eqd.Batches(train, 1000, cached=[backbone])
        result = eqd.distill(start, model, data)
        ```
    """

    features: Callable
    name: str = eqx.field(static=True)
    directory: str | None = eqx.field(static=True)

    def __init__(
        self,
        features: Callable,
        name: str,
        directory: str | os.PathLike | None = None,
    ):
        """**Arguments:**

        - `features`: any module that maps one example to an array.
        - `name`: identifies this part. Different parts need different names.
        - `directory`: a folder in which the outputs are kept, for other runs of the
            program and for [`eqdistill.evaluate`][]. Each file is named after the
            SHA-256 of the computation, its arrays and the examples, so any number of
            networks and datasets can share the folder. Delete files that are no longer
            needed.
        """
        self.features = eqx.nn.inference_mode(features)
        self.name = name
        self.directory = None if directory is None else os.fspath(directory)

    def __call__(self, x: Any, *, key: PRNGKeyArray | None = None) -> Any:
        """Returns the outputs of `features` on one example. `key` is ignored."""
        del key
        return self.features(x)


class FullBatch(AbstractData):
    """All real examples in each outer step.

    They are processed in chunks, whose activations take about `chunk_bytes` bytes, as
    counted in the traced derivative of the model.

    On several devices, each works on its own part of the examples, and one sum over
    the devices adds up their parts of the loss and of its gradient.
    """

    images: Array
    labels: Labels
    weights: Float[Array, " N"] | None
    cached: dict[str, Array]
    sources: tuple[Cached, ...]
    num: int = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    class_names: tuple[str, ...] | None = eqx.field(static=True)
    chunk_bytes: int = eqx.field(static=True)
    sharding: NamedSharding | None = eqx.field(static=True)

    def __init__(
        self,
        dataset: Dataset,
        *,
        cached: Sequence[Cached] = (),
        chunk_bytes: int = CHUNK_BYTES,
        sharding: NamedSharding | None = None,
    ):
        """**Arguments:**

        - `dataset`: the real data.

        All other arguments are keyword only.

        - `cached`: the parts of models whose outputs are computed once, here, and kept
            in memory.
        - `chunk_bytes`: the memory for the activations of a chunk on one device, in
            bytes. The default suits the cache of a CPU.
        - `sharding`: how the examples are spread over devices, such as
            `NamedSharding(mesh, PartitionSpec("data"))`. Any number of examples can be
            spread over any number of devices. Defaults to how the images of `dataset`
            are spread.

        **Raises:**

        A `ValueError` if two parts have the same name, or an output is not finite; or
        if `sharding` does not spread the first axis alone.
        """
        check_positive(chunk_bytes=chunk_bytes)
        check_concrete("FullBatch", dataset=dataset, cached=cached)
        check_lengths("dataset", dataset.images, dataset.labels)
        if sharding is None:
            sharding = dataset.sharding
        else:
            sharding = as_rows("sharding", sharding)
        names = [part.name for part in cached]
        if len(set(names)) < len(names):
            raise ValueError(
                f"`cached` must have parts with different names; got {names}."
            )
        self.sources = tuple(cached)
        self.num = len(dataset)
        self.num_classes = dataset.num_classes
        self.class_names = dataset.class_names
        self.chunk_bytes = int(chunk_bytes)
        self.sharding = sharding
        self.images = _spread(dataset.images, sharding)
        self.labels = _spread(dataset.labels, sharding)
        weights = dataset.weights
        self.weights = None if weights is None else _spread(weights, sharding)
        self.cached = {}
        for part in cached:
            found = map_images(
                *(part.features, self.images, sharding, self.chunk_bytes),
                part.directory,
            )
            if not jnp.isfinite(found).all():
                raise ValueError(
                    f"`cached` must have finite outputs; those of {part.name!r} are "
                    "not."
                )
            self.cached[part.name] = found

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.images.shape[1:]

    def mean(self, fn, model, step, *, key):
        del step, key
        take = lambda rows, others, i, device: rows
        return mean_of_some(self, fn, model, self.num, None, take)


def mean_of_some(
    data: FullBatch, fn: Callable, model: PyTree, num: int, others: PyTree, take
) -> PyTree[Array]:
    """The mean over the `num` examples that `take` returns: see `Examples`."""
    rows = data.images, data.labels, data.weights, data.cached
    examples = Examples(rows, others, take, num, data.chunk_bytes, data.sharding)
    struct = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    example = jax.tree.map(struct, rows)
    return mean_over_examples(of_example, (fn, model), example, examples)


def _spread(x: Array, sharding: NamedSharding | None) -> Array:
    """Spreads rows over devices, with the last row repeated until all devices have the
    same number of rows."""
    if sharding_of(x) == sharding:
        return x
    rows, missing = to_host(x), -len(x) % num_shards(sharding)
    if missing:
        rows = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
    return place(rows, sharding)


def of_example(model: PyTree, example: tuple) -> PyTree:
    """`fn(model, x, y)` times the weight of the example, using cached outputs."""
    (fn, model), (image, label, weight, cached) = model, example
    is_known = lambda node: isinstance(node, Cached) and node.name in cached
    model = jax.tree.map(
        lambda node: _Constant(cached[node.name]) if is_known(node) else node,
        model,
        is_leaf=is_known,
    )
    value = fn(model, Dataset.to_floating(image), label)
    if weight is None:
        return value
    return jax.tree.map(lambda x: weight.astype(x.dtype) * x, value)


class _Constant(eqx.Module):
    value: Array

    def __call__(self, x, *, key=None):
        del x, key
        return self.value


def example_loss(
    model: tuple[AbstractLoss, PyTree], x: Array, y: Array
) -> Float[Array, ""]:
    """The loss of a network on one example: the function that [`eqdistill.Bilevel`][]
    takes the mean of. Data may recognise it, and use a faster method."""
    loss, network = model
    return loss(network(x)[None], y[None])


def find_cached(tree: PyTree) -> list[Cached]:
    is_cached = lambda node: isinstance(node, Cached)
    nodes = jax.tree.leaves(tree, is_leaf=is_cached)
    return [node for node in nodes if is_cached(node)]


def check_cached(objective: PyTree, data: PyTree) -> None:
    """**Raises:** a `ValueError` if the data hold the outputs of a module that differs
    from the module of the same name in the objective."""
    known = {node.name: node for node in find_cached(data)}
    for node in find_cached(objective):
        other = known.get(node.name, node)
        if node is not other and not eqx.tree_equal(node, other):
            raise ValueError(
                f"`cached` of the data must hold the modules of the objective; the "
                f"module named {node.name!r} is a different one."
            )
