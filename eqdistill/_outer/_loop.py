import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._distill_state import DistillState
from ._problem import Problem


class CompiledStep:
    """The step of a problem, compiled, on a state that is donated to each step.

    The trees of the problem and of the state are flattened once: to flatten modules in
    each step would take longer than many a step does.
    """

    def __init__(self, problem: Problem, state: DistillState, *, is_batched: bool):
        """`is_batched` says whether `state` is one of many runs, under `jax.vmap`."""
        leaves, structure = jax.tree.flatten(problem)
        self._arrays = [x for x in leaves if eqx.is_array(x)]
        others = tuple(None if eqx.is_array(x) else x for x in leaves)
        state_leaves, state_structure = jax.tree.flatten(state)
        self._static = _Static(structure, others, state_structure, is_batched)
        self._leaves = copy(state_leaves)

    def __call__(self) -> Float[Array, "*starts 3"]:
        """Takes a step, and returns what it measured: the fields of a `Metrics`."""
        self._leaves, row = _step(self._static, self._leaves, self._arrays)
        return row

    def state(self) -> DistillState:
        """A copy of the state after the last step."""
        return jax.tree.unflatten(self._static.state_structure, copy(self._leaves))


def copy(tree: PyTree) -> PyTree:
    """Arrays that may be donated, or that outlive a loop that donates."""
    # Unlike `jnp.copy`, this compiles nothing.
    return jax.device_put(tree, may_alias=False)


class _Static(NamedTuple):
    structure: Any
    others: tuple[Any, ...]
    state_structure: Any
    is_batched: bool


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(static, state_leaves, arrays):
    remaining = iter(arrays)
    leaves = [next(remaining) if x is None else x for x in static.others]
    problem = jax.tree.unflatten(static.structure, leaves)
    state = jax.tree.unflatten(static.state_structure, state_leaves)
    step = jax.vmap(problem.step) if static.is_batched else problem.step
    new_state, metrics = step(state)
    fields = [x.astype(jnp.result_type(float)) for x in jax.tree.leaves(metrics)]
    return jax.tree.leaves(new_state), jnp.stack(fields, axis=-1)
