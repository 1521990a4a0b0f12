"""Files that hold a distilled set and everything needed to check its claim."""

import dataclasses
import functools as ft
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import safetensors.numpy
from jaxtyping import Array, PRNGKeyArray

from .._checks import count_outputs
from .._data._distilled_set import DistilledSet
from .._data._parameterisation import AbstractParameterisation
from .._data._preprocessing import AbstractPreprocessing
from .._losses import AbstractLoss
from .._outer._distillation import Distillation
from .._outer._evaluate import Evaluation
from .._outer._recipes import _relabel, _unchanged
from ..datasets import _published_hashes
from ..recipes import Recipe
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
    is_in_table,
    MAX_BYTES,
    NotInTable,
    register,
    TABLE,
    to_array,
)


_MAX_HEADER_BYTES = 2**20
_RANGES = dict.fromkeys(("accuracy", "mean average precision"), (0.0, 1.0))
_RANGES |= {"R2": (-1e9, 1.0)}  # By the metric that a file claims.
_PACKAGES = ("eqdistill", "jax", "jaxlib", "equinox", "optimistix", "lineax", "optax")


class Artifact(eqx.Module):
    """A published distilled set, as [`eqdistill.load`][] returns it.

    **Attributes:**

    - `distilled`: the distilled set.
    - `start`: the parameterisation that it was decoded from, such as an
        [`eqdistill.Packed`][]; or the distilled set itself.
    - `recipe`: the recipe that the score was measured with, or `None` if it cannot be
        rebuilt from the file. `restore` then completes yours.
    - `recipe_description`: the recipe in words, with all its settings.
    - `recipe_arrays`: the arrays of a recipe that cannot be rebuilt, by their paths:
        learned ones, such as step sizes, and fixed initial weights.
    - `backbones`: the frozen parts of its models, which are not in the file: the class
        of each, and the SHA-256 of its arrays.
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

        **Arguments:** `recipe`: the recipe that `recipe_description` describes, with
        any values in its `recipe_arrays`.

        **Raises:** a `ValueError` if it has other arrays, or another backbone.
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
    check(is_consistent, f"its score must be of its {num_models} models")
    prepare = ft.partial(values["prepare"] or _unchanged).func
    check(prepare in (_relabel, _unchanged), "its `prepare` must be of a recipe")
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
        check(shape == image.shape, "its preprocessing must be for its images")
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


def save(
    path: str | os.PathLike,
    result: Distillation | AbstractParameterisation,
    evaluation: Evaluation | None = None,
    *,
    preprocessing: AbstractPreprocessing | None = None,
    dataset: str | None = None,
    seed: int | None = None,
    source: str | None = None,
) -> None:
    """Saves a distilled set to a file, with everything that others need to check it:
    the score and the recipe it was measured with, the dataset and its hashes, and
    the versions of the packages. The file holds arrays and text, but no code, in the
    safetensors format.

    **Arguments:**

    - `path`: a file name that ends in `.safetensors`. An existing file is replaced once
        the new one is completely written.
    - `result`: the result of [`eqdistill.distill`][], which includes the names of the
        learned arrays; or a distilled set, or an [`eqdistill.Packed`][]. Of a
        parameterisation that is not registered, the decoded images are stored.
    - `evaluation`: the result of [`eqdistill.evaluate`][] on the test split, for one
        set. The file claims its score, and stores its recipe and key. By default the
        file claims nothing.

    The recipe can be rebuilt if it is one of `eqdistill.recipes` with a network of
    `eqdistill.nn`, or if its models are networks of `eqdistill.nn`, fresh or with fixed
    initial weights, or logistic regression, and its inner solver is a solver of this
    package with default settings except numbers. For [`eqdistill.UnrolledSolver`][],
    the optimiser must be Optax's `sgd`, `adam`, `adamw`, `nadam`, `lion`, `rmsprop` or
    `adagrad`, with any numbers.

    Of any other recipe, the file stores a description with all settings; all arrays,
    such as learned step sizes and fixed initial weights; and for an
    [`eqdistill.nn.Frozen`][] backbone, not its arrays but their SHA-256. To check such
    a file, a function that returns the recipe is needed: `restore` of the
    [`Artifact`][] fills in the arrays.

    - `preprocessing`: the preprocessing that was applied to the real images, such as an
        [`eqdistill.datasets.Standardisation`][]. The distilled images are in its units.
    - `dataset`: the name of the dataset, as in [`eqdistill.datasets.load`][].
    - `seed`: the seed of the run.
    - `source`: the source code of your own network, as text for whoever reads the file.

    **Raises:** a `ValueError` if the loss or the preprocessing is not registered, if a
    value is not finite or out of range, or if the objective has learned arrays that the
    recipe of `evaluation` does not use. Those of an outer loss may be lost.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in '.safetensors'; got '{path}'.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must be in a folder that exists; got '{path}'."
        )
    start = result.start if isinstance(result, Distillation) else result
    if type(start).__name__ not in TABLE:
        start = start.decode()
    try:
        claim = _claim(evaluation)
        if isinstance(result, Distillation):
            _check_learned(result, claim["recipe"])
        artifact = Artifact(
            distilled=start.decode(),
            start=start,
            recipe_arrays={},
            backbones={},
            **claim,
            preprocessing=preprocessing,
            dataset=dataset,
            sha256={} if dataset is None else _published_hashes(dataset),
            learned=result.learned if isinstance(result, Distillation) else None,
            seed=None if seed is None else int(seed),
            source=source,
            x64=jnp.result_type(float) == jnp.float64,
            versions={x: importlib.metadata.version(x) for x in _PACKAGES},
        )
        data = _to_bytes(artifact)
    except Exception as e:
        raise _refusal("save", path, e) from e
    # Write into a temporary folder, so that the file gets the usual permissions.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def load(path: str | os.PathLike) -> Artifact:
    """Loads a distilled set from a file that [`eqdistill.save`][] wrote.

    Files from strangers are safe to load: everything in the file is checked, and
    nothing in it is executed or imported. At most 16 times the size of the file and 16
    MiB are allocated for the decoded images and the model.

    **Arguments:**

    - `path`: the file.

    **Returns:** an [`Artifact`][]. Double precision becomes single precision unless JAX
    has double precision enabled.

    **Raises:** a `ValueError`, which names the file and the cause, if
    [`eqdistill.save`][] could not have written it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a file that exists; got '{path}'.")
    try:
        # Devices and pipes may have no end.
        check(path.is_file(), "it is not a regular file")
        size = path.stat().st_size
        check(size <= MAX_BYTES, f"it has {size} bytes, more than {MAX_BYTES}")
        with path.open("rb") as file:
            return _from_bytes(file.read(size))
    except Exception as e:  # A hostile file may cause any.
        raise _refusal("load", path, e) from e


def _refusal(verb: str, path: Path, e: Exception) -> ValueError:
    reason = str(e).strip().rstrip(".") or type(e).__name__
    # Hostile files may make it long.
    reason = reason if len(reason) <= 500 else f"{reason[:500]} ..."
    return ValueError(f"Cannot {verb} {path}: {reason}.")


def _claim(evaluation: Evaluation | None) -> dict[str, Any]:
    names = ("recipe", "recipe_description", "prepare", "metric", "score", "std", "key")
    if evaluation is None:
        return dict.fromkeys(names) | {"num_models": 0}
    sets, num_models = evaluation.scores.shape
    check(sets == 1, f"`evaluation` must be of one distilled set; got {sets}")
    recipe = evaluation.recipe
    return {
        "recipe": recipe,
        "recipe_description": to_words(recipe),
        "prepare": recipe.prepare if is_in_table(recipe.prepare) else None,
        "metric": evaluation.metric,
        "score": evaluation.score,
        "std": evaluation.std_models if num_models > 1 else None,
        "key": evaluation.key,
        "num_models": num_models,
    }


def _check_learned(result: Distillation, recipe: Recipe | None) -> None:
    """Checks that the recipe has the learned arrays of an objective. Those of an outer
    loss have served their purpose."""
    is_loss = lambda x: isinstance(x, AbstractLoss)
    objective = jax.tree.map(
        lambda x: None if is_loss(x) else x, result.objective, is_leaf=is_loss
    )
    kept = named_arrays(recipe).values()
    for name, x in named_arrays({"objective": objective}).items():
        # A recipe may hold the exponentials of learned logarithms, rounded.
        is_kept = any(
            x.shape == y.shape and np.allclose(x, y, 1e-4, 1e-4) for y in kept
        )
        check(
            is_kept or name not in result.learned,
            f"the learned `{name}` would be lost, because the recipe of `evaluation` "
            "has no such array. Evaluate with `result.objective.models` and "
            "`inner=result.objective.inner`, which keeps it; or save "
            "`result.distilled`, without it",
        )


def _to_bytes(artifact: Artifact) -> bytes:
    """The content of a file from which the artifact can be loaded. Only the parts of a
    recipe are stored if it cannot be rebuilt."""
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
    return data, _from_bytes(data)


def _from_bytes(data: bytes) -> Artifact:
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
    check(not content.tensors, f"it has other tensors: {sorted(content.tensors)}")
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
    model = model_struct(recipe, distilled)
    image = jax.ShapeDtypeStruct(distilled.images.shape[1:], distilled.images.dtype)
    outputs = count_outputs("recipe", model, image)
    content.reserve("labels", 8 * len(distilled.images) * outputs)
    words = to_words(recipe)
    return dataclasses.replace(artifact, recipe=recipe, recipe_description=words)


def _json(data: str | bytes) -> Any:
    def without_duplicates(pairs):
        check(len(dict(pairs)) == len(pairs), "it has a duplicate key")
        return dict(pairs)

    return json.loads(data, object_pairs_hook=without_duplicates)
