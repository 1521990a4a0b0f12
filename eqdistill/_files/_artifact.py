"""Files that hold a distilled set and everything needed to check its accuracy."""

import dataclasses
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
import safetensors
import safetensors.numpy
from jaxtyping import PRNGKeyArray

from .._checks import count_outputs
from .._data._distilled_set import DistilledSet
from .._data._parameterisation import AbstractParameterisation
from .._data._preprocessing import AbstractPreprocessing
from .._outer._distillation import Distillation
from .._outer._evaluate import Evaluation
from ..datasets import _published_hashes
from ..recipes import Recipe
from ._table import (
    check,
    Content,
    decode,
    encode,
    is_same_recipe,
    MAX_BYTES,
    NotInTable,
    register,
    TABLE,
    to_words,
)


_MAX_HEADER_BYTES = 2**20
_PACKAGES = ("eqdistill", "jax", "jaxlib", "equinox", "optimistix", "lineax", "optax")


class Artifact(eqx.Module):
    """A published distilled set, as [`eqdistill.load`][] returns it.

    **Attributes:**

    - `distilled`: the distilled set.
    - `start`: the parameterisation that it was decoded from, such as an
        [`eqdistill.Packed`][]; or the distilled set itself.
    - `recipe`: the recipe that the accuracy was measured with, or `None` if it cannot
        be rebuilt from the file.
    - `recipe_description`: the recipe in words.
    - `accuracy`, `std`: the claimed mean accuracy on the test split, from 0 to 1, and
        its standard deviation over models. `None` without a claim.
    - `num_models`, `key`: the number of models that were trained, and their key. Zero
        and `None` without a claim.
    - `preprocessing`, `dataset`, `seed`: the arguments of [`eqdistill.save`][].
    - `sha256`: the published SHA-256 of each file of the dataset.
    - `learned`: the names of the learned arrays, such as `"images"`, if known.
    - `x64`: whether JAX used double precision by default.
    - `versions`: the version of each package involved.
    """

    distilled: DistilledSet
    start: AbstractParameterisation
    recipe: Recipe | None
    recipe_description: str | None
    accuracy: float | None
    std: float | None
    num_models: int
    key: PRNGKeyArray | None
    preprocessing: AbstractPreprocessing | None
    dataset: str | None
    sha256: dict[str, str]
    learned: tuple[str, ...] | None
    seed: int | None
    x64: bool
    versions: dict[str, str]


def _build(start, key, generator, **values) -> Artifact:
    num_models = values["num_models"]
    is_consistent = (values["accuracy"] is None) == (num_models == 0)
    is_consistent &= (values["std"] is None) == (num_models <= 1)
    check(is_consistent, f"its accuracy must be of its {num_models} models")
    words = jnp.asarray(key, jnp.uint32)
    values["key"] = jr.wrap_key_data(words, impl=generator) if num_models else None
    distilled = start.decode()
    is_finite = jnp.isfinite(distilled.images).all()
    check(is_finite, "its decoded images must be finite; some pixels are not")
    if values["preprocessing"] is not None:
        image = distilled.images[0]
        shape = eqx.filter_eval_shape(values["preprocessing"].inverse, image).shape
        check(shape == image.shape, "its preprocessing must be for its images")
    texts = (*(values["learned"] or ()), *values["versions"].values())
    check(all(type(x) is str for x in texts), "its names and versions must be text")
    return Artifact(distilled, start, None, None, **values)


def _read(x: Artifact) -> dict[str, Any]:
    if x.key is None:
        return vars(x) | {"key": (), "generator": ""}
    key = tuple(jr.key_data(x.key).tolist())
    return vars(x) | {"key": key, "generator": str(jr.key_impl(x.key))}


register(
    Artifact,
    {
        **dict.fromkeys(("start", "preprocessing", "generator", "dataset"), Any),
        **dict.fromkeys(("sha256", "learned", "x64", "versions"), Any),
        **dict.fromkeys(("accuracy", "std"), (0.0, 1.0)),
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
) -> None:
    """Saves a distilled set to a file, with everything that others need to check it:
    the accuracy and the recipe it was measured with, the dataset and its hashes, and
    the versions of the packages. The file holds arrays and text, but no code, in the
    safetensors format.

    **Arguments:**

    - `path`: a file name that ends in `.safetensors`. An existing file is replaced once
        the new one is completely written.
    - `result`: the result of [`eqdistill.distill`][], which includes the names of the
        learned arrays; or a distilled set, or an [`eqdistill.Packed`][]. Of a
        parameterisation that is not registered, the decoded images are stored.
    - `evaluation`: the result of [`eqdistill.evaluate`][] on the test split, for one
        set. The file claims its accuracy, and stores its recipe. The recipe can be
        rebuilt if it is one of `eqdistill.recipes` with a network of `eqdistill.nn`, or
        if its models are networks of `eqdistill.nn` or logistic regression, and its
        inner solver is a solver of this package other than
        [`eqdistill.UnrolledSolver`][], with default settings except numbers. Any other
        recipe is stored as a description. By default the file claims no accuracy.

    - `preprocessing`: the preprocessing that was applied to the real images, such as an
        [`eqdistill.datasets.Standardisation`][]. The distilled images are in its units.
    - `dataset`: the name of the dataset, as in [`eqdistill.datasets.load`][].
    - `seed`: the seed of the run.

    **Raises:** a `ValueError` if the loss or the preprocessing is not registered, or if
    a value is not finite or out of range.
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
        artifact = Artifact(
            distilled=start.decode(),
            start=start,
            recipe_description=None,
            **_claim(evaluation),
            preprocessing=preprocessing,
            dataset=dataset,
            sha256={} if dataset is None else _published_hashes(dataset),
            learned=result.learned if isinstance(result, Distillation) else None,
            seed=None if seed is None else int(seed),
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
    if evaluation is None:
        return dict.fromkeys(("recipe", "accuracy", "std", "key")) | {"num_models": 0}
    sets, num_models = evaluation.scores.shape
    check(
        evaluation.metric == "accuracy",
        f"`evaluation` must be of an accuracy; got {evaluation.metric}",
    )
    check(sets == 1, f"`evaluation` must be of one distilled set; got {sets}")
    std = evaluation.std_models if num_models > 1 else None
    claim = {name: getattr(evaluation, name) for name in ("recipe", "accuracy", "key")}
    return claim | {"std": std, "num_models": num_models}


def _to_bytes(artifact: Artifact) -> bytes:
    """The content of a file from which the artifact can be loaded. A recipe that cannot
    be rebuilt is stored as text."""
    recipe = artifact.recipe
    try:
        data, loaded = _write(artifact, recipe)
        check(recipe is None or is_same_recipe(loaded.recipe, recipe), "")
    except Exception:
        words = " ".join(eqx.tree_pformat(recipe).split())
        data, loaded = _write(artifact, words)
    for name in ("start", "preprocessing"):
        is_same = eqx.tree_equal(getattr(loaded, name), getattr(artifact, name))
        check(is_same, f"its {name} has fields that are not registered")
    return data


def _write(artifact: Artifact, recipe: Recipe | str | None) -> tuple[bytes, Artifact]:
    tensors: dict[str, np.ndarray] = {}
    parts = {"artifact": artifact, "recipe": recipe}
    texts = {name: json.dumps(encode(x, name, tensors)) for name, x in parts.items()}
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
    recipe, words = _decode_recipe(_json(raw["recipe"]), artifact, content)
    check(not content.tensors, f"it has other tensors: {sorted(content.tensors)}")
    return dataclasses.replace(artifact, recipe=recipe, recipe_description=words)


def _decode_recipe(
    raw: Any, artifact: Artifact, content: Content
) -> tuple[Recipe | None, str | None]:
    """A recipe and its description."""
    if raw is None or type(raw) is str:
        return None, raw
    try:
        recipe = decode(raw, "recipe", content)
    except NotInTable:
        return None, to_words(raw)
    check(isinstance(recipe, Recipe), "its `recipe` must be a `Recipe`")
    distilled, models = artifact.distilled, recipe.models
    draw = lambda key: models.draw(models.init(distilled, key=key), key=key)
    model = eqx.filter_eval_shape(draw, jr.key(0))
    image = jax.ShapeDtypeStruct(distilled.images.shape[1:], distilled.images.dtype)
    outputs = count_outputs("recipe", model, image)
    content.reserve("labels", 8 * len(distilled.images) * outputs)
    return recipe, to_words(raw)


def _json(data: str | bytes) -> Any:
    def without_duplicates(pairs):
        check(len(dict(pairs)) == len(pairs), "it has a duplicate key")
        return dict(pairs)

    return json.loads(data, object_pairs_hook=without_duplicates)
