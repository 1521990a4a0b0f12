"""Files that hold a distilled set and everything needed to check its accuracy.

A file is in the safetensors format. Its metadata is one JSON text.
"""

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

from .._data._distilled_set import DistilledSet
from .._data._parameterisation import AbstractParameterisation
from .._data._preprocessing import AbstractPreprocessing
from .._outer._distillation import Distillation
from .._outer._evaluate import Evaluation
from ..datasets import _published_hashes
from ..recipes import Recipe
from ._table import (
    AbstractField,
    check,
    Content,
    flag,
    Instance,
    items,
    MAX_BYTES,
    NotInTable,
    number,
    Optional,
    Record,
    text,
    texts,
    to_words,
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


class _RecipeOrWords(AbstractField):
    """A recipe, and its description. A recipe that cannot be rebuilt is stored as
    text."""

    def encode(self, value, path, tensors):
        try:
            return Instance(Recipe).encode(value, path, tensors)
        except NotInTable:
            return {"text": eqx.tree_pformat(value)[:2000]}

    def decode(self, raw, path, content):
        if type(raw) is dict and set(raw) == {"text"}:
            return None, text.decode(raw["text"], path, content)
        try:
            return Instance(Recipe).decode(raw, path, content), to_words(raw)
        except NotInTable:
            return None, to_words(raw)[:2000]


class _Key(AbstractField):
    """A `jax.random.key`, as the name of its generator and its words."""

    words: AbstractField = items(number(0, 2**32 - 1), 4)

    def encode(self, value, path, tensors):
        return [str(jr.key_impl(value)), *np.asarray(jr.key_data(value)).tolist()]

    def decode(self, raw, path, content):
        lengths = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
        check(
            type(raw) is list
            and raw[:1] in [[name] for name in lengths]
            and len(raw) == 1 + lengths[raw[0]],
            f"`{path}` must be the name of a generator and its words; got {raw!r}",
        )
        words = self.words.decode(raw[1:], path, content)
        return jr.wrap_key_data(jnp.asarray(words, jnp.uint32), impl=raw[0])


_START = Instance(AbstractParameterisation)
_REST = Record(
    {
        "preprocessing": Optional(Instance(AbstractPreprocessing)),
        "evaluation": Optional(
            Record(
                {
                    "recipe": _RecipeOrWords(),
                    "accuracy": number(0.0, 1.0),
                    "std": Optional(number(0.0, 1.0)),
                    "num_models": number(1, 1000),
                    "key": _Key(),
                }
            )
        ),
        "dataset": Optional(text),
        "sha256": texts,
        "learned": Optional(items(text, 1000)),
        "seed": Optional(number(-(2**63), 2**63 - 1)),
        "x64": flag,
        "versions": texts,
    }
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
    start, learned = result, None
    if isinstance(result, Distillation):
        start, learned = result.start, result.learned
    tensors: dict[str, np.ndarray] = {}
    rest = {
        "preprocessing": preprocessing,
        "evaluation": None if evaluation is None else _claim(evaluation),
        "dataset": dataset,
        "sha256": {} if dataset is None else _published_hashes(dataset),
        "learned": learned,
        "seed": None if seed is None else int(seed),
        "x64": jnp.result_type(float) == jnp.float64,
        "versions": {package: _version(package) for package in _PACKAGES},
    }
    try:
        metadata = {"start": _encode_start(start, tensors)}
        metadata |= _REST.encode(rest, "", tensors)
        data = safetensors.numpy.save(tensors, {_KEY: json.dumps(metadata)})
        _read(data)  # What could not be loaded is not written.
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


def _encode_start(start: AbstractParameterisation, tensors: dict) -> Any:
    try:
        return _START.encode(start, "start", tensors)
    except NotInTable:
        return Instance(DistilledSet).encode(start.decode(), "start", tensors)


def _claim(evaluation: Evaluation) -> dict[str, Any]:
    sets, num_models = evaluation.accuracies.shape
    if sets != 1:
        raise ValueError(
            f"`evaluation` must be of the one set that is saved; got {sets} sets."
        )
    return {
        "recipe": evaluation.recipe,
        "accuracy": evaluation.accuracy,
        "std": evaluation.std_models if num_models > 1 else None,
        "num_models": num_models,
        "key": evaluation.key,
    }


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
    metadata = _json(raw[_KEY], "metadata")
    check(
        type(metadata) is dict and "start" in metadata,
        "its metadata must be an object with a `start`",
    )
    content = Content(_tensors(header, data), len(data))
    start = _START.decode(metadata.pop("start"), "start", content)
    content.distilled = distilled = _decode_images(start, content)
    rest = _REST.decode(metadata, "", content)
    check(not content.unread, f"it has unknown tensors: {sorted(content.unread)}")
    _check_preprocessing(rest["preprocessing"], distilled)
    claim = rest.pop("evaluation")
    if claim is None:
        nothing = {"recipe": (None, None), "accuracy": None, "std": None}
        claim = {**nothing, "num_models": 0, "key": None}
    else:
        is_one = claim["num_models"] == 1
        check((claim["std"] is None) == is_one, "its `std` must be over several models")
    recipe, description = claim.pop("recipe")
    return Artifact(
        distilled=distilled,
        start=start,
        recipe=recipe,
        recipe_description=description,
        **claim,
        **rest,
    )


def _decode_images(start: AbstractParameterisation, content: Content) -> DistilledSet:
    try:
        images = jax.eval_shape(start.decode).images
        content.reserve("start", images.size * images.dtype.itemsize)
        distilled = start.decode()
    except TypeError as e:
        raise ValueError(f"`start`: {e}") from e
    is_finite = bool(jnp.isfinite(distilled.images).all())
    check(is_finite, "its images must be finite; some pixels are not")
    return distilled


def _tensors(header: dict[str, Any], data: bytes) -> dict[str, np.ndarray]:
    for name, entry in header.items():
        check(type(entry) is dict, f"the entry of `{name}` must be a JSON object")
        dtype, shape = entry.get("dtype"), entry.get("shape")
        check(
            dtype in _DTYPES,
            f"`{name}` must have one of the dtypes {', '.join(_DTYPES)}; got {dtype!r}",
        )
        is_size = number(1, MAX_BYTES).is_valid
        check(
            type(shape) is list and len(shape) <= 8 and all(map(is_size, shape)),
            f"`{name}` must have at most 8 axes, none of them empty; got shape {shape}",
        )
    try:
        return safetensors.numpy.load(data)
    except safetensors.SafetensorError as e:
        raise ValueError(f"it is not a valid safetensors file ({e})") from e


def _check_preprocessing(
    preprocessing: AbstractPreprocessing | None, distilled: DistilledSet
) -> None:
    """Checks that a preprocessing can be undone on an image."""
    if preprocessing is None:
        return
    image = jax.ShapeDtypeStruct(distilled.images.shape[1:], distilled.images.dtype)
    try:
        found = eqx.filter_eval_shape(preprocessing.inverse, image)
    except (TypeError, ValueError) as e:
        raise ValueError(f"its preprocessing does not suit its images: {e}") from e
    check(found.shape == image.shape, "its preprocessing has another shape than images")
