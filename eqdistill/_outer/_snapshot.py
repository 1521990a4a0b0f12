import abc
import dataclasses
from collections.abc import Collection
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Float, PyTree

from ._data import AbstractData
from ._distill_state import DistillState
from ._problem import Problem


Own = TypeVar("Own")


class Snapshot(eqx.Module):
    """All that a run needs to go on.

    **Attributes:**

    - `state`: the state after the last step.
    - `rows`: what was measured in all steps so far.
    - `callbacks`: the states of the callbacks as [`to_plain`][] gives them, each under
        the name of its callback's class.
    - `has_stopped`: whether a callback has stopped the run.
    """

    state: DistillState
    rows: Float[np.ndarray, "steps 3"]
    callbacks: list[tuple[str, Any]]
    has_stopped: bool


class AbstractCheckpoints(eqx.Module, Generic[Own]):
    """Keeps snapshots of a run, from which the run goes on.

    **Attributes:**

    - `every`: a snapshot is saved after each step whose number is a multiple of this,
        and after the last step.
    """

    every: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init(self, problem: Problem, state: DistillState, steps: int) -> Own:
        """As that of an [`eqdistill.AbstractCallback`][]."""

    @abc.abstractmethod
    def restore(self, state: DistillState, own: Own) -> Snapshot | None:
        """**Arguments:**

        - `state`: a state of the same run, such as its first one.
        - `own`: what `init` has returned.

        **Returns:**

        The newest snapshot that is whole, or `None`.

        **Raises:**

        A `ValueError` if the snapshots are of another problem.
        """

    @abc.abstractmethod
    def save(self, snapshot: Snapshot, own: Own) -> None:
        """Saves a snapshot."""

    @abc.abstractmethod
    def is_asked_to_leave(self, own: Own) -> bool:
        """**Returns:**

        Whether the run is to be saved and left now, to go on another time.
        """

    @abc.abstractmethod
    def close(self, own: Own) -> None:
        """As that of an [`eqdistill.AbstractCallback`][]. Leaves the program if the run
        was asked to."""


_SCALARS = (bool, int, float, str, type(None))
_LISTS = {"list": list, "tuple": tuple}


def to_plain(x: Any, template: Any) -> Any:
    """The state of a callback as numbers, strings, NumPy arrays, lists and dicts.

    Real data and objects of the outside world, such as functions and files, are left
    out: a run that goes on takes them from a new state of the callback.

    **Arguments:**

    - `x`: the state.
    - `template`: the first state of the callback.

    **Raises:**

    A `ValueError` for a module or another object that the template does not have in the
    same place, and for other containers.
    """
    if type(x) in _SCALARS:
        return x
    if isinstance(x, np.ndarray | np.generic):
        return {"numpy": np.asarray(x), "is_scalar": isinstance(x, np.generic)}
    if isinstance(x, jax.Array):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return {"key": np.asarray(jr.key_data(x)), "impl": str(jr.key_impl(x))}
        return {"jax": np.asarray(x)}
    if type(x) in _LISTS.values():
        parts = [to_plain(part, _at(template, x, i)) for i, part in enumerate(x)]
        return {type(x).__name__: parts}
    if type(x) is dict and all(type(key) is str for key in x):
        parts = {k: to_plain(part, _at(template, x, k)) for k, part in x.items()}
        return {"dict": parts}
    is_module = isinstance(x, eqx.Module)
    name = type(x).__name__
    if not is_module and (isinstance(x, Collection) or dataclasses.is_dataclass(x)):
        raise ValueError(f"it holds a {name}")
    if type(x) is not type(template):
        raise ValueError(f"it holds a {name} where its first state has none")
    if is_module and not isinstance(x, AbstractData):
        parts = {
            field.name: to_plain(getattr(x, field.name), getattr(template, field.name))
            for field in dataclasses.fields(x)
            if not field.metadata.get("static", False)
        }
        return {"module": parts, "name": name}
    return {"object": name}


def from_plain(plain: Any, template: Any) -> Any:
    """The inverse of [`to_plain`][].

    **Arguments:**

    - `plain`: what that function has returned.
    - `template`: the first state of the callback.

    **Raises:**

    A `ValueError` if the template has another module or object in a place.
    """
    if type(plain) in _SCALARS:
        return plain
    kind, value = next(iter(plain.items()))
    if kind == "numpy":
        return value[()] if plain["is_scalar"] else value
    if kind == "key":
        return jr.wrap_key_data(jnp.asarray(value), impl=plain["impl"])
    if kind == "jax":
        return jnp.asarray(value)
    if kind in _LISTS:
        like = _LISTS[kind]()
        return _LISTS[kind](
            from_plain(part, _at(template, like, i)) for i, part in enumerate(value)
        )
    if kind == "dict":
        return {k: from_plain(part, _at(template, {}, k)) for k, part in value.items()}
    name = plain["name"] if kind == "module" else value
    if type(template).__name__ != name:
        raise ValueError(f"a {name}, where there is now a {type(template).__name__}")
    if kind == "object":
        return template
    new = object.__new__(type(template))
    for field in dataclasses.fields(template):
        old = getattr(template, field.name)
        there = field.name in value
        part = from_plain(value[field.name], old) if there else old
        object.__setattr__(new, field.name, part)
    return new


def _at(template: PyTree, like: Any, key: int | str) -> Any:
    """The part of a template, if it is there."""
    if type(template) is not type(like):
        return None
    try:
        return template[key]
    except LookupError:
        return None
