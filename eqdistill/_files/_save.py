import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import safetensors.numpy
from jaxtyping import PyTree

from .._classifier import takes_pixels
from .._conversions import as_int_or_none
from .._data._distilled_set import DistilledSet
from .._data._frequencies import Frequencies
from .._data._packed import Packed
from .._data._preprocessing import AbstractPreprocessing
from .._data._sources import SOURCES
from .._inner._auto_solver import AutoSolver
from .._inner._fit import check_inner
from .._inner._inner_solver import AbstractInnerSolver
from .._losses import AbstractLoss, CrossEntropy, SquaredError
from .._outer._distillation import Distillation
from .._outer._evaluate import Evaluation
from .._outer._outer_loss import decode
from .._outer._recipe import Evaluations, Recipe
from ._artifact import build, shorten
from ._metadata import (
    FORMAT,
    FORMAT_VERSION,
    is_inner,
    LOSSES,
    PARAMETERISATIONS,
    PREPROCESSINGS,
    read_header,
    SOLVERS,
)
from ._recipe_format import describe_recipe
from ._tensors import preprocessing_tensors, TENSORS


_PACKAGES = (
    "eqdistill",
    "jax",
    "jaxlib",
    "equinox",
    "optimistix",
    "lineax",
    "optax",
    "numpy",
)


def save(
    path: str | os.PathLike,
    result: Distillation | DistilledSet | Packed | Frequencies,
    model: PyTree,
    evaluation: Evaluation | Evaluations | None = None,
    *,
    inner: AbstractInnerSolver = AutoSolver(),
    preprocessing: AbstractPreprocessing | None = None,
    dataset: str | None = None,
    seed: int | None = None,
) -> None:
    """Saves a distilled set to one file, with all that a stranger needs to check it:
    the model and the inner solver, the dataset and its checksums, the accuracy
    that is claimed, and the versions of the packages.

    The file is in the safetensors format, which holds arrays and text but no code.

    **Arguments:**

    - `path`: where to write. Must end in `.safetensors`. A file that is there already
        is replaced, once all of the new one is on disk.
    - `result`: what [`eqdistill.distill`][] returned, which knows what was learned; or
        a distilled set. Of an [`eqdistill.Packed`][] or [`eqdistill.Frequencies`][]
        the small images or the coefficients are stored; of any other parameterisation,
        the images that it decodes to.
    - `model`: the model of `evaluation`, fitted or not. An
        [`eqdistill.LogisticRegression`][] can be built again from the file; of any
        other, only the name of its type is kept. Or the
        [`eqdistill.recipes.Recipe`][] of `evaluation`, which can be built again with
        the networks of `eqdistill.nn`.
    - `evaluation`: what [`eqdistill.evaluate`][] returned for the test split, or
        [`eqdistill.recipes.evaluate`][] for one set: the accuracy that the file
        claims. Defaults to no claim.

    All other arguments are keyword only.

    - `inner`: the inner solver that `evaluation` was made with. It can be built again
        if it is a solver of this package with the default settings, except for numbers:
        tolerances from 0 to 1, and at most 1,000,000 steps. Of any other, only a
        description is kept.
    - `preprocessing`: the [`eqdistill.Standardisation`][] or [`eqdistill.ZCA`][] that
        the real images went through. The distilled images are in its units.
    - `dataset`: the name of the dataset, as in [`eqdistill.datasets.load`][].
    - `seed`: the seed of the run.

    **Raises:**

    - A `ValueError` if `path` does not end in `.safetensors`, or if the file could not
        be loaded again: above all, if a value is not finite.
    - A `FileNotFoundError` if the folder does not exist.
    - A `TypeError` or `ValueError` as [`eqdistill.fit`][].
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in '.safetensors'; got {str(path)!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must be in a folder that exists; got {str(path)!r}."
        )
    is_result = isinstance(result, Distillation)
    start = result.start if is_result else result
    if not is_result and not hasattr(start, "decode"):
        raise TypeError(
            "`result` must be what `distill` returned, or a distilled set; got a "
            f"{type(start).__name__}."
        )
    distilled = decode(start)
    is_by_recipe = isinstance(model, Recipe)
    if is_by_recipe:
        description = describe_recipe(model, distilled)
    else:
        distilled = check_inner(distilled, model, inner)
        description = _describe_classifier(model, distilled)
    stored, parameterisation = _describe_start(start, distilled)
    loss = _describe_loss(distilled.loss)
    described = _describe_preprocessing(preprocessing)
    source = SOURCES.get(dataset) if dataset is not None else None
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": description,
        "inner": None if is_by_recipe else _describe_inner(inner),
        "accuracy": None
        if evaluation is None
        else _describe_claim(evaluation, is_by_recipe),
        "dataset": None
        if dataset is None
        else {"name": dataset, "sha256": {} if source is None else source.sha256},
        "loss": loss,
        "preprocessing": described,
        "parameterisation": parameterisation,
        "learned": result.learned if is_result else None,
        "seed": as_int_or_none(seed),
        "x64": jnp.result_type(float) == jnp.float64,
        "versions": {package: _version(package) for package in _PACKAGES},
    }
    # The writer takes memory as it lies, hence the order.
    tensors = {name: np.array(getattr(stored, name), order="C") for name in TENSORS}
    for name in LOSSES[loss]:
        tensors[name] = np.array(getattr(stored.loss, name))
    for name, field in preprocessing_tensors(described).items():
        tensors[name] = np.array(getattr(preprocessing, field), order="C")
    data = safetensors.numpy.save(
        tensors, {key: json.dumps(value) for key, value in metadata.items()}
    )
    try:
        # What could not be loaded is not written.
        build(data, *read_header(data))
    except ValueError as e:
        raise ValueError(f"Cannot save {path}: {shorten(e)}.") from e
    # A folder, rather than a file, so that the file gets the permissions of any other.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def _describe_classifier(model: PyTree, distilled: DistilledSet) -> dict[str, Any]:
    if takes_pixels(model):
        num_classes, in_features = model.head.weight.shape
        return {
            "type": "LogisticRegression",
            "in_features": in_features,
            "num_classes": num_classes,
            "use_intercept": model.head.bias is not None,
        }
    network = eqx.nn.inference_mode(model)
    logits = eqx.filter_eval_shape(network, distilled.images[0])
    return {"type": _type_name(model), "num_classes": logits.shape[0]}


def _describe_claim(
    evaluation: Evaluation | Evaluations, is_by_recipe: bool
) -> dict[str, Any]:
    """**Raises:**

    A `TypeError` for a claim of the wrong kind, and a `ValueError` for one about
    several sets, of which a file holds one.
    """
    if isinstance(evaluation, Evaluations) != is_by_recipe:
        raise TypeError(
            "`evaluation` must be of `eqdistill.recipes.evaluate` for a recipe, and of "
            "`eqdistill.evaluate` for a model; got an "
            f"`{type(evaluation).__name__}`."
        )
    if isinstance(evaluation, Evaluation):
        accuracy, deviation, fits, key = float(evaluation.accuracy), None, 1, None
    else:
        sets, fits = evaluation.accuracies.shape
        if sets != 1:
            raise ValueError(
                f"`evaluation` must be of one distilled set to be saved; got {sets}."
            )
        accuracy = evaluation.mean
        deviation = evaluation.deviation_of_networks if fits > 1 else None
        key = evaluation.key
        key = None if key is None else np.asarray(jr.key_data(key)).tolist()
    return {
        "value": accuracy,
        "split": "test",
        "deviation": deviation,
        "fits": fits,
        "key": key,
    }


def _describe_inner(inner: AbstractInnerSolver) -> dict[str, Any]:
    name = type(inner).__name__
    if name in SOLVERS:
        cls, plain = SOLVERS[name]
        fields = {field: getattr(inner, field, None) for field in plain}
        is_plain = all(type(x) in (int, float, type(None)) for x in fields.values())
        # Nothing that the fields do not tell may have been changed.
        is_told = type(inner) is cls and is_plain
        is_told = is_told and eqx.tree_equal(cls(**fields), inner)
        words = {"type": name, **fields}
        if is_told and is_inner(words):
            return words
    return {"type": _type_name(inner), "text": eqx.tree_pformat(inner)}


def _describe_start(
    start: PyTree, distilled: DistilledSet
) -> tuple[DistilledSet, dict[str, Any] | None]:
    """What is stored, and the parameterisation that it is stored as."""
    name = type(start).__name__
    if name not in PARAMETERISATIONS or type(start) is not PARAMETERISATIONS[name][0]:
        return distilled, None
    stored = getattr(start, PARAMETERISATIONS[name][1])
    return stored, {"type": name, "shape": start.shape}


def _describe_loss(loss: AbstractLoss) -> str:
    """**Raises:**

    A `TypeError` for a loss that no file can hold.
    """
    name = type(loss).__name__
    if type(loss) not in (CrossEntropy, SquaredError):
        raise TypeError(
            "`result` must have `CrossEntropy` or `SquaredError` as its loss to be "
            f"saved; got `{name}`."
        )
    return name


def _describe_preprocessing(
    preprocessing: AbstractPreprocessing | None,
) -> dict[str, Any] | None:
    """**Raises:**

    A `TypeError` for a preprocessing that no file can hold.
    """
    if preprocessing is None:
        return None
    name = type(preprocessing).__name__
    if name not in PREPROCESSINGS or type(preprocessing) is not PREPROCESSINGS[name][0]:
        raise TypeError(
            "`preprocessing` must be a `Standardisation` or a `ZCA` to be saved; got "
            f"a `{name}`."
        )
    plain = {field: getattr(preprocessing, field) for field in PREPROCESSINGS[name][2]}
    return {"type": name, **plain}


def _type_name(x: Any) -> str:
    """A name with a dot, unlike the names of what can be built again."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
