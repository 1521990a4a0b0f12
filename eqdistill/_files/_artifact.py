"""Files that hold a distilled set and everything needed to check its claim."""

import dataclasses
import functools as ft
import json
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import safetensors.numpy
from jaxtyping import Array, PRNGKeyArray

from .._checks import count_outputs
from .._data._distilled_set import DistilledSet
from .._data._parameterisation import AbstractParameterisation
from .._data._preprocessing import AbstractPreprocessing
from .._inner._fit import image_struct
from .._outer._recipes import _relabel, _unchanged
from ..recipes import Recipe
from . import _entries  # noqa: F401  Fills the table.
from ._recipe_arrays import (
    backbones,
    fill,
    is_same,
    is_same_recipe,
    model_struct,
    named_arrays,
    to_words,
)
from ._table import (
    check,
    Content,
    decode,
    encode,
    NotInTable,
    register,
    to_array,
)


_MAX_HEADER_BYTES = 2**20
_RANGES = dict.fromkeys(("accuracy", "mean average precision"), (0.0, 1.0))
_RANGES |= {"R2": (-1e9, 1.0)}  # By the metric that a file claims.


class Artifact(eqx.Module):
    """A published distilled set, as [`eqdistill.load`][] returns it.

    **Attributes:**

    - `distilled`: the distilled set.
    - `start`: the parameterisation that it was decoded from, such as an
        [`eqdistill.Packed`][]; or the distilled set itself.
    - `recipe`: the recipe that the score was measured with, or `None` if it cannot be
        rebuilt from the file. `restore` then fills in the arrays of your own recipe.
    - `recipe_description`: the recipe in words, with all its settings.
    - `recipe_arrays`: the arrays of a recipe that cannot be rebuilt, by their paths:
        learned ones, such as step sizes, and fixed initial weights.
    - `backbones`: the frozen parts of the recipe's models, which are not in the file:
        the class of each, and the SHA-256 of its arrays.
    - `prepare`: the `prepare` of the recipe, or `None` if it cannot be rebuilt.
    - `metric`, `score`, `std`: what was measured on the test split, such as
        `"accuracy"`; its claimed mean and standard deviation over models. `None`
        without a claim.
    - `num_models`, `key`: the number of models that were trained, and their key. Zero
        and `None` without a claim.
    - `preprocessing`, `dataset`, `seed`, `source`: the arguments of
        [`eqdistill.save`][].
    - `sha256`: the published SHA-256 of each file of the dataset.
    - `learned`: the names of the learned arrays, such as `"images"`, if known.
    - `x64`: whether JAX used double precision by default.
    - `versions`: the version of each package involved.
    """

    distilled: DistilledSet
    start: AbstractParameterisation
    recipe: Recipe | None
    recipe_description: str | None
    recipe_arrays: dict[str, Array]
    backbones: dict[str, str]
    prepare: Any
    metric: str | None
    score: float | None
    std: float | None
    num_models: int
    key: PRNGKeyArray | None
    preprocessing: AbstractPreprocessing | None
    dataset: str | None
    sha256: dict[str, str]
    learned: tuple[str, ...] | None
    seed: int | None
    source: str | None
    x64: bool
    versions: dict[str, str]

    def restore(self, recipe: Recipe) -> Recipe:
        """Returns your recipe with the arrays in the file, for a file whose recipe
        cannot be rebuilt.

        **Arguments:** `recipe`: the recipe that `recipe_description` describes. The
        values of the arrays that are in `recipe_arrays` do not matter.

        **Raises:** a `ValueError` if `recipe` has other arrays, or another backbone.
        """
        found = backbones(recipe.models, self.distilled)
        for path in sorted(found | self.backbones):
            here, there = (x.get(path, "none") for x in (found, self.backbones))
            if here != there:
                raise ValueError(
                    f"`recipe` must have the backbone of the file: `{path}` must be "
                    f"{there}; got {here}."
                )
        return fill("recipe", recipe, self.recipe_arrays)


def _build(start, key, generator, **values) -> Artifact:
    num_models, metric, score = (values[x] for x in ("num_models", "metric", "score"))
    parts = metric, score, values["recipe_description"]
    is_consistent = all((x is None) == (num_models == 0) for x in parts)
    is_consistent &= (values["std"] is None) == (num_models <= 1)
    check(is_consistent, f"its claim must fit its number of models, {num_models}")
    prepare = ft.partial(values["prepare"] or _unchanged).func
    check(prepare in (_relabel, _unchanged), "its `prepare` must come from a recipe")
    if num_models:
        low, high = _RANGES.get(metric, (0.0, -1.0))
        problem = f"its {metric!r} must be from {low} to {high}; got {score}"
        check(low <= score <= high, problem)
    words = jnp.asarray(key, jnp.uint32)
    values["key"] = jr.wrap_key_data(words, impl=generator) if num_models else None
    distilled = start.decode()
    is_finite = jnp.isfinite(distilled.images).all()
    check(is_finite, "its decoded images must be finite; some pixels are not")
    if values["preprocessing"] is not None:
        image = distilled.images[0]
        shape = eqx.filter_eval_shape(values["preprocessing"].inverse, image).shape
        check(shape == image.shape, "its preprocessing must fit its images")
    dictionaries = [values[x] for x in ("versions", "sha256", "backbones")]
    texts = [*(values["learned"] or ()), *(y for x in dictionaries for y in x.values())]
    texts += [values[x] or "" for x in ("recipe_description", "source")]
    check(all(type(x) is str for x in texts), "its names and versions must be text")
    return Artifact(distilled, start, recipe=None, recipe_arrays={}, **values)


def _read(x: Artifact) -> dict[str, Any]:
    if x.key is None:
        return vars(x) | {"key": (), "generator": ""}
    key = tuple(jr.key_data(x.key).tolist())
    return vars(x) | {"key": key, "generator": str(jr.key_impl(x.key))}


register(
    Artifact,
    {
        **dict.fromkeys(("start", "preprocessing", "generator", "dataset"), Any),
        **dict.fromkeys(("sha256", "learned", "x64", "versions", "source"), Any),
        **dict.fromkeys(("recipe_description", "backbones", "prepare", "metric"), Any),
        **{"score": (-1e9, 1e9), "std": (0.0, 1e9)},
        "num_models": (0, 1000),
        "key": (0, 2**32 - 1),
        "seed": (-(2**63), 2**63 - 1),
    },
    build=_build,
    read=_read,
    nbytes=lambda start, **_: 8 * eqx.filter_eval_shape(start.decode).images.size,
)


def to_bytes(artifact: Artifact) -> bytes:
    """The content of a file from which the artifact can be loaded. If the recipe
    cannot be rebuilt, only its parts are stored."""
    recipe = artifact.recipe
    try:
        data, loaded = _write(artifact)
        check(recipe is None or is_same_recipe(loaded.recipe, recipe), "")
    except Exception:
        found = backbones(recipe.models, artifact.distilled) if recipe else {}
        arrays = named_arrays(recipe)
        parts = {"recipe": None, "recipe_arrays": arrays, "backbones": found}
        artifact = dataclasses.replace(artifact, **parts)
        data, loaded = _write(artifact)
    for name in ("start", "preprocessing", "prepare", "recipe_arrays"):
        is_kept = is_same(getattr(loaded, name), getattr(artifact, name))
        check(is_kept, f"its {name} has fields that are not registered")
    return data


def _write(artifact: Artifact) -> tuple[bytes, Artifact]:
    tensors: dict[str, np.ndarray] = {}
    parts = {"artifact": artifact, "recipe": artifact.recipe}
    texts = {name: json.dumps(encode(x, name, tensors)) for name, x in parts.items()}
    for name, x in artifact.recipe_arrays.items():
        encode(jnp.asarray(x), f"recipe.{name}", tensors)
    data = safetensors.numpy.save(tensors, texts)
    return data, from_bytes(data)


def from_bytes(data: bytes) -> Artifact:
    length = int.from_bytes(data[:8], "little")
    check(
        length <= min(_MAX_HEADER_BYTES, len(data) - 8),
        f"it is truncated or not a safetensors file: it has {len(data)} bytes, but its "
        f"header has {length}, where at most {_MAX_HEADER_BYTES} are allowed",
    )
    header = _json(data[8 : 8 + length])
    raw = header.get("__metadata__") if type(header) is dict else None
    if type(raw) is not dict or raw.keys() != {"artifact", "recipe"}:
        raise ValueError("its metadata must be an `artifact` and a `recipe`")
    content = Content(safetensors.numpy.load(data), len(data))
    artifact = decode(_json(raw["artifact"]), "artifact", content)
    check(isinstance(artifact, Artifact), "its `artifact` must be an `Artifact`")
    artifact = _with_recipe(artifact, _json(raw["recipe"]), content)
    check(not content.tensors, f"it has unexpected tensors: {sorted(content.tensors)}")
    return artifact


def _with_recipe(artifact: Artifact, raw: Any, content: Content) -> Artifact:
    """The artifact with its recipe; or with the arrays of a recipe that cannot be
    rebuilt."""
    try:
        recipe = decode(raw, "recipe", content)
    except NotInTable:
        recipe = None
    if recipe is None:
        names = [name for name in content.tensors if name.startswith("recipe.")]
        check(not names or artifact.num_models, "it has a recipe without a claim")
        arrays = {x[7:]: to_array(content.tensors.pop(x), x) for x in names}
        return dataclasses.replace(artifact, recipe_arrays=arrays)
    check(isinstance(recipe, Recipe), "its `recipe` must be a `Recipe`")
    distilled = artifact.distilled
    model = model_struct(recipe.models, distilled)
    outputs = count_outputs("recipe", model, image_struct(distilled))
    content.reserve("labels", 8 * len(distilled.images) * outputs)
    words = to_words(recipe)
    return dataclasses.replace(artifact, recipe=recipe, recipe_description=words)


def _json(data: str | bytes) -> Any:
    def without_duplicates(pairs):
        check(len(dict(pairs)) == len(pairs), "it has a duplicate key")
        return dict(pairs)

    return json.loads(data, object_pairs_hook=without_duplicates)
