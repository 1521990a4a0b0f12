import dataclasses
import enum
import functools
import hashlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np


_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.dtype, enum.Enum)


def fingerprint(**parts: Any) -> dict[str, str]:
    """What modules, functions and arrays consist of, each under the path to it, in
    words that are the same in another process: a digest of large arrays, and the
    settings that a function holds in its closure, as the optimisers of Optax do.

    **Arguments:**

    - `parts`: what to describe. Its names begin the paths.
    """
    found = {}
    for name, part in parts.items():
        _describe(part, name, found, ())
    return found


def differences(wanted: dict[str, str], got: dict[str, str]) -> str | None:
    """Where two fingerprints differ, in words; or `None` if they do not."""
    lines = [
        f"`{path}`: {got.get(path, 'nothing')} in the checkpoint, "
        f"{wanted.get(path, 'nothing')} here"
        for path in {**wanted, **got}
        if wanted.get(path) != got.get(path)
    ]
    if not lines:
        return None
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def digest(x: np.ndarray) -> str:
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return hashlib.blake2b(data.data, digest_size=8).hexdigest()


def _describe(x: Any, path: str, found: dict[str, str], above: tuple[int, ...]) -> None:
    if isinstance(x, _PLAIN):
        # Some schedules of Optax turn an integer into a float when they are traced.
        if isinstance(x, float) and x.is_integer():
            x = int(x)
        found[path] = repr(x)
        return
    if isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        found[path] = _describe_array(x)
        return
    found[path] = _name_of(x)
    if id(x) in above:  # A function that calls itself.
        return
    for name, part in _parts(x):
        _describe(part, f"{path}.{name}", found, (*above, id(x)))


def _describe_array(x: Any) -> str:
    text = f"{x.dtype} of shape {x.shape}"
    if isinstance(x, jax.ShapeDtypeStruct):
        return text
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return f"{text} and data {np.asarray(jr.key_data(x)).tolist()}"
    x = np.asarray(x)
    return f"{text} and value {x}" if x.ndim == 0 else f"{text} and digest {digest(x)}"


def _name_of(x: Any) -> str:
    named = x if isinstance(x, type) or hasattr(x, "__qualname__") else type(x)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"


def _parts(x: Any) -> list[tuple[str, Any]]:
    """What a container, a module or a function holds, with its names."""
    if isinstance(x, type):
        return []
    if isinstance(x, dict):
        return sorted((str(key), part) for key, part in x.items())
    if isinstance(x, tuple | list):
        names = getattr(x, "_fields", range(len(x)))
        return [(str(name), part) for name, part in zip(names, x, strict=True)]
    if isinstance(x, set | frozenset):
        return [(str(i), part) for i, part in enumerate(sorted(map(repr, x)))]
    if dataclasses.is_dataclass(x):
        fields = [field.name for field in dataclasses.fields(x)]
        return [(name, getattr(x, name, None)) for name in fields]
    if isinstance(x, functools.partial):
        return [("function", x.func), *_parts(x.args), *_parts(x.keywords)]
    if isinstance(x, types.MethodType):
        return [("self", x.__self__), *_parts(x.__func__)]
    if hasattr(x, "__wrapped__"):
        return [("function", x.__wrapped__)]
    if isinstance(x, types.FunctionType):
        return _parts_of_function(x)
    return []


def _parts_of_function(x: types.FunctionType) -> list[tuple[str, Any]]:
    code = x.__code__
    cells = [cell.cell_contents for cell in x.__closure__ or () if _is_full(cell)]
    return [
        *zip(code.co_freevars, cells, strict=False),
        # The numbers in its code, such as the rate of decay of a schedule.
        *((f"number{i}", c) for i, c in enumerate(code.co_consts) if type(c) is float),
        *((f"default{i}", part) for i, part in enumerate(x.__defaults__ or ())),
        *sorted((x.__kwdefaults__ or {}).items()),
    ]


def _is_full(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
