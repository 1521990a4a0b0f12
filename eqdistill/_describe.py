"""Descriptions of modules and functions that are the same in every process."""

import dataclasses
import enum
import functools
import types
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np


_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.dtype, enum.Enum)
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def describe(**parts: Any) -> dict[str, str]:
    """Describes each leaf of the given objects under its path. The paths begin with the
    names of the arguments.

    Closures are opened too, because they hold the settings of Optax's optimisers.
    Arrays are described by dtype and shape, and small arrays also by their values.
    """
    found = {}
    for name, part in parts.items():
        _describe(part, name, found, ())
    return found


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The differences between the descriptions of an earlier run and of this run."""
    return [
        f"`{path}` was {old.get(path, 'nothing')} and is {new.get(path, 'nothing')} now"
        for path in {**new, **old}
        if old.get(path) != new.get(path)
    ]


def _describe(x: Any, path: str, found: dict[str, str], above: tuple[int, ...]) -> None:
    if isinstance(x, _PLAIN):
        # Some of Optax's schedules convert an integer to a float when they are traced.
        if isinstance(x, float) and x.is_integer():
            x = int(x)
        found[path] = repr(x)
    elif isinstance(x, _ARRAYS):
        found[path] = f"{x.dtype} of shape {x.shape}"
        if x.size <= 8 and not isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
            is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            to_values: Any = jr.key_data if is_key else np.asarray
            found[path] += f" {to_values(x).tolist()}"
    elif id(x) not in above:  # Functions may refer to themselves.
        # Equinox sets the name of some modules to a `Missing`.
        has_name = isinstance(getattr(x, "__qualname__", None), str)
        named = x if has_name else type(x)
        found[path] = f"{named.__module__}.{named.__qualname__}"
        for name, part in _parts(x):
            _describe(part, f"{path}.{name}", found, (*above, id(x)))


def _parts(x: Any) -> list[tuple[str, Any]]:
    """The named parts of a container, a module or a function."""
    if isinstance(x, dict):
        return sorted((str(key), part) for key, part in x.items())
    if isinstance(x, tuple | list):
        names = getattr(x, "_fields", range(len(x)))
        return [(str(name), part) for name, part in zip(names, x, strict=True)]
    if isinstance(x, functools.partial):
        return [("function", x.func), *_parts(x.args), *_parts(x.keywords)]
    if isinstance(x, types.MethodType):
        return [("self", x.__self__), *_parts(x.__func__)]
    if hasattr(x, "__wrapped__"):
        return [("function", x.__wrapped__)]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = [field.name for field in dataclasses.fields(x)]
        return [(name, getattr(x, name, None)) for name in names]
    if type(x).__module__.startswith("optax."):  # Such as `optax.MultiSteps`.
        return sorted(vars(x).items())
    if not isinstance(x, types.FunctionType):
        return []
    closure = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
    constants = [c for c in x.__code__.co_consts if type(c) is float]
    return [
        *((name, _content(cell)) for name, cell in closure),
        *((f"number{i}", c) for i, c in enumerate(constants)),
        *((f"default{i}", part) for i, part in enumerate(x.__defaults__ or ())),
        *sorted((x.__kwdefaults__ or {}).items()),
    ]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # The variable is not set yet.
        return None
