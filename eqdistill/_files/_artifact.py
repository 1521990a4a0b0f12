"""Files that hold a distilled set and everything needed to check its accuracy.

A file is in the safetensors format. Its metadata is one JSON text.
"""

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
    OR_WORDS,
    register,
    TABLE,
)


_KEY = "eqdistill"
_MAX_HEADER_BYTES = 2**20
_MAX_QUOTE = 500
_DTYPES = ("F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
_PACKAGES = (
    *("eqdistill", "jax", "jaxlib", "equinox", "optimistix", "lineax", "optax"),
    "numpy",
)


class Artifact(eqx.Module):
    """A published distilled set, as [`eqdistill.load`][] returns it.

    **Attributes:**

    - `distilled`: the distilled set.
    - `start`: the parameterisation that it was decoded from, such as an
        [`eqdistill.Packed`][]; or the distilled set itself.
    - `recipe`: the recipe that the accuracy was measured with, or `None` if it cannot
        be rebuilt from the file.
    - `recipe_description`: the recipe in words, or `None` if the file claims no
        accuracy.
    - `accuracy`: the claimed mean accuracy on the test split, from 0 to 1; or `None`.
    - `std`: the claimed standard deviation over models, or `None`.
    - `num_models`: the number of models that were trained. Zero without a claim.
    - `key`: the key of the models, or `None`.
    - `preprocessing`: the preprocessing of the real images, or `None`.
    - `dataset`: the name of the dataset that was distilled, or `None`.
    - `sha256`: the published SHA-256 of each file of the dataset.
    - `learned`: the names of the learned arrays, such as `"images"`; or `None` if they
        are not known.
    - `seed`: the seed of the run, or `None`.
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


def _build(start, recipe, **values) -> Artifact:
    distilled = start.decode()
    is_finite = np.isfinite(np.asarray(distilled.images)).all()
    check(is_finite, "its decoded images must be finite; some pixels are not")
    num_models, preprocessing = values["num_models"], values["preprocessing"]
    is_consistent = (values["std"] is not None) == (num_models > 1)
    is_consistent &= (values["accuracy"] is not None) == (num_models > 0)
    check(is_consistent, f"its accuracy must be of its {num_models} models")
    if preprocessing is not None:
        image = _image(distilled)
        found = eqx.filter_eval_shape(preprocessing.inverse, image).shape
        check(found == image.shape, "its preprocessing is for other images")
    return Artifact(distilled, start, *recipe, **values)


def _nbytes(start, recipe, **_) -> int:
    distilled = eqx.filter_eval_shape(start.decode)
    outputs = 0
    if recipe[0] is not None:
        models = recipe[0].models
        draw = lambda key: models.draw(models.init(distilled, key=key), key=key)
        model = eqx.filter_eval_shape(draw, jr.key(0))
        outputs = count_outputs("recipe", model, _image(distilled))
    return 8 * (distilled.images.size + len(distilled.images) * outputs)


def _image(distilled: DistilledSet) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(distilled.images.shape[1:], distilled.images.dtype)


register(
    Artifact,
    {
        "start": Any,
        "recipe": OR_WORDS,
        "accuracy": (0.0, 1.0),
        "std": (0.0, 1.0),
        "num_models": (0, 1000),
        "key": Any,
        "preprocessing": Any,
        "dataset": Any,
        "sha256": Any,
        "learned": Any,
        "seed": (-(2**63), 2**63 - 1),
        "x64": Any,
        "versions": Any,
    },
    build=_build,
    read=lambda x: vars(x) | {"recipe": x.recipe or x.recipe_description},
    nbytes=_nbytes,
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
    the versions of the packages.

    The file holds arrays and text, but no code. It is in the safetensors format.

    **Arguments:**

    - `path`: a file name that ends in `.safetensors`. An existing file is replaced
        once the new one is completely written.
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

    All other arguments are keyword only.

    - `preprocessing`: the preprocessing that was applied to the real images, such as
        an [`eqdistill.datasets.Standardisation`][]. The distilled images are in its
        units.
    - `dataset`: the name of the dataset, as in [`eqdistill.datasets.load`][].
    - `seed`: the seed of the run.

    **Raises:**

    - A `ValueError` if `path` does not end in `.safetensors`; if `evaluation` is of
        several sets; if the loss or the preprocessing is not registered; or if a value
        is not finite or out of range.
    - A `FileNotFoundError` if the folder does not exist.
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
    if type(start).__name__ not in TABLE:
        start = start.decode()
    num_models = 0 if evaluation is None else evaluation.accuracies.shape[1]
    artifact = Artifact(
        distilled=start.decode(),
        start=start,
        recipe=evaluation and evaluation.recipe,
        recipe_description=evaluation and eqx.tree_pformat(evaluation.recipe),
        accuracy=evaluation and evaluation.accuracy,
        std=evaluation.std_models if evaluation and num_models > 1 else None,
        num_models=num_models,
        key=evaluation and evaluation.key,
        preprocessing=preprocessing,
        dataset=dataset,
        sha256={} if dataset is None else _published_hashes(dataset),
        learned=result.learned if is_result else None,
        seed=None if seed is None else int(seed),
        x64=jnp.result_type(float) == jnp.float64,
        versions={package: _version(package) for package in _PACKAGES},
    )
    try:
        check(
            evaluation is None or len(evaluation.accuracies) == 1,
            "`evaluation` must be of one distilled set",
        )
        data = _to_bytes(artifact)
    except ValueError as e:
        raise ValueError(f"Cannot save {path}: {_shorten(e)}.") from e
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
    nothing in it is executed or imported. At most 16 times the size of the file and
    16 MiB are allocated for the decoded images and the model.

    **Arguments:**

    - `path`: the file.

    **Returns:**

    An [`eqdistill.Artifact`][]. Double precision becomes single precision unless JAX
    has double precision enabled.

    **Raises:**

    - A `FileNotFoundError` if there is no such file.
    - A `ValueError`, which names the file and the cause, if [`eqdistill.save`][] could
        not have written it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must be a file that exists; got {str(path)!r}."
        )
    try:
        # Devices and pipes may have no end.
        check(path.is_file(), "it is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            check(size <= MAX_BYTES, f"it has {size} bytes, more than {MAX_BYTES}")
            start = file.read(8)
            _header_bytes(start, size)
            return _read(start + file.read(size - len(start)))
    except ValueError as e:
        raise ValueError(f"Cannot load {path}: {_shorten(e)}.") from e


def _to_bytes(artifact: Artifact) -> bytes:
    """The content of a file, from which the same artifact is loaded.

    **Raises:**

    A `ValueError` with the reason, as a clause, if there is none.
    """
    try:
        data, loaded = _write(artifact)
        is_rebuilt = loaded.recipe is not None
        is_rebuilt = is_rebuilt and is_same_recipe(loaded.recipe, artifact.recipe)
    except ValueError:
        is_rebuilt = False
    if not is_rebuilt:
        data, loaded = _write(dataclasses.replace(artifact, recipe=None))
    for name in ("start", "preprocessing"):
        is_same = eqx.tree_equal(getattr(loaded, name), getattr(artifact, name))
        check(is_same, f"its {name} has fields that are not registered")
    return data


def _write(artifact: Artifact) -> tuple[bytes, Artifact]:
    tensors: dict[str, np.ndarray] = {}
    text = json.dumps(encode(artifact, "", tensors))
    data = safetensors.numpy.save(tensors, {_KEY: text})
    return data, _read(data)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _shorten(e: ValueError) -> str:
    """The reason of an error. Hostile files may make it long."""
    reason = str(e).rstrip(".")
    return reason if len(reason) <= _MAX_QUOTE else f"{reason[:_MAX_QUOTE]} ..."


def _header_bytes(start: bytes, size: int) -> int:
    """The length of the header, from the first eight bytes of a file."""
    check(size >= 8, f"it is too short for a safetensors file: {size} bytes")
    length = int.from_bytes(start[:8], "little")
    check(
        length <= min(_MAX_HEADER_BYTES, size - 8),
        "it is truncated or not a safetensors file: its header would have "
        f"{length} bytes, but at most {_MAX_HEADER_BYTES} are allowed and "
        f"{size - 8} are there",
    )
    return length


def _json(data: str | bytes, name: str) -> Any:
    def without_duplicates(pairs):
        result = dict(pairs)
        check(len(result) == len(pairs), "it has a duplicate key")
        return result

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"its {name} is not valid JSON ({e})") from e


def _read(data: bytes) -> Artifact:
    """Builds an artifact from the bytes of a file.

    **Raises:**

    A `ValueError` with the reason, as a clause.
    """
    header = _json(data[8 : 8 + _header_bytes(data, len(data))], "header")
    check(type(header) is dict, "its header must be a JSON object")
    raw = header.pop("__metadata__", None)
    check(
        type(raw) is dict and set(raw) == {_KEY} and type(raw[_KEY]) is str,
        f"its metadata must be one text with the key {_KEY!r}",
    )
    content = Content(_tensors(header, data), len(data))
    artifact = decode(_json(raw[_KEY], "metadata"), "", content)
    check(isinstance(artifact, Artifact), "its metadata must be of an `Artifact`")
    check(not content.tensors, f"it has other tensors: {sorted(content.tensors)}")
    return artifact


def _tensors(header: dict[str, Any], data: bytes) -> dict[str, np.ndarray]:
    for name, entry in header.items():
        check(type(entry) is dict, f"the entry of `{name}` must be a JSON object")
        dtype, shape = entry.get("dtype"), entry.get("shape")
        check(
            dtype in _DTYPES,
            f"`{name}` must have one of the dtypes {', '.join(_DTYPES)}; got {dtype!r}",
        )
        is_size = lambda x: type(x) is int and 1 <= x <= MAX_BYTES
        check(
            type(shape) is list and len(shape) <= 8 and all(map(is_size, shape)),
            f"`{name}` must have at most 8 axes, none of them empty; got shape {shape}",
        )
    try:
        return safetensors.numpy.load(data)
    except safetensors.SafetensorError as e:
        raise ValueError(f"it is not a valid safetensors file ({e})") from e
