import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._sharding import replicate
from ._data import AbstractData
from ._problem import DistillState, Problem


class Record(eqx.Module):
    """The metrics of a step, in one array."""

    values: Float[Array, " metrics"]
    names: tuple[str, ...] = eqx.field(static=True)


class CompiledStep:
    """The compiled step of a problem. It holds the state, and donates it to each step.

    The trees are flattened once: flattening modules in each step would take longer than
    many steps do.
    """

    def __init__(self, problem: Problem, state: DistillState, data: AbstractData):
        # Place everything on all devices of the data from the start. Otherwise the
        # second step would compile again.
        sharding = getattr(data, "sharding", None)
        self._problem = _flatten(replicate(problem, sharding))
        structure, leaves = _flatten(replicate(state, sharding))
        self._must_check = sharding is not None
        self._state_structure = structure
        self._leaves = copy_arrays(leaves)
        self._data = None

    def __call__(self, data: AbstractData) -> Record:
        """Takes a step, and returns its metrics."""
        if self._data is None or self._data[0] is not data:
            self._data = data, _flatten(data)
        (problem, problem_arrays), (layout, data_arrays) = self._problem, self._data[1]
        structures = problem, self._state_structure, layout
        args = structures, self._leaves, problem_arrays, data_arrays
        if self._must_check:
            _check_errors(_step.trace(*args).jaxpr.jaxpr)
            self._must_check = False
        self._leaves, record = _step(*args)
        return record

    def state(self) -> DistillState:
        """A copy of the state after the last step."""
        return _unflatten(self._state_structure, copy_arrays(self._leaves))


def _check_errors(jaxpr: Any) -> None:
    """**Raises:** a `ValueError` if a program may raise an Equinox error."""
    for eqn in jaxpr.eqns:
        function = getattr(eqn.params.get("callback"), "callback_func", None)
        if "equinox" in getattr(function, "__module__", ""):
            raise ValueError(
                "`objective` must not raise errors, such as those of Equinox, Lineax "
                "and `ArgminSolver`, from within a step on several devices: the other "
                "devices would wait forever. Set `EQX_ON_ERROR=nan` in the "
                "environment: NaN stops the run instead."
            )
        for inner in jex.jaxprs_in_params(eqn.params):
            _check_errors(inner)


def copy_arrays(tree: PyTree) -> PyTree:
    """Copies arrays, which may then be donated, or outlive a loop that donates."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        # Unlike `jnp.copy`, this compiles nothing.
        return jax.device_put(tree, may_alias=False)
    return _copy(tree)


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class _Structure(NamedTuple):
    structure: Any
    others: tuple[Any, ...]


def _flatten(tree: PyTree) -> tuple[_Structure, list[Array]]:
    leaves, structure = jax.tree.flatten(tree)
    others = tuple(None if eqx.is_array(x) else x for x in leaves)
    return _Structure(structure, others), [x for x in leaves if eqx.is_array(x)]


def _unflatten(structure: _Structure, arrays: list[Array]) -> PyTree:
    remaining = iter(arrays)
    leaves = [next(remaining) if x is None else x for x in structure.others]
    return jax.tree.unflatten(structure.structure, leaves)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(structures, state_arrays, problem_arrays, data_arrays):
    problem, state, data = map(
        _unflatten, structures, (problem_arrays, state_arrays, data_arrays)
    )
    new_state, metrics = problem.step(state, data)
    values = [x.astype(jnp.result_type(float)) for x in metrics.values()]
    return jax.tree.leaves(new_state), Record(jnp.stack(values), tuple(metrics))
