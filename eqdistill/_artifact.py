import importlib.metadata
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from ._argmin_solver import ArgminSolver
from ._auto_solver import AutoSolver
from ._checks import check_inner
from ._classifier import LogisticRegression
from ._distilled_set import DistilledSet
from ._evaluate import Evaluation
from ._inner_solver import AbstractInnerSolver
from ._span_solver import SpanSolver
from .datasets import _SOURCES


_TENSORS = ("images", "labels", "log_l2")
_FLOATS = ("F32", "F64")
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
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
# The inner solvers that can be built again, and which of their fields are plain.
_SOLVERS = {
    "AutoSolver": (AutoSolver, ()),
    "SpanSolver": (SpanSolver, ("rtol", "atol", "max_steps")),
    "ArgminSolver": (ArgminSolver, ("max_steps",)),
}
_FORMAT = "eqdistill"
_FORMAT_VERSION = 1
_MAX_BYTES = 2**30
_MAX_HEADER_BYTES = 2**20
_MAX_INT = 2**31 - 1
# Beyond this the ridge is no normal number of single precision.
_MAX_LOG_L2 = 87.0


class Artifact(eqx.Module):
    """A distilled set as it was published: what [`eqdistill.load`][] returns.

    **Attributes:**

    - `distilled`: the distilled set.
    - `classifier`: the classifier to fit to it, not fitted; or `None`, if it is not a
        [`eqdistill.LogisticRegression`][], for then it cannot be built from a file.
    - `inner`: how to fit it; or `None`, if it is not one of this package's solvers
        with plain numbers for its settings.
    - `classifier_description`, `inner_description`: the same two, in words.
    - `accuracy`: the accuracy on the test split that is claimed, from 0 to 1, or
        `None`.
    - `dataset`: the name of the dataset that was distilled, or `None`.
    - `sha256`: the SHA-256 of each of the dataset's files, if it has any.
    - `learned`: which of `"images"`, `"labels"` and `"log_l2"` were learned.
    - `seed`: the seed of the run, or `None`.
    - `x64`: whether JAX's double precision was enabled.
    - `versions`: the version of each package that took part.
    """

    distilled: DistilledSet
    classifier: LogisticRegression | None
    inner: AbstractInnerSolver | None
    classifier_description: str
    inner_description: str
    accuracy: float | None
    dataset: str | None
    sha256: dict[str, str]
    learned: tuple[str, ...]
    seed: int | None
    x64: bool
    versions: dict[str, str]


def save(
    path: str | os.PathLike,
    distilled: DistilledSet,
    classifier: PyTree,
    evaluation: Evaluation | None = None,
    *,
    inner: AbstractInnerSolver = AutoSolver(),
    dataset: str | None = None,
    learned: tuple[str, ...] = ("images",),
    seed: int | None = None,
) -> None:
    """Saves a distilled set to one file, with all that a stranger needs in order to
    check it: the classifier and the inner solver, the dataset and its checksums, the
    accuracy that is claimed, and the versions of the packages.

    The file is in the safetensors format, which holds arrays and text but no code.

    **Arguments:**

    - `path`: where to write. Must end in `.safetensors`. A file that is there already
        is replaced, once all of the new one is on disk.
    - `distilled`: the distilled set.
    - `classifier`: the classifier that `evaluation` was of. A
        [`eqdistill.LogisticRegression`][] can be built again from the file, fitted or
        not; of any other, only the name of its type is kept.
    - `evaluation`: what `eqdistill.evaluate` returned for the test split: the
        accuracy that the file claims. Defaults to no claim.

    All other arguments are keyword only.

    - `inner`: the inner solver that `evaluation` was made with. It can be built again
        if it is an [`eqdistill.AutoSolver`][], [`eqdistill.SpanSolver`][] or
        [`eqdistill.ArgminSolver`][] and its settings, but for numbers, are the
        defaults; of any other, only a description is kept.
    - `dataset`: the name of the dataset, as in [`eqdistill.datasets.load`][].
    - `learned`: which of `"images"`, `"labels"` and `"log_l2"` were learned. Defaults
        to what [`eqdistill.distill`][] learns by default.
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
    if not set(learned) <= set(_TENSORS):
        raise ValueError(
            f"`learned` must name some of {', '.join(_TENSORS)}; got {learned}."
        )
    distilled = check_inner(distilled, classifier)
    source = _SOURCES.get(dataset) if dataset is not None else None
    metadata = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "classifier": _describe_classifier(classifier, distilled),
        "inner": _describe_inner(inner),
        "accuracy": None
        if evaluation is None
        else {"value": float(evaluation.accuracy), "split": "test"},
        "dataset": None
        if dataset is None
        else {"name": dataset, "sha256": {} if source is None else source.sha256},
        "learned": learned,
        "seed": seed,
        "x64": jnp.result_type(float) == jnp.float64,
        "versions": {package: _version(package) for package in _PACKAGES},
    }
    # The writer takes memory as it lies, hence the order.
    tensors = {name: np.array(getattr(distilled, name), order="C") for name in _TENSORS}
    data = safetensors.numpy.save(
        tensors, {key: json.dumps(value) for key, value in metadata.items()}
    )
    try:
        # What could not be loaded is not written.
        _decode(data)
    except ValueError as e:
        raise ValueError(f"Cannot save {path}: {_shorten(e)}.") from e
    # A folder, rather than a file, so that the file gets the permissions of any other.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def load(path: str | os.PathLike) -> Artifact:
    """Loads a distilled set from a file that [`eqdistill.save`][] wrote.

    Safe for files from strangers: everything in the file is checked, and nothing in it
    is executed or imported.

    **Arguments:**

    - `path`: the file.

    **Returns:**

    An [`eqdistill.Artifact`][]. Double precision is kept if JAX has it enabled, and
    otherwise becomes single precision.

    **Raises:**

    - A `FileNotFoundError` if there is no such file.
    - A `ValueError`, which names the file and what is wrong with it, if it is not as
        [`eqdistill.save`][] writes it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must be a file that exists; got {str(path)!r}."
        )
    try:
        # Devices and pipes may have no end.
        _check(path.is_file(), "it is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check(
                size <= _MAX_BYTES,
                f"it must have at most {_MAX_BYTES} bytes, and has {size}",
            )
            start = file.read(8)
            _header_bytes(start, size)
            data = start + file.read(size - len(start))
        return _decode(data)
    except ValueError as e:
        raise ValueError(f"Cannot load {path}: {_shorten(e)}.") from e


def _describe_classifier(classifier: PyTree, distilled: DistilledSet) -> dict[str, Any]:
    if type(classifier) is LogisticRegression:
        in_features, num_classes = classifier.weights.shape
        return {
            "type": "LogisticRegression",
            "in_features": in_features,
            "num_classes": num_classes,
            "use_intercept": classifier.intercept is not None,
        }
    logits = eqx.filter_eval_shape(classifier, distilled.images[0])
    return {"type": _type_name(classifier), "num_classes": logits.shape[0]}


def _describe_inner(inner: AbstractInnerSolver) -> dict[str, Any]:
    name = type(inner).__name__
    if name in _SOLVERS:
        cls, plain = _SOLVERS[name]
        fields = {field: getattr(inner, field, None) for field in plain}
        is_plain = all(type(x) in (int, float, type(None)) for x in fields.values())
        # Nothing that the fields do not tell may have been changed.
        if type(inner) is cls and is_plain and eqx.tree_equal(cls(**fields), inner):
            return {"type": name, **fields}
    return {"type": _type_name(inner), "text": eqx.tree_pformat(inner)}


def _type_name(x: Any) -> str:
    """Always with a dot, unlike the names of what can be built again."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _shorten(e: ValueError) -> str:
    """The reason of a refusal, without most of what a hostile file makes it quote."""
    reason = str(e)
    return reason if len(reason) <= 500 else f"{reason[:500]} ..."


def _check(ok: bool | np.bool_, reason: str) -> None:
    if not ok:
        raise ValueError(reason)


def _header_bytes(start: bytes, size: int) -> int:
    """The length of the header, which the first eight bytes tell."""
    _check(size >= 8, f"it is too short for a safetensors file: {size} bytes")
    length = int.from_bytes(start[:8], "little")
    _check(
        length <= min(_MAX_HEADER_BYTES, size - 8),
        "it is truncated or not a safetensors file: its header would have "
        f"{length} bytes, where at most {_MAX_HEADER_BYTES} are allowed and "
        f"{size - 8} are there",
    )
    return length


def _decode(data: bytes) -> Artifact:
    """Checks and builds an artifact from the bytes of a file.

    **Raises:**

    A `ValueError` with the reason, as a clause.
    """
    header = _json(data[8 : 8 + _header_bytes(data, len(data))], "its header")
    _check(type(header) is dict, "its header must be a JSON object")
    metadata = _metadata(header.pop("__metadata__", None))
    tensors = _tensors(header, data)
    images, labels, log_l2 = (_canonical(tensors[name]) for name in _TENSORS)
    num_classes = metadata["classifier"]["num_classes"]

    _check(images.ndim >= 2, f"`images` must have shape (n, ...); got {images.shape}")
    _check(np.isfinite(images).all(), "`images` must be finite; some pixels are not")
    n = images.shape[0]
    if labels.dtype.kind == "f":
        _check(
            labels.shape == (n, num_classes),
            f"floating-point `labels` must have shape ({n}, {num_classes}); got "
            f"{labels.shape}",
        )
        _check(np.isfinite(labels).all(), "`labels` must be finite; some are not")
    else:
        _check(
            labels.shape == (n,),
            f"integer `labels` must have shape ({n},); got {labels.shape}",
        )
        # Before they are made narrower.
        low, high = int(tensors["labels"].min()), int(tensors["labels"].max())
        _check(
            low >= 0 and high < num_classes,
            f"`labels` must be in [0, {num_classes}); got values from {low} to {high}",
        )
    _check(log_l2.shape == (), f"`log_l2` must be a scalar; got shape {log_l2.shape}")
    _check(
        abs(float(log_l2)) <= _MAX_LOG_L2,
        f"`log_l2` must be from {-_MAX_LOG_L2} to {_MAX_LOG_L2}; got {float(log_l2)}",
    )
    distilled = eqx.tree_at(
        # Not by way of the ridge itself: that would round.
        lambda d: d.log_l2,
        DistilledSet(images, labels),
        jnp.asarray(log_l2),
    )
    accuracy, dataset = metadata["accuracy"], metadata["dataset"]
    return Artifact(
        distilled=distilled,
        classifier=_build_classifier(metadata["classifier"], distilled),
        inner=_build_inner(metadata["inner"]),
        classifier_description=_in_words(metadata["classifier"]),
        inner_description=_in_words(metadata["inner"]),
        accuracy=None if accuracy is None else float(accuracy["value"]),
        dataset=None if dataset is None else dataset["name"],
        sha256={} if dataset is None else dataset["sha256"],
        learned=tuple(metadata["learned"]),
        seed=metadata["seed"],
        x64=metadata["x64"],
        versions=metadata["versions"],
    )


def _json(data: str | bytes, name: str) -> Any:
    def unique(pairs):
        result = dict(pairs)
        _check(len(result) == len(pairs), "it has a key twice")
        return result

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{name} is not JSON that can be read ({e})") from e


def _tensors(header: dict[str, Any], data: bytes) -> dict[str, np.ndarray]:
    _check(
        set(header) == set(_TENSORS),
        f"its tensors must be {', '.join(_TENSORS)}; got {sorted(header)}",
    )
    for name, entry in header.items():
        _check(type(entry) is dict, f"the entry of `{name}` must be a JSON object")
        allowed = _FLOATS + _INTEGERS if name == "labels" else _FLOATS
        dtype, shape = entry.get("dtype"), entry.get("shape")
        _check(
            dtype in allowed,
            f"`{name}` must have one of the dtypes {', '.join(allowed)}; got {dtype!r}",
        )
        _check(
            type(shape) is list
            and len(shape) <= 8
            and all(_is_integer(x, 1, _MAX_BYTES) for x in shape),
            f"`{name}` must have at most 8 axes, none of them empty; got shape {shape}",
        )
    try:
        return safetensors.numpy.load(data)
    except safetensors.SafetensorError as e:
        raise ValueError(f"it is not a valid safetensors file ({e})") from e


def _canonical(x: np.ndarray) -> np.ndarray:
    """In the precision that JAX will give it."""
    with np.errstate(over="ignore", invalid="ignore"):  # It is checked thereafter.
        return x.astype(jax.dtypes.canonicalize_dtype(x.dtype))


def _metadata(raw: Any) -> dict[str, Any]:
    """What the file says about itself, with the keys and types that it should have."""
    _check(
        _is_texts(raw),
        "it must have metadata that map strings to strings",
    )
    metadata = {key: _json(text, f"its metadata {key!r}") for key, text in raw.items()}
    name, version = metadata.get("format"), metadata.get("format_version")
    _check(name == _FORMAT, f"its `format` must be {_FORMAT!r}; got {name!r}")
    _check(
        type(version) is int and version == _FORMAT_VERSION,
        f"its `format_version` must be {_FORMAT_VERSION}, which is all that this "
        f"version of eqdistill can read; got {version!r}",
    )
    checks = {
        "format": (lambda x: True, ""),
        "format_version": (lambda x: True, ""),
        "classifier": (_is_classifier, "a classifier's `type` and sizes"),
        "inner": (_is_inner, "an inner solver's `type` and settings"),
        "accuracy": (
            lambda x: x is None or _is_accuracy(x),
            "null, or a `value` from 0 to 1 on the `split` 'test'",
        ),
        "dataset": (
            lambda x: x is None or _is_dataset(x),
            "null, or a `name` and the `sha256` of each file",
        ),
        "learned": (
            lambda x: (
                type(x) is list
                and all(name in _TENSORS for name in x)
                and len(set(x)) == len(x)
            ),
            f"a list of some of {', '.join(_TENSORS)}",
        ),
        "seed": (lambda x: x is None or type(x) is int, "null or an integer"),
        "x64": (lambda x: type(x) is bool, "true or false"),
        "versions": (_is_texts, "a version for each package"),
    }
    _check(
        set(metadata) == set(checks),
        f"its metadata must have the keys {sorted(checks)}; got {sorted(metadata)}",
    )
    for key, (is_valid, wanted) in checks.items():
        value = metadata[key]
        _check(is_valid(value), f"its metadata `{key}` must be {wanted}; got {value!r}")
    return metadata


def _is_integer(x: Any, low: int, high: int) -> bool:
    return type(x) is int and low <= x <= high


def _is_texts(x: Any) -> bool:
    return type(x) is dict and all(type(text) is str for text in x.values())


def _is_accuracy(x: Any) -> bool:
    return (
        type(x) is dict
        and set(x) == {"value", "split"}
        and type(x["value"]) in (int, float)
        and 0 <= x["value"] <= 1
        and x["split"] == "test"
    )


def _is_dataset(x: Any) -> bool:
    return (
        type(x) is dict
        and set(x) == {"name", "sha256"}
        and type(x["name"]) is str
        and _is_texts(x["sha256"])
    )


def _is_classifier(x: Any) -> bool:
    if type(x) is not dict or type(x.get("type")) is not str:
        return False
    if not _is_integer(x.get("num_classes"), 1, _MAX_INT):
        return False
    if x["type"] != "LogisticRegression":
        return set(x) == {"type", "num_classes"}
    return (
        set(x) == {"type", "in_features", "num_classes", "use_intercept"}
        and _is_integer(x["in_features"], 1, _MAX_INT)
        and type(x["use_intercept"]) is bool
        # It is about to be built: its weights may not fill the memory.
        and 8 * x["in_features"] * x["num_classes"] <= _MAX_BYTES
    )


def _is_inner(x: Any) -> bool:
    if type(x) is not dict or type(x.get("type")) is not str:
        return False
    if x["type"] not in _SOLVERS:
        return set(x) == {"type", "text"} and type(x["text"]) is str
    _, plain = _SOLVERS[x["type"]]
    return set(x) == {"type", *plain} and all(
        _is_integer(x[field], 1, _MAX_INT)
        if field == "max_steps"
        else x[field] is None
        or (type(x[field]) in (int, float) and 0 <= x[field] <= _MAX_INT)
        for field in plain
    )


def _build_classifier(
    description: dict[str, Any], distilled: DistilledSet
) -> LogisticRegression | None:
    if description["type"] != "LogisticRegression":
        return None
    in_features = description["in_features"]
    pixels = math.prod(distilled.images.shape[1:])
    _check(
        in_features == pixels,
        f"its classifier must have `in_features` = {pixels}, the pixels of an image; "
        f"got {in_features}",
    )
    return LogisticRegression(
        in_features,
        description["num_classes"],
        use_intercept=description["use_intercept"],
        dtype=distilled.images.dtype,
    )


def _build_inner(description: dict[str, Any]) -> AbstractInnerSolver | None:
    if description["type"] not in _SOLVERS:
        return None
    cls, plain = _SOLVERS[description["type"]]
    # JSON does not tell 1.0 from 1, but type checks do.
    return cls(
        **{
            field: float(value) if field != "max_steps" and value is not None else value
            for field, value in ((field, description[field]) for field in plain)
        }
    )


def _in_words(description: dict[str, Any]) -> str:
    if "text" in description:
        return description["text"]
    fields = (f"{k}={v!r}" for k, v in description.items() if k != "type")
    return f"{description['type']}({', '.join(fields)})"
