"""Inner solvers, models and recipes that a file can rebuild."""

import functools as ft
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import optax

from .. import augment, nn, recipes
from .._classifier import LogisticRegression
from .._inner._argmin_solver import ArgminSolver
from .._inner._augmented_fit import AugmentedFit
from .._inner._auto_solver import AutoSolver
from .._inner._feature_regression import FeatureRegression
from .._inner._relative_ridge import RelativeRidge
from .._inner._ridge_solver import RidgeSolver
from .._inner._span_solver import SpanSolver
from .._inner._unrolled_solver import UnrolledSolver
from .._models._models import Fixed, Fresh
from .._outer._recipes import _relabel
from ..recipes import Recipe
from ._recipe_arrays import fill, model_struct, named_arrays, regression_settings
from ._table import check, Entry, FUNCTIONS, MAX_BYTES, NotInTable, register, TABLE


_OPTIMISERS = ("adagrad", "adam", "adamw", "lion", "nadam", "rmsprop", "sgd")


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
    # Set arrays afterwards: the constructor would round them by taking exponentials.
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
register(AugmentedFit, {"augmentation": Any, "copies": (1, 1000), "inner": Any})
register(UnrolledSolver, _unrolled, build=_build_unrolled, read=_read_unrolled)


# Augmentations.


_size, _strength = (0, 4096), (0.0, 1e4)
_jitter = {"brightness": _strength, "saturation": _strength, "contrast": _strength}
register(
    augment.Affine, {"shift": _strength, "rotation": _strength, "scale": _strength}
)
register(augment.ColourJitter, _jitter)
register(augment.Crop, {"padding": _size})
register(augment.Cutout, {"size": _size})
register(augment.Flip, {"probability": (0.0, 1.0)})


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
    """The constructor in `eqdistill.nn` for the networks of an [`eqdistill.Fresh`][].
    Raises [`NotInTable`][] for other models."""
    network = model_struct(models, None)
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
for _key, _function in FUNCTIONS.items():
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
