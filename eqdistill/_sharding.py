"""Arrays on many devices. All distribution is JAX's own."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PyTree


def sharding_of(x: Any) -> NamedSharding | None:
    """How the first axis of an array is spread over devices, or `None` if it is not."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return None
    return as_rows("the sharding of an array", sharding)


def as_rows(name: str, sharding: NamedSharding) -> NamedSharding:
    """A sharding of the first axis alone, on a mesh of automatic axes: the operations
    of others on such arrays need no annotations.

    **Raises:** a `ValueError` if another axis is sharded, or the first one is not; or
    if the mesh of `jax.set_mesh` has explicit axes.
    """
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            "`jax.set_mesh` must be given a mesh with automatic axes, such as "
            "`jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))`, or not "
            "be used at all; it was given explicit ones."
        )
    first, *others = sharding.spec or (None,)
    if first is None or any(x is not None for x in others):
        raise ValueError(
            f"`{name}` must spread the first axis, that of the examples, and no other; "
            f"got {sharding.spec}. Use `NamedSharding(mesh, PartitionSpec('data'))`."
        )
    mesh = sharding.mesh
    types = (AxisType.Auto,) * len(mesh.axis_names)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return NamedSharding(mesh, P(first))


def num_shards(sharding: NamedSharding | None) -> int:
    """The number of parts of the first axis."""
    axes = () if sharding is None else sharding.spec[0]
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[name] for name in names)  # pyright: ignore[reportOptionalMemberAccess]


def place(x: Array | np.ndarray, sharding: NamedSharding | None) -> Array:
    """Puts an array on its devices. Every process has all of a NumPy array, and puts
    its own part."""
    if sharding is None:
        return jnp.asarray(x)
    if isinstance(x, jax.Array):
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows])


def replicate(tree: PyTree, like: NamedSharding | None) -> PyTree:
    """Puts all of each array on each device of a mesh."""
    if like is None:
        return tree
    everywhere = NamedSharding(like.mesh, P())
    put = lambda x: jax.device_put(x, everywhere) if isinstance(x, jax.Array) else x
    return jax.tree.map(put, tree)


def to_host(x: Array | np.ndarray) -> np.ndarray:
    """An array as one of NumPy, from the devices of all processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def vary_like(tree: PyTree[Array], like: PyTree) -> PyTree[Array]:
    """Marks arrays as different on the devices where any array of `like` is, which
    `jax.shard_map` demands of the constants in a loop or a branch. Their values stay."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    is_number = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, np.number)
    firsts = [jnp.ravel(x)[0] for x in jax.tree.leaves(like) if is_number(x)]
    false = functools.reduce(jnp.logical_or, [x != x for x in firsts]) & False
    return jax.tree.map(lambda x: jnp.where(false, x, x), tree)
