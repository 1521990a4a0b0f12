"""Means over many examples, in chunks that fit into memory."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree


def mean_over_examples(
    fn: Callable, model: PyTree, examples: PyTree, chunk_bytes: int
) -> PyTree[Array]:
    """The mean of `fn(model, example)` over the first axis of the examples,
    differentiable in `model`.

    A chunk of examples has about `chunk_bytes` bytes of activations.
    """
    size = _chunk_size(fn, model, examples, chunk_bytes)
    example = jax.tree.map(lambda x: x[0], examples)
    out = eqx.filter_eval_shape(fn, model, example)
    if isinstance(out, jax.ShapeDtypeStruct) and out.shape == ():
        return _scalar_mean(model, fn, examples, size)
    # A chunk is computed again in the backward pass, so that memory is bounded.
    return _over_chunks(eqx.filter_checkpoint(_sum), fn, model, (), examples, size)


@eqx.filter_custom_jvp
def _scalar_mean(model, fn, examples, size):
    return _over_chunks(_sum, fn, model, (), examples, size)


@_scalar_mean.def_jvp
def _(primals, tangents):
    # The gradient is computed with the value, while a chunk is in the cache.
    model, fn, examples, size = primals
    model_dot, *others_dot = tangents
    if jax.tree.leaves(others_dot):
        raise NotImplementedError("The outer loss cannot be differentiated in data.")
    has_tangent = jax.tree.map(
        lambda dot: dot is not None, model_dot, is_leaf=lambda x: x is None
    )
    learned, fixed = eqx.partition(model, has_tangent)
    value_and_grad = jax.value_and_grad(_sum, argnums=1)
    loss, gradient = _over_chunks(value_and_grad, fn, learned, (fixed,), examples, size)
    dot = optax.tree.cast_like(model_dot, gradient)
    return loss, jnp.asarray(optax.tree.vdot(gradient, dot), loss.dtype)


def _sum(fn, learned, fixed, chunk, is_new):
    """The sum of a function over the examples of a chunk that are new."""
    model = eqx.combine(learned, *fixed)
    values = jax.vmap(lambda example: fn(model, example))(chunk)

    def total(x: Array) -> Array:
        if is_new is None:
            return jnp.sum(x, axis=0)
        mask = is_new.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.sum(x, axis=0, where=mask)

    return jax.tree.map(total, values)


def _over_chunks(of_chunk, fn, learned, fixed, examples, size):
    """The sum of a function of a chunk over all chunks, over the number of examples."""
    num = len(jax.tree.leaves(examples)[0])
    if size >= num:
        total = of_chunk(fn, learned, fixed, examples, None)
    else:

        def of_slice(first):
            # The last chunk overlaps the one before, so that no data are padded.
            start = jnp.minimum(first, num - size)
            chunk = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), examples
            )
            is_new = start + jnp.arange(size) >= first
            return of_chunk(fn, learned, fixed, chunk, is_new)

        def body(total, first):
            return optax.tree.add(total, of_slice(first)), None

        firsts = jnp.arange(0, num, size)
        zero = optax.tree.zeros_like(jax.eval_shape(of_slice, firsts[0]))
        total, _ = jax.lax.scan(body, zero, firsts)
    return jax.tree.map(lambda x: x / num, total)


def _chunk_size(fn, model, examples, chunk_bytes: int) -> int:
    """The number of examples in a chunk: all chunks have nearly the same size."""
    num = len(jax.tree.leaves(examples)[0])
    # Enough examples that the arrays of the model weigh little.
    some = min(num, 256)
    arrays, static = eqx.partition((model, examples), eqx.is_array)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

    def gradient(arrays):
        learned, fixed = eqx.partition(arrays[0], eqx.is_inexact_array)
        chunk = jax.tree.map(lambda x: x[:some], arrays[1])

        def scalar(learned):
            sums = _sum(fn, learned, (fixed, static[0]), chunk, None)
            return sum(jnp.sum(x) for x in jax.tree.leaves(sums))

        return jax.grad(scalar)(learned)

    peak = _peak_bytes(jax.make_jaxpr(gradient)(structs).jaxpr)
    most = max(1, some * chunk_bytes // max(1, peak))
    return -(-num // -(-num // most))


def _peak_bytes(jaxpr: Any) -> int:
    """The most bytes of the results that are alive at once in a program, before the
    compiler fuses any."""
    last_use = {id(x): i for i, eqn in enumerate(jaxpr.eqns) for x in eqn.invars}
    last_use |= dict.fromkeys(map(id, jaxpr.outvars), len(jaxpr.eqns))
    live = peak = 0
    freed = {}
    for i, eqn in enumerate(jaxpr.eqns):
        inner = [_peak_bytes(sub) for sub in jex.jaxprs_in_params(eqn.params)]
        for var in eqn.outvars:
            size = _num_bytes(var.aval)
            live += size
            when = max(i, last_use.get(id(var), i))
            freed[when] = freed.get(when, 0) + size
        peak = max(peak, live + max(inner, default=0))
        live -= freed.pop(i, 0)
    return peak


def _num_bytes(aval: Any) -> int:
    return getattr(aval, "size", 0) * getattr(aval.dtype, "itemsize", 0)
