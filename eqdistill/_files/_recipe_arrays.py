"""The parts of recipes that a file keeps even if it cannot rebuild the recipe: words,
arrays, and digests of frozen backbones."""

import dataclasses
import functools as ft
import hashlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PyTree

from .. import nn, recipes
from .._classifier import Frozen, takes_pixels
from .._data._distilled_set import DistilledSet
from .._models._models import AbstractModels, Fixed, Fresh
from .._outer._data import Cached
from .._outer._recipes import _unchanged
from ..recipes import Recipe


_MOST_NUMBERS = 20  # Longer arrays and tuples are not written out.


def to_words(x: Any) -> str:
    """An object as a call, such as `RelativeRidge(inner=RidgeSolver)`, with all its
    settings. Large arrays are given by their shapes."""
    if isinstance(x, tuple | list) and len(x) > _MOST_NUMBERS:
        return f"({len(x)} values from {to_words(x[0])} to {to_words(x[-1])})"
    if isinstance(x, tuple | list):
        return f"({', '.join(map(to_words, x))})"
    if isinstance(x, ft.partial):
        return _call(to_words(x.func), x.keywords, *x.args)
    if isinstance(x, Recipe):
        return _recipe_to_words(x)
    if isinstance(x, nn.Network):
        return _call(x.architecture, dict(x.settings))
    if takes_pixels(x):
        return _call("LogisticRegression", regression_settings(x))
    if isinstance(x, eqx.Module):
        fields = [field.name for field in dataclasses.fields(x)]
        values = {name: getattr(x, name) for name in fields}
        return _call(type(x).__name__, values)
    if isinstance(x, dict):
        return _call("", x)
    if _is_array(x):
        is_number = not isinstance(x, jax.ShapeDtypeStruct) and x.dtype.kind in "fiub"
        if is_number and x.size <= _MOST_NUMBERS:
            return str(np.vectorize("{:.6g}".format)(x).tolist()).replace("'", "")
        return f"{x.dtype}{list(x.shape)}"
    plain = x is None or isinstance(x, bool | int | float | str)
    return str(x) if plain else getattr(x, "__qualname__", type(x).__name__)


def _call(name: str, fields: dict[str, Any], *args: Any) -> str:
    words = [to_words(x) for x in args]
    for field, x in fields.items():
        # `None` stands for a default.
        if x is not None:
            if field.startswith("log_"):
                field, x = field.removeprefix("log_"), jax.tree.map(jnp.exp, x)
            words.append(f"{field}={to_words(x)}")
    return f"{name}({', '.join(words)})" if words else name


def _recipe_to_words(recipe: Recipe) -> str:
    fields = {"models": recipe.models, "inner": recipe.inner}
    published = _published(recipe)
    if published is not None:
        make, function = published
        # The first paragraph of its docstring says what a published recipe does.
        doc = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        doc = doc.replace("[`", "").replace("`][]", "").replace("`", "")
        call = _call(recipe.name, {**dict(recipe.settings), "make": make})
        return f"{call}: {doc}"
    if recipe.prepare is not _unchanged:
        fields["prepare"] = recipe.prepare
    return _call("Recipe", fields)


def _published(recipe: Recipe) -> tuple[Any, Any] | None:
    """The network, and the function of `eqdistill.recipes` that returns this recipe for
    it. `None` if there is no such function."""
    function, models = getattr(recipes, recipe.name, None), recipe.models
    if function is None or not isinstance(models, Fresh):
        return None
    make = models.make.args[0] if isinstance(models.make, ft.partial) else None
    try:
        is_published = is_same(function(make, **dict(recipe.settings)), recipe)
    except Exception:  # The recipe may have been changed in any way.
        return None
    return (make, function) if is_published else None


def model_struct(models: AbstractModels, distilled: DistilledSet | None) -> PyTree:
    """A model, with shapes instead of arrays."""
    return eqx.filter_eval_shape(ft.partial(_draw, models, distilled), jr.key(0))


def model_to_words(recipe: Recipe, distilled: DistilledSet) -> str:
    """A model of the recipe, and the number of its parameters."""
    model = model_struct(recipe.models, distilled)
    words = type(model).__name__
    if isinstance(model, nn.Network) or takes_pixels(model):
        words = to_words(model)
    arrays = named_arrays(model).values()
    size = sum(x.size for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact))
    return f"{words}, {size:,} parameters"


def regression_settings(x: Any) -> dict[str, Any]:
    sizes = {"in_features": x.head.in_features, "num_classes": x.head.out_features}
    return sizes | {"use_intercept": x.head.use_bias, "dtype": str(x.head.weight.dtype)}


def is_same(a: Any, b: Any) -> bool:
    """Whether two objects are equal in every field, static ones included. Partial
    functions are compared by their parts."""
    if isinstance(a, ft.partial) and isinstance(b, ft.partial):
        parts = [(x.func, x.args, x.keywords) for x in (a, b)]
        return is_same(*parts)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, eqx.Module):
        fields = [field.name for field in dataclasses.fields(a)]
        return all(is_same(getattr(a, f), getattr(b, f)) for f in fields)
    return bool(eqx.tree_equal(a, b)) if _is_array(a) else bool(a == b)


def is_same_recipe(recipe: Any, other: Any) -> bool:
    """Whether two recipes make and train the same models."""
    pairs = [(x.inner, x.prepare, _trace(x.models)) for x in (recipe, other)]
    return is_same(*pairs)


def _trace(models: Any) -> Any:
    """The program that makes the models, or the models themselves."""
    if not isinstance(models, Fresh):
        return models
    make = eqx.filter_make_jaxpr(lambda key: models.make(key=key))
    program, *others = make(jr.key(0))
    return str(program.jaxpr), program.consts, others


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _is_frozen(x: Any) -> bool:
    return isinstance(x, Frozen)


def _leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths. A `Frozen` is a leaf."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=_is_frozen)
    name = ft.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): x for path, x in leaves}


def named_arrays(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree by their paths, except those in a `Frozen`."""
    return {path: x for path, x in _leaves(tree).items() if _is_array(x)}


def fill(name: str, tree: PyTree, arrays: dict[str, Array]) -> PyTree:
    """A tree with all its arrays outside any `Frozen` replaced with these."""
    show = lambda x: "none" if x is None else f"{x.dtype}{list(x.shape)}"
    wanted = named_arrays(tree)
    for path in sorted(wanted | arrays):
        shapes = show(arrays.get(path)), show(wanted.get(path))
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`{name}.{path}` must be as in the file, {shapes[0]}; got {shapes[1]}."
            )
    leaves = [arrays.get(path, x) for path, x in _leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_is_frozen), leaves)


def backbones(models: AbstractModels, distilled: DistilledSet) -> dict[str, str]:
    """The class of each `Frozen` in a model, and the SHA-256 of its arrays."""
    if isinstance(models, Fixed):
        return _digests(models.model)
    shapes = model_struct(models, distilled)
    if not any(map(_frozen_arrays, _leaves(shapes).values())):
        return {}
    # A part that differs from model to model is not a backbone.
    draw = ft.partial(_draw, models, distilled)
    first, second = (_digests(eqx.filter_jit(draw)(jr.key(i))) for i in range(2))
    return {path: x for path, x in first.items() if x == second[path]}


def _draw(models, distilled, key):
    return models.draw(models.init(distilled, key=key), key=key)


def _frozen_arrays(x: Any) -> list[Any]:
    return [*filter(_is_array, jax.tree.leaves(x))] if _is_frozen(x) else []


def _digests(model: PyTree) -> dict[str, str]:
    found = {}
    for path, node in _leaves(model).items():
        arrays, digest = _frozen_arrays(node), hashlib.sha256()
        for x in arrays:
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x = jr.key_data(x)
            digest.update(f"{x.dtype}{list(x.shape)}".encode())
            digest.update(np.asarray(x).tobytes())
        if arrays:
            inner = node
            while isinstance(inner, Frozen | Cached):
                inner = inner.module if isinstance(inner, Frozen) else inner.features
            found[path] = f"{type(inner).__name__}, SHA-256 {digest.hexdigest()}"
    return found
