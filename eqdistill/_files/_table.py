"""The table of what a file can rebuild: one entry for each class or function. An object
becomes a JSON object `{"class": name, field: value, ...}`, and its arrays are stored
under the paths of their fields."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .. import nn
from .._classifier import takes_pixels
from .._data._class_names import check_class_names, count_classes
from .._data._distilled_set import DistilledSet
from .._data._packed import Packed
from .._data._preprocessing import Standardisation, ZCA
from .._data._pyramid import Pyramid
from .._losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from .._outer._recipes import _unchanged
from ..recipes import Recipe


MAX_BYTES = 2**30
_MAX_DEPTH = 8
_FLOATS = (np.float16, np.float32, np.float64)
_ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh")
_LAYERS = ("instance_norm", "group_norm", "average_pool", "max_pool")
FUNCTIONS = {name: getattr(jax.nn, name) for name in _ACTIVATIONS}
FUNCTIONS |= {name: getattr(nn, name) for name in _LAYERS}
FUNCTIONS |= {"_unchanged": _unchanged}


class NotInTable(ValueError):
    """Raised for an object, or the name of a class, that is not registered."""


def check(ok: Any, reason: str) -> None:
    if not ok:
        raise ValueError(reason)


class Content:
    """The arrays of a file of `size` bytes, and the memory left for the objects built
    from it: 16 times the size, for images enlarged fourfold, plus 16 MiB."""

    def __init__(self, tensors: dict[str, np.ndarray], size: int):
        self.tensors, self.room = dict(tensors), min(16 * size, MAX_BYTES) + 2**24

    def reserve(self, path: str, nbytes: int) -> None:
        self.room -= nbytes
        problem = f"`{path}` would take {nbytes} bytes: too many for a file"
        check(self.room >= 0, problem)


class Entry(NamedTuple):
    fields: dict[str, Any]
    build: Callable[..., Any]
    read: Callable[[Any], dict[str, Any]]
    nbytes: Callable[..., int]


TABLE: dict[str, Entry] = {}


def register(
    cls: Callable,
    fields: dict[str, Any],
    *,
    build: Callable | None = None,
    read: Callable | None = None,
    nbytes: Callable[..., int] = lambda **_: 0,
) -> None:
    """Lets [`eqdistill.save`][] store a class of your own and [`eqdistill.load`][]
    rebuild it: a loss, a parameterisation, a preprocessing step or an inner solver.

    !!! Example
        ```python
        register(Huber, {"width": (0.0, 1e3)})  # stores Huber(width=1.0)
        ```

    A program that loads the file must import the module that registers the class.

    **Arguments:**

    - `cls`: the class.
    - `fields`: the arguments of its constructor, which are also its attributes. Each
        name is mapped to the range `(low, high)` of a number, of all numbers in a
        tuple, or of the values of an array; or to `typing.Any`, for other values and
        registered objects. `(low, high, most)` also limits the length of a tuple. All
        arrays must be finite.

    - `build`: rebuilds an object from its fields. Defaults to `cls`. It should raise an
        error for invalid fields, because files may come from strangers.
    - `read`: returns the fields of an object. Defaults to its attributes.
    - `nbytes`: returns the number of bytes that `build` allocates for these fields.
    """
    default = lambda x: {name: getattr(x, name) for name in fields}
    TABLE[cls.__name__] = Entry(fields, build or cls, read or default, nbytes)


def encode(x: Any, path: str, tensors: dict[str, np.ndarray]) -> Any:
    """Returns a value as JSON, and adds its arrays to `tensors`. Raises
    [`NotInTable`][] if a file cannot hold it."""
    if x is None or type(x) in (bool, int, float, str):
        return x
    if type(x) is dict:
        return {k: encode(item, f"{path}.{k}", tensors) for k, item in x.items()}
    if type(x) is tuple:
        return [encode(item, path, tensors) for item in x]
    if eqx.is_array(x):
        # The writer ignores strides.
        tensors[path] = _narrow(np.array(x, order="C"), path)
        return {"tensor": path}
    name = _name(x)
    if name not in TABLE:
        raise NotInTable(f"`{path}` is a `{name}`, which is not registered")
    values = TABLE[name].read(x)
    fields = {f: encode(values[f], f"{path}.{f}", tensors) for f in TABLE[name].fields}
    return {"class": name, **fields}


def _narrow(x: np.ndarray, path: str) -> np.ndarray:
    """Converts float32 images to float16, half the bytes, if no value changes."""
    check(x.dtype != np.float16, f"`{path}` must be float32 or float64; got float16")
    if x.dtype != np.float32 or x.ndim < 2:
        return x
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    return half if (half == x).all() else x


def _name(x: Any) -> str:
    if isinstance(x, Recipe) and x.name in TABLE:
        return x.name
    if takes_pixels(x):
        return "LogisticRegression"
    cls = x.func if isinstance(x, ft.partial) else type(x)
    names = (name for name, function in FUNCTIONS.items() if x is function)
    return next(names, getattr(cls, "__name__", ""))


def is_in_table(x: Any) -> bool:
    return _name(x) in TABLE


def decode(raw: Any, path: str, content: Content) -> Any:
    """The inverse of [`encode`][]. Raises [`NotInTable`][] for the name of a class that
    is not registered, and other errors if the JSON is invalid."""
    check(path.count(".") <= _MAX_DEPTH, f"`{path}` is nested too deeply")
    if type(raw) is list:
        are_plain = all(type(item) in (bool, int, float, str) for item in raw)
        check(are_plain, f"`{path}` must be a list of plain values; got {raw!r}")
        return tuple(raw)
    match raw:
        case {"class": str(name), **fields}:
            return _build(name, fields, path, content)
        case {"tensor": str(name)} if name == path and name in content.tensors:
            return to_array(content.tensors.pop(name), path)
        case dict():
            check("tensor" not in raw, f"`{path}` must not be {raw!r}")
            return {k: _decode_item(x, f"{path}.{k}", content) for k, x in raw.items()}
    return raw


def _decode_item(raw: Any, path: str, content: Content) -> Any:
    """An item of a dictionary: a plain value or an array."""
    if type(raw) in (bool, int, float, str):
        return raw
    is_tensor = raw == {"tensor": path} and path in content.tensors
    check(is_tensor, f"`{path}` must be a plain value or a tensor; got {raw!r}")
    return to_array(content.tensors.pop(path), path)


def _build(name: str, fields: dict[str, Any], path: str, content: Content) -> Any:
    if name not in TABLE:
        raise NotInTable(f"`{path}` is a {name!r}, which is not registered")
    entry = TABLE[name]
    problem = f"must have the fields {sorted(entry.fields)}; got {sorted(fields)}"
    check(fields.keys() == entry.fields.keys(), f"`{path}` {problem}")
    values = {f: decode(fields[f], f"{path}.{f}", content) for f in entry.fields}
    for field, allowed in entry.fields.items():
        x = values[field]
        is_allowed = allowed is Any or x is None or _is_in(x, *allowed)
        check(is_allowed, f"`{path}.{field}` must be from {allowed}; got {x!r}")
    content.reserve(path, int(entry.nbytes(**values)))
    return entry.build(**values)


def _is_in(x: Any, low: float, high: float, most: int = 100_000) -> bool:
    if eqx.is_array(x):
        return bool(((low <= x) & (x <= high)).all())
    types = (int,) if type(low) is int else (int, float)
    items = x if type(x) is tuple else (x,)
    are_in = all(type(item) in types and low <= item <= high for item in items)
    return are_in and len(items) <= most


def to_array(wide: np.ndarray, path: str) -> Array:
    is_number = wide.dtype.kind in "iu" or wide.dtype in _FLOATS
    check(is_number, f"`{path}` must be integers, float32 or float64; got {wide.dtype}")
    problem = f"`{path}` must have at most 8 axes, none of them empty; got {wide.shape}"
    check(wide.size > 0 and wide.ndim <= 8, problem)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = wide.astype(np.float32) if wide.dtype == np.float16 else wide
        x = wide.astype(jax.dtypes.canonicalize_dtype(wide.dtype))
    is_same = np.isfinite(x).all() if x.dtype.kind == "f" else (x == wide).all()
    check(is_same, f"`{path}` must be finite {x.dtype} numbers; some values are not")
    return jnp.asarray(x)


# Sets, losses and preprocessing.


def _build_set(images, labels, log_l2, log_weights, loss, class_names) -> DistilledSet:
    n, is_soft = len(images), jnp.issubdtype(labels.dtype, jnp.floating)
    is_row = labels.ndim == 1 + is_soft and len(labels) == n
    check(is_row, f"labels must have {n} rows; got shape {labels.shape}")
    check(log_l2.shape == (), f"log_l2 must be a scalar; got shape {log_l2.shape}")
    is_row = log_weights is None or log_weights.shape == (n,)
    check(is_row, f"log_weights must have {n} rows")
    check(is_soft or np.asarray(labels).min() >= 0, "labels must not be negative")
    check(type(class_names) in (tuple, type(None)), "class names must be a list")
    num_classes = count_classes(labels, class_names)
    names = check_class_names(class_names, num_classes)
    # Set arrays afterwards: the constructor takes the ridge, and would round it.
    hard = np.zeros(n, np.int32)
    x = DistilledSet(images, hard, l2=1.0, loss=loss, class_names=names)
    where = lambda x: (x.labels, x.log_l2, x.log_weights)
    values = labels, log_l2, log_weights
    return eqx.tree_at(where, x, values, is_leaf=lambda x: x is None)


def _bytes_of_one_hot(images, labels, **_) -> int:
    is_soft = jnp.issubdtype(labels.dtype, jnp.floating)
    return 0 if is_soft else 8 * len(images) * (int(np.asarray(labels).max()) + 1)


def _build_cross_entropy(log_temperature) -> CrossEntropy:
    if log_temperature is None:
        return CrossEntropy()
    check(log_temperature.shape == (), "log_temperature must be a scalar")
    return eqx.tree_at(lambda x: x.log_temperature, CrossEntropy(1.0), log_temperature)


def _bytes_of_packed(small, shape) -> int:
    # Interpolation makes a matrix from the small to the large height, and one for the
    # width. Its peak memory is 40 bytes for each entry.
    sides = zip(small.images.shape[-2:], shape[-2:], strict=True)
    return 8 * len(small.images) * math.prod(shape) + 40 * sum(a * b for a, b in sides)


def _bytes_of_pyramid(levels, shape) -> int:
    # As for `Packed`. A side of the finest level is less than the length of a row.
    sides = sum(min(levels.images.shape[1], side) * side for side in shape[-2:])
    return 8 * len(levels.images) * math.prod(shape) + 40 * sides


_LOGARITHM = (-87.0, 87.0)  # So that the exponential is a normal float32.
_set = {"images": Any, "labels": Any, "log_l2": _LOGARITHM, "loss": Any}
_set |= {"log_weights": _LOGARITHM, "class_names": Any}
register(DistilledSet, _set, build=_build_set, nbytes=_bytes_of_one_hot)
register(CrossEntropy, {"log_temperature": _LOGARITHM}, build=_build_cross_entropy)
register(SquaredError, {})
register(BinaryCrossEntropy, {})
register(Packed, {"small": Any, "shape": (1, MAX_BYTES)}, nbytes=_bytes_of_packed)
register(Pyramid, {"levels": Any, "shape": (1, MAX_BYTES)}, nbytes=_bytes_of_pyramid)
register(Standardisation, {"mean": Any, "deviation": (1e-30, np.inf)})
register(ZCA, {"mean": Any, "whitening": Any, "regularisation": (0.0, 1e9)})
