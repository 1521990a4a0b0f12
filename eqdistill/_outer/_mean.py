"""Means over many examples, in chunks that fit in memory, on one or more devices."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from .._chunks import chunk_size
from .._sharding import vary_like


class Device(eqx.Module):
    """One of the devices that share the examples of a step: its number, and the axes of
    the mesh that the devices are on."""

    index: Int[Array, ""]
    axes: Any = eqx.field(static=True)

    @property
    def count(self) -> int:
        return jax.lax.axis_size(self.axes)


class Examples(eqx.Module):
    """The examples of a step.

    - `rows`: arrays whose first axis is spread over the devices.
    - `others`: whatever else `take` needs. All of it is on every device.
    - `take`: `take(rows, others, i, device)` returns a device's part of read `i` of the
        examples, a tree of arrays, from its part of `rows`. On one device, `device` is
        `None`. All parts have the same size. The last parts may be padded with any
        examples.
    - `num`: the number of examples in a read, on all devices, without padding.
    - `chunk_bytes`: the memory for the activations of a chunk.
    - `sharding`: how the first axis of `rows` is spread over devices, if it is.
    - `num_reads`: how many times `take` is called.
    """

    rows: PyTree[Array]
    others: PyTree
    take: Callable = eqx.field(static=True)
    num: int = eqx.field(static=True)
    chunk_bytes: int = eqx.field(static=True)
    sharding: NamedSharding | None = eqx.field(static=True)
    num_reads: int = eqx.field(default=1, static=True)


def mean_over_examples(
    fn: Callable, model: PyTree, example: PyTree, examples: Examples
) -> PyTree[Array]:
    """The mean of `fn(model, example)` over the examples, differentiable in `model`. It
    needs one sum over all devices. `example` is the struct of one example."""
    out = eqx.filter_eval_shape(fn, model, example)
    if isinstance(out, jax.ShapeDtypeStruct) and out.shape == ():
        return _scalar_mean(model, fn, examples)
    # A chunk is recomputed in the backward pass, so that memory is bounded.
    return _over_chunks(eqx.filter_checkpoint(_sum), fn, model, (), examples)


@eqx.filter_custom_jvp
def _scalar_mean(model, fn, examples):
    return _over_chunks(_sum, fn, model, (), examples)


@_scalar_mean.def_jvp
def _(primals, tangents):
    # The gradient is computed with the value, while a chunk is in the cache.
    model, fn, examples = primals
    model_dot, *others_dot = tangents
    if jax.tree.leaves(others_dot):
        raise NotImplementedError(
            "The outer loss cannot be differentiated with respect to the data."
        )
    has_tangent = jax.tree.map(
        lambda dot: dot is not None, model_dot, is_leaf=lambda x: x is None
    )
    learned, fixed = eqx.partition(model, has_tangent)
    value_and_grad = jax.value_and_grad(_sum, argnums=1)
    loss, gradient = _over_chunks(value_and_grad, fn, learned, (fixed,), examples)
    dot = optax.tree.cast_like(model_dot, gradient)
    return loss, jnp.asarray(optax.tree.vdot(gradient, dot), loss.dtype)


def _sum(fn, learned, fixed, chunk, is_counted):
    """The sum of a function over the examples of a chunk that are counted."""
    model = eqx.combine(learned, *fixed)
    values = jax.vmap(lambda example: fn(model, example))(chunk)

    def total(x: Array) -> Array:
        if is_counted is None:
            return jnp.sum(x, axis=0)
        mask = is_counted.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.sum(x, axis=0, where=mask)

    return jax.tree.map(total, values)


def _over_chunks(of_chunk, fn, learned, fixed, examples):
    """The sum of a function over all chunks, divided by the number of examples."""
    sharding = examples.sharding
    arrays, static = eqx.partition((learned, fixed, examples.others), eqx.is_array)

    def of_device(arrays, rows, device):
        learned, fixed, others = eqx.combine(arrays, static)

        def of_read(i):
            own = examples.take(rows, others, i, device)
            first = None if device is None else device.index * _num(own)
            return _of_read(of_chunk, fn, learned, fixed, own, first, examples)

        like = learned, fixed, rows
        return _sum_of(of_read, jnp.arange(examples.num_reads), like)

    if sharding is None:
        total = of_device(arrays, examples.rows, None)
    else:
        axes = sharding.spec[0]

        def of_shard(arrays, rows):
            device = Device(jax.lax.axis_index(axes), axes)
            total = of_device(arrays, rows, device)
            # One array, so that the devices communicate once.
            flat, unflatten = jax.flatten_util.ravel_pytree(total)
            return unflatten(jax.lax.psum(flat, axes))

        # User functions may contain loops, whose carries the checks would reject.
        total = jax.shard_map(
            of_shard,
            mesh=sharding.mesh,
            in_specs=(P(), P(axes)),
            out_specs=P(),
            check_vma=False,
        )(arrays, examples.rows)
    num = examples.num_reads * examples.num
    return jax.tree.map(lambda x: x / num, total)


def _of_read(of_chunk, fn, learned, fixed, own, first, examples):
    """The sum over the chunks of one device, whose first example has the number
    `first`. On one device, `first` is `None`."""
    num = _num(own)
    moving, still = eqx.partition(learned, eqx.is_inexact_array)

    def gradient(chunk):
        def scalar(moving):
            sums = _sum(fn, moving, (still, *fixed), chunk, None)
            return sum(jnp.sum(x) for x in jax.tree.leaves(sums))

        return jax.grad(scalar)(moving)

    size = chunk_size(gradient, own, examples.chunk_bytes)
    is_whole = size >= num

    def of_slice(begin):
        # The last chunk overlaps the one before, so that no data are padded.
        start = jnp.minimum(begin, num - size)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
        chunk = own if is_whole else jax.tree.map(cut, own)
        place = start + jnp.arange(size)
        is_counted = None if is_whole else place >= begin
        if first is not None:
            is_real = first + place < examples.num
            is_counted = is_real if is_whole else is_counted & is_real
        return of_chunk(fn, learned, fixed, chunk, is_counted)

    return _sum_of(of_slice, jnp.arange(0, num, size), (learned, fixed, own))


def _sum_of(fn: Callable, indices: Int[Array, " k"], like: PyTree) -> PyTree[Array]:
    """The sum of a function over indices, one after another. It varies over the same
    devices as the arrays of `like`."""
    if len(indices) == 1:
        return fn(indices[0])
    zero = optax.tree.zeros_like(jax.eval_shape(fn, indices[0]))
    zero = vary_like(zero, like)
    add = lambda total, i: (optax.tree.add(total, fn(i)), None)
    return jax.lax.scan(add, zero, indices)[0]


def _num(examples: PyTree[Array]) -> int:
    return len(jax.tree.leaves(examples)[0])
