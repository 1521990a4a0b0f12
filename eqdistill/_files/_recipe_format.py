"""Networks and recipes in words, as files hold them."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from .._data._distilled_set import DistilledSet
from .._nn._network import group_norm, instance_norm, Network
from .._nn._networks import AlexNet, ConvNet, LeNet, MLP, ResNet18, VGG11
from .._nn._quick import average_pool, max_pool
from .._outer._recipe import Recipe
from .._outer._recipe_parts import MOST_UPDATES
from .._outer._recipes import (
    dc,
    feature_regression,
    frepo,
    learned_rates,
    supervised,
    zero_start,
)


_NORMS = {None: None, "instance_norm": instance_norm, "group_norm": group_norm}
_POOLS = {"average_pool": average_pool, "max_pool": max_pool}
_ACTIVATIONS = {
    name: getattr(jax.nn, name)
    for name in ("relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh")
}
_FUNCTIONS = {"norm": _NORMS, "pool": _POOLS, "activation": _ACTIVATIONS}
# The architectures, and their settings beside the shape and the number of classes.
_ARCHITECTURES = {
    "ConvNet": (ConvNet, ("widths", "norm", "norm_last", "activation", "pool", "size")),
    "LeNet": (LeNet, ("activation",)),
    "MLP": (MLP, ("widths", "activation")),
    "AlexNet": (AlexNet, ("norm", "activation")),
    "VGG11": (VGG11, ("norm", "activation")),
    "ResNet18": (ResNet18, ("norm", "activation")),
}
# The recipes, and their settings beside the network.
_RECIPES = {
    "dc": (dc, ("updates", "augment")),
    "supervised": (supervised, ("updates", "batch_size")),
    "frepo": (frepo, ("updates", "augment")),
    "zero_start": (zero_start, ("updates",)),
    "feature_regression": (feature_regression, ("updates",)),
    "learned_rates": (
        learned_rates,
        ("learning_rates", "batch_size", "momentum", "adam", "seed"),
    ),
}
# What a hostile file may ask for is bounded.
_MOST_LAYERS = 8
_MOST_CHANNELS = 512
_MOST_PIXELS = 64


def describe_recipe(recipe: Recipe, distilled: DistilledSet) -> dict[str, Any]:
    """A recipe in words, of which a recipe can be built that makes the same networks
    and trains them in the same way. Only the name, if there are no such words."""
    labels = np.asarray(distilled.labels)
    num_classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    name = {"type": "Recipe", "name": recipe.name, "num_classes": num_classes}
    try_out = lambda recipe: (
        recipe.make(distilled.images.shape[1:], num_classes, key=jr.key(0)),
        recipe.prepare(distilled, num_classes),
        recipe.inner,
    )
    tried = try_out(recipe)
    network = _describe_network(tried[0])
    if recipe.name not in _RECIPES or network is None:
        return name
    words = {**name, **dict(recipe.settings), "network": network}
    if not is_recipe(words):
        return name
    is_same = eqx.tree_equal(try_out(build_recipe(words)), tried)
    return words if is_same else name


def is_recipe(x: dict[str, Any]) -> bool:
    """Whether a description is of a recipe, in words that are allowed."""
    if type(x.get("name")) is not str or len(x["name"]) > 200:
        return False
    if set(x) == {"type", "name", "num_classes"}:
        return True
    if x["name"] not in _RECIPES:
        return False
    _, fields = _RECIPES[x["name"]]
    return (
        set(x) == {"type", "name", "num_classes", "network", *fields}
        and all(_CHECKS[field](x[field]) for field in fields)
        and _is_network(x["network"])
    )


def build_recipe(x: dict[str, Any]) -> Recipe | None:
    """The recipe that was described, if it can be built again."""
    if "network" not in x:
        return None
    make, fields = _ARCHITECTURES[x["network"]["architecture"]]
    settings = {
        field: _FUNCTIONS[field][x["network"][field]]
        if field in _FUNCTIONS
        else _to_tuple(x["network"][field])
        for field in fields
    }
    recipe, recipe_fields = _RECIPES[x["name"]]
    own = {field: x[field] for field in recipe_fields}
    return recipe(ft.partial(make, **settings), **own)


def _describe_network(network: PyTree) -> dict[str, Any] | None:
    if not isinstance(network, Network) or network.architecture not in _ARCHITECTURES:
        return None
    _, fields = _ARCHITECTURES[network.architecture]
    settings, words = dict(network.settings), {}
    for field in fields:
        value = settings[field]
        if field in _FUNCTIONS:
            names = [k for k, f in _FUNCTIONS[field].items() if f is value]
            if not names:
                return None
            value = names[0]
        words[field] = list(value) if isinstance(value, tuple) else value
    words = {"architecture": network.architecture, **words}
    return words if _is_network(words) else None


def _is_network(x: Any) -> bool:
    if type(x) is not dict or type(x.get("architecture")) is not str:
        return False
    if x["architecture"] not in _ARCHITECTURES:
        return False
    _, fields = _ARCHITECTURES[x["architecture"]]
    return set(x) == {"architecture", *fields} and all(
        _CHECKS[field](x[field]) for field in fields
    )


def _is_name(field: str) -> Callable[[Any], bool]:
    return lambda x: (x is None or type(x) is str) and x in _FUNCTIONS[field]


def _are_widths(x: Any) -> bool:
    return (
        type(x) is list
        and len(x) <= _MOST_LAYERS
        and all(is_integer(width, 1, _MOST_CHANNELS) for width in x)
    )


def _are_rates(x: Any) -> bool:
    return (
        type(x) in (list, tuple)
        and 1 <= len(x) <= MOST_UPDATES
        and all(type(rate) is float and 0 < rate < float("inf") for rate in x)
    )


_CHECKS = {
    "updates": lambda x: is_integer(x, 2, MOST_UPDATES),
    "batch_size": lambda x: is_integer(x, 1, MOST_UPDATES),
    "learning_rates": _are_rates,
    "momentum": lambda x: type(x) is float and 0 <= x < 1,
    "adam": lambda x: type(x) is bool,
    "seed": lambda x: x is None or is_integer(x, 0, 2**31 - 1),
    "augment": lambda x: type(x) is bool,
    "norm_last": lambda x: type(x) is bool,
    "widths": _are_widths,
    "size": lambda x: x is None or is_integer(x, 1, _MOST_PIXELS),
    **{field: _is_name(field) for field in _FUNCTIONS},
}


def is_integer(x: Any, low: int, high: int) -> bool:
    return type(x) is int and low <= x <= high


def _to_tuple(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x
