"""The table of what a file can rebuild: one entry for each class or function.

An object becomes a JSON object `{"class": name, field: value, ...}`. Its arrays are
stored next to the JSON, each under the path of its field.
"""

import functools as ft
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from .. import nn, recipes
from .._classifier import LogisticRegression, takes_pixels
from .._data._distilled_set import DistilledSet
from .._data._packed import Packed
from .._data._preprocessing import Standardisation, ZCA
from .._inner._argmin_solver import ArgminSolver
from .._inner._auto_solver import AutoSolver
from .._inner._inner_solver import AbstractInnerSolver
from .._inner._relative_ridge import RelativeRidge
from .._inner._ridge_solver import RidgeSolver
from .._inner._span_solver import SpanSolver
from .._losses import AbstractLoss, CrossEntropy, SquaredError
from .._models._models import AbstractModels, Fixed, Fresh
from ..recipes import Recipe
from ._describe import describe


MAX_BYTES = 2**30
_MAX_DEPTH = 8


class NotInTable(ValueError):
    """Raised for an object, or the name of a class, that the table does not have."""


def check(ok: bool | np.bool_, reason: str) -> None:
    if not ok:
        raise ValueError(reason)


class Content:
    """The arrays of a file of `size` bytes, and the memory that is left for what is
    built from it: 16 times the size, for images enlarged fourfold, and 16 MiB."""

    def __init__(self, tensors: dict[str, np.ndarray], size: int):
        self.tensors = dict(tensors)
        self.distilled: Any = None  # Set once it is built.
        self.room = min(16 * size, MAX_BYTES) + 2**24

    def reserve(self, path: str, nbytes: int) -> None:
        self.room -= nbytes
        check(
            self.room >= 0, f"`{path}` would take {nbytes} bytes, too many for a file"
        )


class Entry(NamedTuple):
    fields: Mapping[str, Any]
    build: Callable[..., Any]
    read: Callable[[Any], Mapping[str, Any]]
    nbytes: Callable[..., int]


TABLE: dict[str, Entry] = {}


def register(
    cls: Callable[..., Any],
    fields: Mapping[str, Any],
    *,
    build: Callable[..., Any] | None = None,
    read: Callable[[Any], Mapping[str, Any]] | None = None,
    nbytes: Callable[..., int] = lambda **_: 0,
) -> None:
    """Lets [`eqdistill.save`][] store a class of your own and [`eqdistill.load`][]
    rebuild it: a loss, a parameterisation, a preprocessing or an inner solver.

    !!! Example

        ```python
        register(Huber, {"width": (0.0, 1e3)})  # Huber(width=1.0)
        ```

    A file stores the name of the class and its fields, but no code. A program that
    loads the file must import the module that registers the class.

    **Arguments:**

    - `cls`: the class.
    - `fields`: the arguments of its constructor, which are also its attributes. Each
        name is mapped to what is allowed: `jax.Array` for finite floating-point or
        integer values, `(low, high)` for a number of the type of these bounds,
        `[(low, high), most]` for a tuple of at most so many numbers, `bool`, `str`, a
        class that a registered object must be an instance of, or a `dict` of named
        objects. `(low, high, None)` and `jax.Array | None` also allow `None`.

    All other arguments are keyword only.

    - `build`: rebuilds an object from its fields. Defaults to `cls`. Files may come
        from strangers, so it must raise an error for invalid fields.
    - `read`: the fields of an object. Defaults to its attributes.
    - `nbytes`: the size of the object that `build` returns, beyond its fields.
    """
    read_ = lambda x: {name: getattr(x, name) for name in fields}
    TABLE[cls.__name__] = Entry(fields, build or cls, read or read_, nbytes)


def encode(x: Any, allowed: Any, path: str, tensors: dict[str, np.ndarray]) -> Any:
    """The value of a field as JSON. Its arrays are added to `tensors`.

    **Raises:**

    A [`NotInTable`][] error if a file cannot hold the value.
    """
    if isinstance(allowed, dict):
        names = [name for name, option in allowed.items() if option is x]
        return names[0] if names else repr(x)
    if eqx.is_array(x) or isinstance(x, np.ndarray):
        tensors[path] = np.array(x, order="C")  # The writer ignores strides.
        return path
    if isinstance(x, tuple | dict):
        return [*x] if isinstance(x, tuple) else x
    if x is None or type(x) in (bool, int, float, str):
        return x
    name = _name(x)
    if name not in TABLE:
        raise NotInTable(f"`{path}` is a `{name}`, which a file cannot rebuild")
    return {"class": name} | encode_fields(x, TABLE[name], path, tensors)


def encode_fields(x: Any, entry: Entry, path: str, tensors: dict) -> dict[str, Any]:
    values = entry.read(x)
    return {
        name: encode(values[name], allowed, _join(path, name), tensors)
        for name, allowed in entry.fields.items()
    }


def _name(x: Any) -> str:
    if isinstance(x, ft.partial):
        return x.func.__name__
    if isinstance(x, Recipe) and hasattr(recipes, x.name):
        return x.name
    return "LogisticRegression" if takes_pixels(x) else type(x).__name__


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def decode(raw: Any, allowed: Any, path: str, content: Content) -> Any:
    """The inverse of [`encode`][].

    **Raises:**

    A `ValueError` if the value is not allowed, or [`NotInTable`][] for the name of a
    class that is not registered.
    """
    if isinstance(allowed, types.UnionType):
        allowed = None if raw is None else allowed.__args__[0]
    if isinstance(allowed, tuple) and len(allowed) == 3:
        allowed = None if raw is None else allowed[:2]
    if allowed is None:
        return None
    if isinstance(allowed, types.FunctionType):
        return allowed(raw, path, content)
    if allowed is jax.Array:
        return _decode_array(raw, path, content)
    if isinstance(allowed, type) and allowed not in (bool, str):
        return _decode_object(raw, allowed, path, content)
    check(_is_allowed(raw, allowed), f"`{path}` must be {_words(allowed)}; got {raw!r}")
    if isinstance(allowed, dict):
        return allowed[raw]
    if isinstance(allowed, list):
        return tuple(map(type(allowed[0][0]), raw))
    # JSON does not distinguish 1.0 from 1.
    return type(allowed[0])(raw) if isinstance(allowed, tuple) else raw


def _is_allowed(raw: Any, allowed: Any) -> bool:
    if isinstance(allowed, dict):
        return type(raw) is str and raw in allowed
    if isinstance(allowed, list):
        item, most = allowed
        are_allowed = type(raw) is list and all(_is_allowed(x, item) for x in raw)
        return are_allowed and len(raw) <= most
    if isinstance(allowed, type):
        return type(raw) is allowed
    low, high = allowed
    types = (int,) if type(low) is int else (int, float)
    return type(raw) in types and low <= raw <= high


def _words(allowed: Any) -> str:
    if isinstance(allowed, dict):
        return f"one of {', '.join(allowed)}"
    if isinstance(allowed, list):
        return f"a list of at most {allowed[1]}, each {_words(allowed[0])}"
    if isinstance(allowed, type):
        return f"a {allowed.__name__}"
    kind = "an integer" if type(allowed[0]) is int else "a number"
    return f"{kind} from {allowed[0]} to {allowed[1]}"


def _decode_array(raw: Any, path: str, content: Content) -> Array:
    has_it = raw == path and path in content.tensors
    check(has_it, f"`{path}` must be the name of a tensor; got {raw!r}")
    wide = content.tensors.pop(path)
    with np.errstate(over="ignore", invalid="ignore"):
        x = wide.astype(jax.dtypes.canonicalize_dtype(wide.dtype))
    is_same = np.isfinite(x).all() if x.dtype.kind == "f" else (x == wide).all()
    check(is_same, f"`{path}` must be finite numbers of dtype {x.dtype}; some are not")
    return jnp.asarray(x)


def _decode_object(raw: Any, kind: type, path: str, content: Content) -> Any:
    check(path.count(".") <= _MAX_DEPTH, f"`{path}` is nested too deeply")
    is_object = type(raw) is dict and type(raw.get("class")) is str
    check(is_object, f"`{path}` must be an object with a `class`; got {raw!r}")
    name = raw["class"]
    if name not in TABLE:
        raise NotInTable(f"`{path}` is of the class {name!r}, which is not registered")
    fields = {key: x for key, x in raw.items() if key != "class"}
    x = decode_fields(fields, TABLE[name], path, content)
    check(isinstance(x, kind), f"`{path}` must be a {kind.__name__}; got a {name}")
    return x


def decode_fields(
    raw: dict[str, Any], entry: Entry, path: str, content: Content
) -> Any:
    wanted = sorted(entry.fields)
    check(
        sorted(raw) == wanted,
        f"the fields of `{path}` must be {wanted}; got {sorted(raw)}",
    )
    values = {
        name: decode(raw[name], allowed, _join(path, name), content)
        for name, allowed in entry.fields.items()
    }
    try:
        content.reserve(path, int(entry.nbytes(**values)))
        return entry.build(**values)
    except Exception as e:  # Whatever a hostile file may cause.
        raise ValueError(f"`{path}`: {e}") from e


def to_words(raw: Any) -> str:
    """The JSON of an object as a call, such as `RelativeRidge(inner=RidgeSolver())`."""
    if type(raw) is not dict or "class" not in raw:
        return repr(raw)
    fields = (f"{k}={to_words(x)}" for k, x in raw.items() if k != "class")
    return f"{raw['class']}({', '.join(fields)})"


# Sets, losses and preprocessing.


def _build_set(images, labels, log_l2, loss) -> DistilledSet:
    is_soft, n = jnp.issubdtype(labels.dtype, jnp.floating), len(images)
    is_row = labels.ndim == 1 + is_soft and len(labels) == n
    check(is_row, f"labels must have {n} rows; got shape {labels.shape}")
    check(is_soft or labels.min() >= 0, "class indices must not be negative")
    _check_logarithm(log_l2)
    # Set arrays afterwards: the constructor takes the ridge, and would round it.
    x = DistilledSet(images, np.zeros(n, np.int32), l2=1.0, loss=loss)
    return eqx.tree_at(lambda x: (x.labels, x.log_l2), x, (labels, log_l2))


def _bytes_of_one_hot(images, labels, **_) -> int:
    is_soft = jnp.issubdtype(labels.dtype, jnp.floating)
    return 0 if is_soft else 8 * len(images) * (int(labels.max()) + 1)


def _build_cross_entropy(log_temperature) -> CrossEntropy:
    if log_temperature is None:
        return CrossEntropy()
    _check_logarithm(log_temperature)
    where = lambda x: x.log_temperature
    return eqx.tree_at(where, CrossEntropy(1.0), log_temperature)


def _check_logarithm(x: Array) -> None:
    # The exponential of a larger or smaller number is not a normal float32.
    is_scalar = x.shape == () and jnp.issubdtype(x.dtype, jnp.floating)
    check(is_scalar and abs(x) <= 87, f"logarithms must be from -87 to 87; got {x}")


def _bytes_of_packed(small, shape) -> int:
    # Interpolation makes a matrix from the small to the large height, and one for the
    # width. Its peak is 40 bytes for each entry.
    sides = zip(small.images.shape[-2:], shape[-2:], strict=False)
    return 8 * len(small.images) * math.prod(shape) + 40 * sum(a * b for a, b in sides)


register(
    DistilledSet,
    {"images": Array, "labels": Array, "log_l2": Array, "loss": AbstractLoss},
    build=_build_set,
    nbytes=_bytes_of_one_hot,
)
register(CrossEntropy, {"log_temperature": Array | None}, build=_build_cross_entropy)
register(SquaredError, {})
register(
    Packed,
    {"small": DistilledSet, "shape": [(1, MAX_BYTES), 3]},
    nbytes=_bytes_of_packed,
)
register(Standardisation, {"mean": Array, "deviation": Array})
register(ZCA, {"mean": Array, "whitening": Array, "regularisation": (0.0, 1e9)})

# Inner solvers.
_tolerance, _steps = (0.0, 1.0, None), (1, 1_000_000)
register(AutoSolver, {})
register(RidgeSolver, {})
register(RelativeRidge, {"inner": AbstractInnerSolver})
register(SpanSolver, {"rtol": _tolerance, "atol": _tolerance, "max_steps": _steps})
register(ArgminSolver, {"max_steps": _steps, "tolerance": (0.0, 1.0)})


# Models.


def _image_shape(raw, path, content):
    wanted = content.distilled.images.shape[1:]
    check(raw == [*wanted], f"`{path}` must be {wanted}, as its images; got {raw!r}")
    return wanted


def _num_classes(raw, path, content):
    labels = content.distilled.labels
    least = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    decode(raw, (least, 2**20), path, content)
    content.reserve(path, 8 * len(labels) * raw)  # One-hot labels.
    return raw


def _build_regression(in_features, num_classes, use_intercept, dtype):
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return LogisticRegression(
        in_features, num_classes, use_intercept=use_intercept, dtype=dtype
    )


register(
    LogisticRegression,
    {
        "in_features": (1, MAX_BYTES),
        "num_classes": _num_classes,
        "use_intercept": bool,
        "dtype": {x: np.dtype(x) for x in ("float32", "float64")},
    },
    build=_build_regression,
    read=lambda x: {
        "in_features": x.head.in_features,
        "num_classes": x.head.out_features,
        "use_intercept": x.head.use_bias,
        "dtype": x.head.weight.dtype,
    },
    nbytes=lambda in_features, num_classes, **_: 8 * (in_features + 1) * num_classes,
)
register(Fixed, {"model": eqx.Module})
register(Fresh, {"make": ft.partial}, read=lambda x: {"make": _architecture(x)})

_widths = [(1, 512), 8]
_norms = {"None": None, "instance_norm": nn.instance_norm, "group_norm": nn.group_norm}
_names = ("relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh")
_activations = {name: getattr(jax.nn, name) for name in _names}
_pools = {"average_pool": nn.average_pool, "max_pool": nn.max_pool}


def _register_network(function: Callable, **fields: Any) -> None:
    """A network is stored as its constructor, a `functools.partial` of all settings."""
    sizes = {"shape": _image_shape, "num_classes": _num_classes}
    fields = {**sizes, "activation": _activations, **fields}
    build = ft.partial(ft.partial, function)
    register(function, fields, build=build, read=lambda x: x.keywords)


_register_network(
    nn.ConvNet,
    widths=_widths,
    norm=_norms,
    norm_last=bool,
    pool=_pools,
    size=(1, 64, None),
)
_register_network(nn.LeNet)
_register_network(nn.MLP, widths=_widths)
_register_network(nn.AlexNet, norm=_norms)
_register_network(nn.VGG11, norm=_norms)
_register_network(nn.ResNet18, norm=_norms)


def _architecture(models: Any) -> ft.partial:
    """The constructor of `eqdistill.nn` for the networks of an [`eqdistill.Fresh`][].

    **Raises:**

    A [`NotInTable`][] error for other models.
    """
    make = models.make if isinstance(models, Fresh) else lambda key: models
    network = eqx.filter_eval_shape(lambda: make(key=jr.key(0)))
    if not isinstance(network, nn.Network):
        raise NotInTable(f"a file cannot rebuild a `{type(network).__name__}`")
    return ft.partial(getattr(nn, network.architecture), **dict(network.settings))


# Recipes.


def _register_recipe(function: Callable, **fields: Any) -> None:
    """A published recipe is stored as the arguments of its function."""
    read = lambda x: {"make": _architecture(x.models), **dict(x.settings)}
    register(function, {"make": ft.partial, **fields}, read=read)


_updates = (2, 100_000)
_register_recipe(recipes.dc, updates=_updates, augment=bool)
_register_recipe(recipes.frepo, updates=_updates, augment=bool)
_register_recipe(recipes.zero_start, updates=_updates)
_register_recipe(recipes.feature_regression, updates=_updates)
_register_recipe(recipes.supervised, updates=_updates, batch_size=_updates)
_register_recipe(
    recipes.learned_rates,
    learning_rates=[(0.0, 1e9), 100_000],
    batch_size=(1, 100_000),
    momentum=(0.0, 1.0),
    adam=bool,
    seed=(0, 2**31 - 1, None),
)
register(Recipe, {"models": AbstractModels, "inner": AbstractInnerSolver})


def is_same_recipe(recipe: Recipe, other: Recipe) -> bool:
    """Whether two recipes make and train the same models."""
    prepare, other_prepare = (describe(f=x.prepare) for x in (recipe, other))
    models = [_trace(x.models) for x in (recipe, other)]
    is_same = prepare == other_prepare and eqx.tree_equal(recipe.inner, other.inner)
    return bool(is_same and eqx.tree_equal(*models))


def _trace(models: AbstractModels) -> Any:
    """The program that makes models; or a model, without the values of its arrays."""
    if not isinstance(models, Fresh):
        return eqx.filter_eval_shape(lambda: models)
    make = eqx.filter_make_jaxpr(lambda key: models.make(key=key))
    program, out, static = make(jr.key(0))
    return str(program.jaxpr), program.consts, out, static
