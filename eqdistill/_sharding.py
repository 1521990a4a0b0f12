"""Arrays on many devices. All distribution is JAX's own."""

import functools
import math
from typing import Any

import equinox as eqx
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
    return as_rows("images.sharding", sharding)


def as_rows(name: str, sharding: NamedSharding) -> NamedSharding:
    """A sharding of the first axis alone, on a mesh with automatic axes, so that
    operations need no annotations.

    **Raises:** a `ValueError` if another axis is sharded, or the first one is not; or
    if the mesh of `jax.set_mesh` has explicit axes.
    """
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            "`jax.set_mesh` must be given a mesh with automatic axes, such as "
            "`jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))`, or not "
            "be used at all; it was given a mesh with explicit axes."
        )
    first, *others = sharding.spec or (None,)
    if first is None or any(x is not None for x in others):
        raise ValueError(
            f"`{name}` must spread the first axis, that of the examples, and no other; "
            f"got {sharding.spec}. Use `NamedSharding(mesh, PartitionSpec('data'))`."
        )
    names = sharding.mesh.axis_names
    devices: Any = sharding.mesh.devices
    mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    return NamedSharding(mesh, P(first))


def num_shards(sharding: NamedSharding | None) -> int:
    """The number of parts of the first axis."""
    if sharding is None:
        return 1
    axes = sharding.spec[0]
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def place(x: Array | np.ndarray, sharding: NamedSharding | None) -> Array:
    """Puts an array on its devices. Every process holds all of a NumPy array, and
    places its own part."""
    if sharding is None:
        return jnp.asarray(x)
    if isinstance(x, jax.Array):  # Already spread, over another mesh of these devices.
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows])


def replicate(tree: PyTree, like: NamedSharding | None) -> PyTree:
    """Copies each array to every device of a mesh."""
    if like is None:
        return tree
    everywhere = NamedSharding(like.mesh, P())
    arrays, others = eqx.partition(tree, lambda x: isinstance(x, jax.Array))
    if like.is_fully_addressable:
        arrays = jax.device_put(arrays, everywhere)
    else:  # Only a program can reach the devices of other processes.
        arrays = jax.jit(lambda x: x, out_shardings=everywhere)(arrays)
    return eqx.combine(arrays, others)


def to_host(x: Array | np.ndarray) -> np.ndarray:
    """Copies an array to the host, from the devices of all processes."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def vary_like(tree: PyTree, like: PyTree) -> PyTree:
    """Marks arrays as varying over the same devices as the arrays of `like`, which
    `jax.shard_map` requires of constants in loops and branches. Their values do not
    change."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    arrays = jax.tree.leaves(eqx.filter(like, eqx.is_array))
    firsts = [jnp.ravel(x)[0] for x in arrays if x.size and not is_key(x)]
    false = functools.reduce(jnp.logical_or, [x != x for x in firsts]) & False
    mark = lambda x: jnp.where(false, x, x) if eqx.is_array(x) else x
    return jax.tree.map(mark, tree)
