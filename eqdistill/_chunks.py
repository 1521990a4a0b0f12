"""Sizes of chunks whose activations fit in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
from jaxtyping import PyTree


# A chunk of this many bytes suits the cache of a CPU, and keeps an accelerator busy.
CHUNK_BYTES = 2**24


def chunk_size(of_chunk: Callable, examples: PyTree, chunk_bytes: int) -> int:
    """The number of examples in a chunk for which the intermediate results of
    `of_chunk(chunk)` take about `chunk_bytes` bytes at their peak. All chunks have
    nearly the same size."""
    num = len(jax.tree.leaves(examples)[0])
    # Use enough examples that the arrays of a model add little to the peak.
    some = min(num, 256)
    chunk = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((some, *x.shape[1:]), x.dtype), examples
    )
    peak = _peak_bytes(jax.make_jaxpr(of_chunk)(chunk).jaxpr)
    most = max(1, some * chunk_bytes // max(1, peak))
    return -(-num // -(-num // most))


def _peak_bytes(jaxpr: Any) -> int:
    """The peak size of the intermediate results of a program, in bytes, before the
    compiler fuses any operations."""
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
