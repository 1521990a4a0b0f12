"""The table of classes that a file can hold and rebuild.

An object becomes a JSON record, `{"class": name, field: value, ...}`. Arrays are stored
next to the JSON, each under the path of its field.
"""

import abc
import dataclasses
import functools as ft
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from .. import nn, recipes
from .._classifier import LinearClassifier, LogisticRegression, takes_pixels
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
FINITE = (-np.inf, np.inf)
# A larger or smaller ridge or temperature is not a normal float32.
_LOGARITHM = (-87.0, 87.0)
_MAX_DEPTH = 8
_MAX_UPDATES = 100_000


class NotInTable(ValueError):
    """Raised for an object, or the name of a class, that the table does not have."""


def check(ok: bool | np.bool_, reason: str) -> None:
    if not ok:
        raise ValueError(reason)


class Content:
    """The arrays of a file while it is decoded, and the bytes that may be allocated."""

    def __init__(self, tensors: dict[str, np.ndarray], size: int):
        """`size` is the size of the file. Up to 16 times as much may be allocated, for
        images that are enlarged fourfold, and another 16 MiB."""
        self.unread = dict(tensors)
        self.distilled: DistilledSet | None = None  # Set once it is decoded.
        self._size = size
        self._room = min(16 * size, MAX_BYTES) + 2**24

    def reserve(self, path: str, nbytes: int) -> None:
        self._room -= nbytes
        check(
            self._room >= 0,
            f"`{path}` would take {nbytes} bytes, too many for a file of {self._size}",
        )


class AbstractField(eqx.Module):
    """How one field of a class is stored."""

    @abc.abstractmethod
    def encode(self, value: Any, path: str, tensors: dict[str, np.ndarray]) -> Any:
        """**Returns:**

        The value as JSON. Its arrays are added to `tensors`.

        **Raises:**

        A [`NotInTable`][] error if a file cannot hold the value.
        """

    @abc.abstractmethod
    def decode(self, raw: Any, path: str, content: Content) -> Any:
        """The inverse of `encode`.

        **Raises:**

        A `ValueError` if the JSON or an array is not what `encode` produces.
        """


class Plain(AbstractField):
    """A value that JSON can hold."""

    is_valid: Callable[[Any], bool]
    wanted: str
    to_json: Callable[[Any], Any] = lambda value: value
    from_json: Callable[[Any], Any] = lambda raw: raw

    def encode(self, value, path, tensors):
        raw = self.to_json(value)
        if not self.is_valid(raw):
            raise NotInTable(f"`{path}` must be {self.wanted}; got {raw!r}")
        return raw

    def decode(self, raw, path, content):
        check(self.is_valid(raw), f"`{path}` must be {self.wanted}; got {raw!r}")
        return self.from_json(raw)


def number(low: float, high: float) -> Plain:
    """A number of the type of the bounds."""
    types = (int,) if type(low) is int else (int, float)
    wanted = f"{'an integer' if type(low) is int else 'a number'} from {low} to {high}"
    # JSON does not distinguish 1.0 from 1.
    is_valid = lambda x: type(x) in types and low <= x <= high
    return Plain(is_valid, wanted, from_json=type(low))


def choice(options: Mapping[Any, Any]) -> Plain:
    """One of some named objects."""

    def to_json(value):
        return next((name for name, x in options.items() if x is value), repr(value))

    def is_valid(raw):
        return type(raw) in (str, bool, type(None)) and raw in options

    return Plain(is_valid, f"one of {list(options)}", to_json, options.__getitem__)


def items(of: Plain, most: int) -> Plain:
    """A tuple of plain values."""

    def is_valid(raw):
        return type(raw) is list and len(raw) <= most and all(map(of.is_valid, raw))

    return Plain(
        is_valid,
        f"a list of at most {most}, each {of.wanted}",
        to_json=list,
        from_json=lambda raw: tuple(map(of.from_json, raw)),
    )


flag = choice({True: True, False: False})
text = Plain(
    lambda x: type(x) is str and len(x) <= 2000, "text of at most 2000 characters"
)
texts = Plain(
    lambda x: type(x) is dict and all(map(text.is_valid, x.values())),
    "an object whose values are text",
)


class Optional(AbstractField):
    """A field that may be `None`."""

    field: AbstractField

    def encode(self, value, path, tensors):
        return None if value is None else self.field.encode(value, path, tensors)

    def decode(self, raw, path, content):
        return None if raw is None else self.field.decode(raw, path, content)


class FiniteArray(AbstractField):
    """An array of finite numbers in a range."""

    low: float = -np.inf
    high: float = np.inf

    def encode(self, value, path, tensors):
        # The writer ignores strides.
        tensors[path] = np.array(value, order="C")
        return path

    def decode(self, raw, path, content):
        check(raw == path, f"`{path}` must be the name of its tensor; got {raw!r}")
        check(path in content.unread, f"it has no tensor `{path}`")
        wide = content.unread.pop(path)
        with np.errstate(over="ignore", invalid="ignore"):
            x = wide.astype(jax.dtypes.canonicalize_dtype(wide.dtype))
        check(np.isfinite(x).all(), f"`{path}` must be finite; some values are not")
        low, high = wide.min(), wide.max()
        least, most = self.low, self.high
        if x.dtype.kind != "f":
            info = np.iinfo(x.dtype)
            least, most = max(least, info.min), min(most, info.max)
        check(
            least <= low and high <= most,
            f"`{path}` must be from {least} to {most}; got values from {low} to {high}",
        )
        return jnp.asarray(x)


class FromImages(AbstractField):
    """A value that follows from the distilled set, such as the shape of an image."""

    value: Callable[[DistilledSet], Any]

    def encode(self, value, path, tensors):
        return list(value) if isinstance(value, tuple) else value

    def decode(self, raw, path, content):
        value = self.value(content.distilled)
        wanted = self.encode(value, path, {})
        check(raw == wanted, f"`{path}` must be {wanted}, for its images; got {raw!r}")
        return value


class NumClasses(AbstractField):
    """The number of classes of a model that is trained on the distilled set."""

    def encode(self, value, path, tensors):
        return value

    def decode(self, raw, path, content):
        value = number(1, 2**20).decode(raw, path, content)
        images, labels = content.distilled.images, content.distilled.labels
        if labels.ndim == 2:
            least = most = labels.shape[1]
        else:
            least, most = int(labels.max()) + 1, 2**20
        check(
            least <= value <= most,
            f"`{path}` must be at least {least}, for its labels; got {value}",
        )
        content.reserve(path, images.dtype.itemsize * len(images) * value)
        return value


class Record(AbstractField):
    """An object with named fields."""

    fields: dict[str, AbstractField]
    build: Callable[..., Any] = dict
    nbytes: Callable[..., int] = lambda **_: 0

    def encode(self, values, path, tensors):
        return {
            name: field.encode(values[name], f"{path}.{name}".lstrip("."), tensors)
            for name, field in self.fields.items()
        }

    def decode(self, raw, path, content):
        found = sorted(raw) if type(raw) is dict else raw
        check(
            found == sorted(self.fields),
            f"`{path}` must have the fields {sorted(self.fields)}; got {found!r}",
        )
        values = {
            name: field.decode(raw[name], f"{path}.{name}".lstrip("."), content)
            for name, field in self.fields.items()
        }
        content.reserve(path, self.nbytes(**values))
        try:
            return self.build(**values)
        except (TypeError, ValueError) as e:
            raise ValueError(f"`{path}`: {e}") from e


class Entry(eqx.Module):
    """One class of the table. `read` returns the values of the fields of an object, or
    `None` unless the object can be rebuilt from them."""

    cls: Callable
    record: Record
    read: Callable[[Any], dict[str, Any] | None]


TABLE: dict[str, Entry] = {}


class Instance(AbstractField):
    """An object whose class is in the table."""

    kind: type

    def encode(self, value, path, tensors):
        for name, entry in TABLE.items():
            values = entry.read(value)
            if values is not None:
                return {"class": name, **entry.record.encode(values, path, tensors)}
        raise NotInTable(
            f"`{path}` is a `{type(value).__qualname__}` that a file cannot hold: see "
            "`eqdistill.register`"
        )

    def decode(self, raw, path, content):
        check(path.count(".") <= _MAX_DEPTH, f"`{path}` is nested too deeply")
        check(
            type(raw) is dict and type(raw.get("class")) is str,
            f"`{path}` must be an object with a `class`; got {raw!r}",
        )
        name = raw["class"]
        if name not in TABLE:
            raise NotInTable(
                f"`{path}` is of the class {name!r}, which is not registered: import "
                "the module that calls `eqdistill.register` for it"
            )
        fields = {key: value for key, value in raw.items() if key != "class"}
        x = TABLE[name].record.decode(fields, path, content)
        check(isinstance(x, self.kind), f"`{path}` cannot be a {name}")
        return x


def to_words(raw: Any) -> str:
    """The JSON of an object as a call, such as `RelativeRidge(inner=RidgeSolver())`."""
    if type(raw) is not dict or "class" not in raw:
        return repr(raw)
    fields = (f"{k}={to_words(v)}" for k, v in raw.items() if k != "class")
    return f"{raw['class']}({', '.join(fields)})"


def register(
    cls: type[eqx.Module],
    *,
    arrays: Mapping[str, tuple[float, float]] = {},
    numbers: Mapping[str, tuple[float, float]] = {},
    modules: Mapping[str, type] = {},
    check: Callable[[Any], None] = lambda x: None,
) -> None:
    """Lets [`eqdistill.save`][] store a class of your own, and [`eqdistill.load`][]
    rebuild it: a loss, a parameterisation, a preprocessing or an inner solver.

    !!! Example

        ```python
        class Huber(eqd.AbstractLoss):
            width: float = eqx.field(static=True, default=1.0)
            ...

        eqd.register(Huber, numbers={"width": (0.0, 1e3)})
        ```

    A file stores the name of the class and these fields, but no code. A program that
    loads it must import the module that registers the class.

    **Arguments:**

    - `cls`: an `equinox.Module`. Its `__init__` is not called: the fields are set, and
        those that are not listed take their defaults.

    All other arguments are keyword only.

    - `arrays`: the fields that hold arrays, with the range of their values. Arrays must
        be finite, and hold at least one value.
    - `numbers`: the fields that hold Python numbers, with their range. Integer bounds
        mean an integer. A field whose default is `None` may be `None`.
    - `modules`: the fields that hold registered classes, with a class that they must be
        instances of.
    - `check`: raises a `ValueError` if a loaded instance is invalid. Files may come from
        strangers: check the shapes, and how they fit together.

    **Raises:**

    A `ValueError` if another class of this name is registered.
    """
    optional = {f.name for f in dataclasses.fields(cls) if f.default is None}
    fields = {
        **{name: FiniteArray(*bounds) for name, bounds in arrays.items()},
        **{
            name: Optional(number(*bounds)) if name in optional else number(*bounds)
            for name, bounds in numbers.items()
        },
        **{name: Instance(kind) for name, kind in modules.items()},
    }
    _add(cls, fields, check)


def _add(
    cls: type[eqx.Module],
    fields: Mapping[str, AbstractField],
    check: Callable[[Any], None] = lambda x: None,
    nbytes: Callable[..., int] = lambda **_: 0,
) -> None:
    def build(**values):
        x = object.__new__(cls)
        for field in dataclasses.fields(cls):
            value = values.get(field.name, field.default)
            object.__setattr__(x, field.name, value)
        check(x)
        return x

    def read(x):
        if type(x) is not cls:
            return None
        values = {name: getattr(x, name) for name in fields}
        others = [f for f in dataclasses.fields(cls) if f.name not in fields]
        is_default = all(eqx.tree_equal(f.default, getattr(x, f.name)) for f in others)
        return values if is_default else None

    name = cls.__name__
    if name in TABLE and _full_name(TABLE[name].cls) != _full_name(cls):
        raise ValueError(f"`cls` must have a name that is not registered; got {name}.")
    TABLE[name] = Entry(cls, Record(dict(fields), build, nbytes), read)


def _full_name(cls: Any) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _check_set(x: DistilledSet) -> None:
    check(x.images.ndim >= 2, f"images must have shape (n, ...); got {x.images.shape}")
    is_soft, n = jnp.issubdtype(x.labels.dtype, jnp.floating), len(x.images)
    check(
        x.labels.ndim == (2 if is_soft else 1) and len(x.labels) == n,
        f"labels must have shape ({n}{', c' if is_soft else ','}); got "
        f"{x.labels.shape}",
    )
    check(is_soft or int(x.labels.min()) >= 0, "class indices must not be negative")
    check(x.log_l2.shape == (), f"log_l2 must be a scalar; got shape {x.log_l2.shape}")
    _check_floating(x.images, x.log_l2)


def _check_floating(*arrays: Array | None) -> None:
    for x in arrays:
        is_floating = x is None or jnp.issubdtype(x.dtype, jnp.floating)
        check(is_floating, f"arrays must be floating point; got {x}")


def _bytes_of_one_hot(images, labels, **_) -> int:
    is_soft = labels.dtype.kind == "f"
    return 0 if is_soft else images.dtype.itemsize * len(labels) * (labels.max() + 1)


def _bytes_of_interpolation(small: DistilledSet, shape: tuple[int, ...]) -> int:
    # Interpolation makes a matrix from the small to the large height, and one for the
    # width. Its peak is 40 bytes for each entry.
    sides = zip(small.images.shape[-2:], shape[-2:], strict=False)
    return 40 * sum(a * b for a, b in sides)


def _check_temperature(x: CrossEntropy) -> None:
    _check_floating(x.log_temperature)
    is_scalar = x.log_temperature is None or x.log_temperature.shape == ()
    check(is_scalar, "log_temperature must be a scalar")


def _check_standardisation(x: Standardisation) -> None:
    _check_floating(x.mean, x.deviation)
    check(
        x.mean.shape == x.deviation.shape and x.mean.size == len(x.mean),
        f"mean and deviation must have one shape, (channels, 1, 1); got {x.mean.shape} "
        f"and {x.deviation.shape}",
    )


def _check_zca(x: ZCA) -> None:
    _check_floating(x.mean, x.whitening)
    check(
        x.whitening.shape == (x.mean.size, x.mean.size),
        f"whitening must have one row for each pixel; got shape {x.whitening.shape}",
    )


_add(
    CrossEntropy,
    {"log_temperature": Optional(FiniteArray(*_LOGARITHM))},
    _check_temperature,
)
_add(SquaredError, {})
_add(
    DistilledSet,
    {
        "images": FiniteArray(),
        "labels": FiniteArray(),
        "log_l2": FiniteArray(*_LOGARITHM),
        "loss": Instance(AbstractLoss),
    },
    _check_set,
    _bytes_of_one_hot,
)
_add(
    Packed,
    {"small": Instance(DistilledSet), "shape": items(number(1, MAX_BYTES), 3)},
    lambda x: Packed(x.small, x.shape),  # Checks the shapes.
    _bytes_of_interpolation,
)
_add(
    Standardisation,
    {"mean": FiniteArray(), "deviation": FiniteArray(low=1e-30)},
    _check_standardisation,
)
_add(
    ZCA,
    {
        "mean": FiniteArray(),
        "whitening": FiniteArray(),
        "regularisation": number(0.0, 1e9),
    },
    _check_zca,
)

_STEPS, _FRACTION = (1, 1_000_000), (0.0, 1.0)
register(AutoSolver)
register(RidgeSolver)
register(
    SpanSolver, numbers={"rtol": _FRACTION, "atol": _FRACTION, "max_steps": _STEPS}
)
register(ArgminSolver, numbers={"max_steps": _STEPS, "tolerance": _FRACTION})
register(RelativeRidge, modules={"inner": AbstractInnerSolver})


def _build_regression(in_features, num_classes, use_intercept, dtype):
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return LogisticRegression(
        in_features, num_classes, use_intercept=use_intercept, dtype=dtype
    )


def _read_regression(x: Any) -> dict[str, Any] | None:
    if not takes_pixels(x):
        return None
    # Its parameters are fitted from scratch, so they are not stored.
    num_classes, in_features = x.head.weight.shape
    return {
        "in_features": in_features,
        "num_classes": num_classes,
        "use_intercept": x.head.bias is not None,
        "dtype": x.head.weight.dtype,
    }


TABLE["LogisticRegression"] = Entry(
    LogisticRegression,
    Record(
        {
            "in_features": FromImages(lambda d: d.images[0].size),
            "num_classes": NumClasses(),
            "use_intercept": flag,
            "dtype": choice({x: np.dtype(x) for x in ("float32", "float64")}),
        },
        _build_regression,
        lambda in_features, num_classes, **_: 8 * (in_features + 1) * num_classes,
    ),
    _read_regression,
)


_norm = choice(
    {None: None, "instance_norm": nn.instance_norm, "group_norm": nn.group_norm}
)
_activation = choice(
    {
        name: getattr(jax.nn, name)
        for name in ("relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh")
    }
)
_pool = choice({"average_pool": nn.average_pool, "max_pool": nn.max_pool})
_widths = items(number(1, 512), 8)
_ARCHITECTURES = {
    "ConvNet": {
        "widths": _widths,
        "norm": _norm,
        "norm_last": flag,
        "activation": _activation,
        "pool": _pool,
        "size": Optional(number(1, 64)),
    },
    "LeNet": {"activation": _activation},
    "MLP": {"widths": _widths, "activation": _activation},
    "AlexNet": {"norm": _norm, "activation": _activation},
    "VGG11": {"norm": _norm, "activation": _activation},
    "ResNet18": {"norm": _norm, "activation": _activation},
}


def _add_architecture(name: str, settings: dict[str, AbstractField]) -> None:
    """A network is stored as its constructor, a `functools.partial` of all settings."""
    function = getattr(nn, name)
    shape = FromImages(lambda d: d.images.shape[1:])
    fields = {"shape": shape, "num_classes": NumClasses(), **settings}

    def read(x):
        is_partial = type(x) is ft.partial and x.func is function
        return dict(x.keywords) if is_partial and set(x.keywords) == set(fields) else None

    record = Record(fields, ft.partial(ft.partial, function))
    TABLE[name] = Entry(function, record, read)


for _name, _settings in _ARCHITECTURES.items():
    _add_architecture(_name, _settings)


def _find_architecture(make: Callable) -> ft.partial | None:
    """The constructor of the network of `eqdistill.nn` that `make` returns."""
    network = eqx.filter_eval_shape(lambda: make(key=jr.key(0)))
    if not isinstance(network, nn.Network) or network.architecture not in _ARCHITECTURES:
        return None
    return ft.partial(getattr(nn, network.architecture), **dict(network.settings))


def _make_same(make: Callable, other: Callable) -> bool:
    """Whether two constructors compute the same networks."""

    def trace(make):
        program, out, static = eqx.filter_make_jaxpr(lambda key: make(key=key))(
            jr.key(0)
        )
        return str(program.jaxpr), program.consts, out, static

    return bool(eqx.tree_equal(trace(make), trace(other)))


def _read_fresh(x: Any) -> dict[str, Any] | None:
    make = _find_architecture(x.make) if type(x) is Fresh else None
    return {"make": make} if make is not None and _make_same(make, x.make) else None


_add(Fixed, {"model": Instance(LinearClassifier)})
TABLE["Fresh"] = Entry(Fresh, Record({"make": Instance(ft.partial)}, Fresh), _read_fresh)

_updates = number(2, _MAX_UPDATES)
_batch_size = number(1, _MAX_UPDATES)
_RECIPES = {
    "dc": {"updates": _updates, "augment": flag},
    "frepo": {"updates": _updates, "augment": flag},
    "zero_start": {"updates": _updates},
    "feature_regression": {"updates": _updates},
    "supervised": {"updates": _updates, "batch_size": _batch_size},
    "learned_rates": {
        "learning_rates": items(number(0.0, 1e9), _MAX_UPDATES),
        "batch_size": _batch_size,
        "momentum": number(0.0, 1.0),
        "adam": flag,
        "seed": Optional(number(0, 2**31 - 1)),
    },
}


def _add_recipe(name: str, settings: dict[str, AbstractField]) -> None:
    """A published recipe is stored as the arguments of its function."""
    function = getattr(recipes, name)

    def read(x):
        is_named = type(x) is Recipe and x.name == name and type(x.models) is Fresh
        make = _find_architecture(x.models.make) if is_named else None
        values = {"make": make, **dict(x.settings)} if make is not None else {}
        is_complete = set(values) == {"make", *settings}
        return values if is_complete and _is_same(function(**values), x) else None

    record = Record({"make": Instance(ft.partial), **settings}, function)
    TABLE[name] = Entry(function, record, read)


def _is_same(recipe: Recipe, other: Recipe) -> bool:
    """Whether two recipes make and train the same models."""
    return (
        bool(eqx.tree_equal(recipe.inner, other.inner))
        and describe(prepare=recipe.prepare) == describe(prepare=other.prepare)
        and _make_same(recipe.models.make, other.models.make)
    )


for _name, _settings in _RECIPES.items():
    _add_recipe(_name, _settings)


def _read_custom(x: Any) -> dict[str, Any] | None:
    """A recipe of your own, unless it prepares the distilled set."""
    if type(x) is not Recipe or x.prepare is not Recipe.prepare:
        return None
    return {"models": x.models, "inner": x.inner}


TABLE["Recipe"] = Entry(
    Recipe,
    Record({"models": Instance(AbstractModels), "inner": Instance(AbstractInnerSolver)}, Recipe),
    _read_custom,
)
