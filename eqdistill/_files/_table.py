"""The table of what a file can rebuild: one entry for each class or function. An object
becomes a JSON object `{"class": name, field: value, ...}`, and its arrays are stored
under the paths of their fields."""

import functools as ft
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array

from .. import nn, recipes
from .._classifier import LogisticRegression, takes_pixels
from .._data._distilled_set import DistilledSet
from .._data._packed import Packed
from .._data._preprocessing import Standardisation, ZCA
from .._inner._argmin_solver import ArgminSolver
from .._inner._auto_solver import AutoSolver
from .._inner._feature_regression import FeatureRegression
from .._inner._relative_ridge import RelativeRidge
from .._inner._ridge_solver import RidgeSolver
from .._inner._span_solver import SpanSolver
from .._inner._unrolled_solver import UnrolledSolver
from .._losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from .._models._models import Fixed, Fresh
from .._outer._recipes import _relabel, _unchanged
from ..recipes import Recipe
from ._recipe_arrays import fill, named_arrays, regression_settings


MAX_BYTES = 2**30
_MAX_DEPTH = 8
_ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh")
_LAYERS = ("instance_norm", "group_norm", "average_pool", "max_pool")
_FUNCTIONS = {name: getattr(jax.nn, name) for name in _ACTIVATIONS}
_FUNCTIONS |= {name: getattr(nn, name) for name in _LAYERS}
_FUNCTIONS |= {"_unchanged": _unchanged}
_OPTIMISERS = ("adagrad", "adam", "adamw", "lion", "nadam", "rmsprop", "sgd")


class NotInTable(ValueError):
    """Raised for an object, or the name of a class, that is not registered."""


def check(ok: Any, reason: str) -> None:
    if not ok:
        raise ValueError(reason)


class Content:
    """The arrays of a file of `size` bytes, and the memory that is left for what is
    built from it: 16 times the size, for images enlarged fourfold, and 16 MiB."""

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
    rebuild it: a loss, a parameterisation, a preprocessing or an inner solver.

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
    - `read`: the fields of an object. Defaults to its attributes.
    - `nbytes`: the size of what `build` allocates, from the fields.
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
        tensors[path] = np.array(x, order="C")  # The writer ignores strides.
        return {"tensor": path}
    name = _name(x)
    if name not in TABLE:
        raise NotInTable(f"`{path}` is a `{name}`, which is not registered")
    values = TABLE[name].read(x)
    fields = {f: encode(values[f], f"{path}.{f}", tensors) for f in TABLE[name].fields}
    return {"class": name, **fields}


def _name(x: Any) -> str:
    if isinstance(x, Recipe) and x.name in TABLE:
        return x.name
    if takes_pixels(x):
        return "LogisticRegression"
    cls = x.func if isinstance(x, ft.partial) else type(x)
    names = (name for name, function in _FUNCTIONS.items() if x is function)
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
    is_number = wide.dtype.kind in "iu" or wide.dtype in (np.float32, np.float64)
    check(is_number, f"`{path}` must be integers, float32 or float64; got {wide.dtype}")
    problem = f"`{path}` must have at most 8 axes, none of them empty; got {wide.shape}"
    check(wide.size > 0 and wide.ndim <= 8, problem)
    with np.errstate(over="ignore", invalid="ignore"):
        x = wide.astype(jax.dtypes.canonicalize_dtype(wide.dtype))
    is_same = np.isfinite(x).all() if x.dtype.kind == "f" else (x == wide).all()
    check(is_same, f"`{path}` must be finite {x.dtype} numbers; some values are not")
    return jnp.asarray(x)


# Sets, losses and preprocessing.


def _build_set(images, labels, log_l2, loss) -> DistilledSet:
    n, is_soft = len(images), jnp.issubdtype(labels.dtype, jnp.floating)
    is_row = labels.ndim == 1 + is_soft and len(labels) == n
    check(is_row, f"labels must have {n} rows; got shape {labels.shape}")
    check(log_l2.shape == (), f"log_l2 must be a scalar; got shape {log_l2.shape}")
    check(is_soft or np.asarray(labels).min() >= 0, "labels must not be negative")
    # Set arrays afterwards: the constructor takes the ridge, and would round it.
    x = DistilledSet(images, np.zeros(n, np.int32), l2=1.0, loss=loss)
    return eqx.tree_at(lambda x: (x.labels, x.log_l2), x, (labels, log_l2))


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
    # width. Its peak is 40 bytes for each entry.
    sides = zip(small.images.shape[-2:], shape[-2:], strict=True)
    return 8 * len(small.images) * math.prod(shape) + 40 * sum(a * b for a, b in sides)


_LOGARITHM = (-87.0, 87.0)  # So that the exponential is a normal float32.
_set = {"images": Any, "labels": Any, "log_l2": _LOGARITHM, "loss": Any}
register(DistilledSet, _set, build=_build_set, nbytes=_bytes_of_one_hot)
register(CrossEntropy, {"log_temperature": _LOGARITHM}, build=_build_cross_entropy)
register(SquaredError, {})
register(BinaryCrossEntropy, {})
register(Packed, {"small": Any, "shape": (1, MAX_BYTES)}, nbytes=_bytes_of_packed)
register(Standardisation, {"mean": Any, "deviation": (1e-30, np.inf)})
register(ZCA, {"mean": Any, "whitening": Any, "regularisation": (0.0, 1e9)})

# Inner solvers.


def _read_unrolled(x: UnrolledSolver) -> dict[str, Any]:
    make = ft.partial(x.make)
    name = make.func.__name__
    is_known = name in _OPTIMISERS and make.func is getattr(optax, name)
    if make.args or not is_known:
        raise NotInTable(f"a file cannot rebuild the optimiser of `{make.func}`")
    return vars(x) | {"make": name, "options": make.keywords}


def _build_unrolled(make, options, log_hyperparameters, **values) -> UnrolledSolver:
    check(make in _OPTIMISERS, f"its optimiser must be one of {_OPTIMISERS}")
    make = getattr(optax, make)
    known = inspect.signature(make).parameters
    check(options.keys() <= known.keys(), f"its optimiser has no {sorted(options)}")
    are_plain = all(type(x) in (bool, int, float) for x in options.values())
    check(are_plain, f"the options of its optimiser must be numbers; got {options}")
    are_arrays = all(map(eqx.is_inexact_array, log_hyperparameters.values()))
    check(are_arrays, "its hyperparameters must be arrays")
    make = ft.partial(make, **options) if options else make
    # Set arrays afterwards: the constructor takes their exponentials, and would round.
    solver = UnrolledSolver(make, dict.fromkeys(log_hyperparameters, 1.0), **values)
    return eqx.tree_at(lambda x: x.log_hyperparameters, solver, log_hyperparameters)


_tolerance, _steps = (0.0, 1.0), (1, 1_000_000)
_unrolled = dict.fromkeys(("make", "options", "log_hyperparameters", "shuffle"), Any)
_unrolled |= {"steps": _steps, "batch_size": (1, 100_000)}
register(AutoSolver, {})
register(RidgeSolver, {})
register(RelativeRidge, {"inner": Any})
register(SpanSolver, {"rtol": _tolerance, "atol": _tolerance, "max_steps": _steps})
register(ArgminSolver, {"max_steps": _steps, "tolerance": _tolerance})
register(FeatureRegression, {"training": Any})
register(UnrolledSolver, _unrolled, build=_build_unrolled, read=_read_unrolled)


# Models.


def _read_regression(x) -> dict[str, Any]:
    arrays = named_arrays(x.head)
    is_zero = not any(x.any() for x in arrays.values())
    return {**regression_settings(x), "head": None if is_zero else arrays}


def _build_regression(dtype, head, **sizes):
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    model = LogisticRegression(**sizes, dtype=dtype)
    if head is None:
        return model
    return eqx.tree_at(lambda x: x.head, model, fill("head", model.head, head))


def _read_network(x: nn.Network) -> dict[str, Any]:
    return {"make": _constructor(x), "arrays": named_arrays(x)}


def _build_network(make, arrays) -> nn.Network:
    return fill("arrays", eqx.filter_eval_shape(make, key=jr.key(0)), arrays)


def _find_make(models: Any) -> ft.partial:
    """The constructor of `eqdistill.nn` for the networks of an [`eqdistill.Fresh`][].
    Raises [`NotInTable`][] for other models."""
    draw = lambda key: models.draw(models.init(None, key=key), key=key)
    network = eqx.filter_eval_shape(draw, jr.key(0))
    if not isinstance(network, nn.Network):
        raise NotInTable(f"a file cannot rebuild a `{type(network).__name__}`")
    return _constructor(network)


def _constructor(network: nn.Network) -> ft.partial:
    return ft.partial(getattr(nn, network.architecture), **dict(network.settings))


def _settings(function: Callable) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {name: _SETTINGS.get(name, Any) for name in names if name != "key"}


_SETTINGS: dict[str, Any] = dict.fromkeys(("in_features", "shape"), (1, MAX_BYTES))
_SETTINGS |= {"num_classes": (1, 2**16), "widths": (1, 512, 8), "size": (1, 64)}
_SETTINGS |= {"learning_rates": (0.0, 1e9), "momentum": (0.0, 1.0)}
_SETTINGS |= {"batch_size": (1, 100_000), "updates": (2, 100_000)}
_SETTINGS |= {"seed": (0, 2**31 - 1)}
register(
    LogisticRegression,
    _settings(LogisticRegression) | {"head": Any},
    build=_build_regression,
    read=_read_regression,
    nbytes=lambda in_features, num_classes, **_: 8 * (in_features + 1) * num_classes,
)
register(
    nn.Network,
    dict.fromkeys(("make", "arrays"), Any),
    build=_build_network,
    read=_read_network,
)
register(Fixed, {"model": Any})
register(Fresh, {"make": Any}, read=lambda x: {"make": _find_make(x)})
register(Recipe, {"models": Any, "inner": Any})
for _key, _function in _FUNCTIONS.items():
    TABLE[_key] = Entry({}, lambda f=_function: f, lambda _: {}, lambda: 0)
for _make in (nn.ConvNet, nn.LeNet, nn.MLP, nn.AlexNet, nn.VGG11, nn.ResNet18):
    # Stored as the constructor of the network, a `functools.partial` of all settings.
    build = ft.partial(ft.partial, _make)
    register(_make, _settings(_make), build=build, read=lambda x: x.keywords)
register(
    _relabel,
    {"hard": Any, "weight_decay": (0.0, 1.0)},
    build=lambda hard, weight_decay: ft.partial(_relabel, hard, weight_decay),
    read=lambda x: dict(zip(("hard", "weight_decay"), x.args, strict=True)),
)
for _recipe in (
    *(recipes.dc, recipes.frepo, recipes.zero_start, recipes.feature_regression),
    *(recipes.supervised, recipes.learned_rates),
):
    # Stored as the arguments of the function that returns the recipe.
    read = lambda x: {"make": _find_make(x.models), **dict(x.settings)}
    register(_recipe, _settings(_recipe), read=read)
