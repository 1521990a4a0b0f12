"""What a file says about itself: its header, which is JSON, and the metadata in it."""

import json
from typing import Any

import numpy as np

from .._data._frequencies import Frequencies
from .._data._packed import Packed
from .._data._preprocessing import Standardisation, ZCA
from .._inner._argmin_solver import ArgminSolver
from .._inner._auto_solver import AutoSolver
from .._inner._ridge_solver import RidgeSolver
from .._inner._span_solver import SpanSolver
from ._recipe_format import is_integer, is_recipe


FORMAT = "eqdistill"
FORMAT_VERSION = 4
MAX_BYTES = 2**30
_MAX_HEADER_BYTES = 2**20
_MAX_INT = 2**31 - 1
# The losses, and the tensors that each has.
LOSSES = {"CrossEntropy": (), "SquaredError": ("log_temperature",)}
# The kinds of preprocessing, and the tensors and the numbers that each has.
PREPROCESSINGS = {
    "Standardisation": (Standardisation, ("mean", "deviation"), ()),
    "ZCA": (ZCA, ("mean", "whitening"), ("regularisation",)),
}
# The parameterisations, and the field of each that is stored in the place of images,
# labels and ridge.
PARAMETERISATIONS = {
    "Packed": (Packed, "small"),
    "Frequencies": (Frequencies, "coefficients"),
}
# The inner solvers that can be built again, and which of their fields are numbers.
SOLVERS = {
    "AutoSolver": (AutoSolver, ()),
    "SpanSolver": (SpanSolver, ("rtol", "atol", "max_steps")),
    "RidgeSolver": (RidgeSolver, ()),
    "ArgminSolver": (ArgminSolver, ("max_steps", "tolerance")),
}
# The range of each of these numbers. The type of the bounds is that of the number.
_RANGES = {
    "rtol": (0.0, 1.0),
    "atol": (0.0, 1.0),
    "max_steps": (1, 1_000_000),
    "tolerance": (0.0, 1.0),
    "regularisation": (0.0, 1e9),
}


def check(ok: bool | np.bool_, reason: str) -> None:
    if not ok:
        raise ValueError(reason)


def header_bytes(start: bytes, size: int) -> int:
    """The length of the header, which the first eight bytes tell."""
    check(size >= 8, f"it is too short for a safetensors file: {size} bytes")
    length = int.from_bytes(start[:8], "little")
    check(
        length <= min(_MAX_HEADER_BYTES, size - 8),
        "it is truncated or not a safetensors file: its header would have "
        f"{length} bytes, where at most {_MAX_HEADER_BYTES} are allowed and "
        f"{size - 8} are there",
    )
    return length


def read_header(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of the tensors in the bytes of a file, and the metadata.

    **Raises:**

    A `ValueError` with the reason, as a clause.
    """
    header = _json(data[8 : 8 + header_bytes(data, len(data))], "its header")
    check(type(header) is dict, "its header must be a JSON object")
    return header, _metadata(header.pop("__metadata__", None))


def _json(data: str | bytes, name: str) -> Any:
    def unique(pairs):
        result = dict(pairs)
        check(len(result) == len(pairs), "it has a key twice")
        return result

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{name} is not JSON that can be read ({e})") from e


def _metadata(raw: Any) -> dict[str, Any]:
    """What the file says about itself, with the keys and types that it should have."""
    check(
        _is_texts(raw),
        "it must have metadata that map strings to strings",
    )
    metadata = {key: _json(text, f"its metadata {key!r}") for key, text in raw.items()}
    name, version = metadata.get("format"), metadata.get("format_version")
    check(name == FORMAT, f"its `format` must be {FORMAT!r}; got {name!r}")
    check(
        type(version) is int and 1 <= version <= FORMAT_VERSION,
        f"its `format_version` must be from 1 to {FORMAT_VERSION}, which is all that "
        f"this version of eqdistill can read; got {version!r}",
    )
    if version == 1:  # All were of this loss.
        metadata.setdefault("loss", "CrossEntropy")
    if version != FORMAT_VERSION and type(metadata.get("accuracy")) is dict:
        # All were of one fit.
        one = {"deviation": None, "fits": 1, "key": None}
        metadata["accuracy"] = {**one, **metadata["accuracy"]}
    if version != FORMAT_VERSION:
        metadata.setdefault("preprocessing", None)
        metadata.setdefault("parameterisation", None)
        recipe = metadata.get("model")
        if isinstance(recipe, dict) and {"network", "name"} <= set(recipe):
            # An older recipe of FRePo has no augmentation.
            default = {"augment": False} if recipe["name"] == "frepo" else {}
            metadata["model"] = {**default, **recipe}
    checks = {
        "format": (lambda x: True, ""),
        "format_version": (lambda x: True, ""),
        "model": (_is_classifier, "a model's `type` and sizes"),
        "inner": (
            lambda x: x is None or is_inner(x),
            "null, or an inner solver's `type` and settings in their ranges",
        ),
        "accuracy": (
            lambda x: x is None or _is_accuracy(x),
            "null, or a `value` from 0 to 1 on the `split` 'test', its `deviation` "
            "over several `fits`, and their `key`",
        ),
        "dataset": (
            lambda x: x is None or _is_dataset(x),
            "null, or a `name` and the `sha256` of each file",
        ),
        "loss": (
            lambda x: type(x) is str and x in LOSSES,
            f"one of {', '.join(LOSSES)}",
        ),
        "preprocessing": (
            lambda x: x is None or _is_preprocessing(x),
            f"null, or the settings of a {' or a '.join(PREPROCESSINGS)}",
        ),
        "parameterisation": (
            lambda x: x is None or _is_parameterisation(x),
            f"null, or the `shape` of the images of {' or '.join(PARAMETERISATIONS)}",
        ),
        "learned": (
            lambda x: x is None or _are_names(x),
            "null, or a list of names",
        ),
        "seed": (
            lambda x: x is None or is_integer(x, -(2**63), 2**63 - 1),
            "null or an integer of 64 bits",
        ),
        "x64": (lambda x: type(x) is bool, "true or false"),
        "versions": (_is_texts, "a version for each package"),
    }
    check(
        set(metadata) == set(checks),
        f"its metadata must have the keys {sorted(checks)}; got {sorted(metadata)}",
    )
    for key, (is_valid, wanted) in checks.items():
        value = metadata[key]
        check(is_valid(value), f"its metadata `{key}` must be {wanted}; got {value!r}")
    return metadata


def _is_texts(x: Any) -> bool:
    return type(x) is dict and all(type(text) is str for text in x.values())


def _are_names(x: Any) -> bool:
    return (
        type(x) is list
        and all(type(name) is str and len(name) <= 200 for name in x)
        and len(set(x)) == len(x)
    )


def _is_accuracy(x: Any) -> bool:
    return (
        type(x) is dict
        and set(x) == {"value", "split", "deviation", "fits", "key"}
        and _is_fraction(x["value"])
        and x["split"] == "test"
        and is_integer(x["fits"], 1, 100)
        and (x["deviation"] is None) == (x["fits"] == 1)
        and (x["deviation"] is None or _is_fraction(x["deviation"]))
        and (x["key"] is None or _is_key(x["key"]))
    )


def _is_key(x: Any) -> bool:
    return (
        type(x) is list
        and len(x) == 2
        and all(is_integer(word, 0, 2**32 - 1) for word in x)
    )


def _is_preprocessing(x: Any) -> bool:
    if type(x) is not dict or type(x.get("type")) is not str:
        return False
    if x["type"] not in PREPROCESSINGS:
        return False
    _, _, plain = PREPROCESSINGS[x["type"]]
    return set(x) == {"type", *plain} and all(
        _is_in_range(field, x[field]) for field in plain
    )


def _is_parameterisation(x: Any) -> bool:
    return (
        type(x) is dict
        and set(x) == {"type", "shape"}
        and type(x["type"]) is str
        and x["type"] in PARAMETERISATIONS
        and type(x["shape"]) is list
        and 2 <= len(x["shape"]) <= 3
        and all(is_integer(size, 1, MAX_BYTES) for size in x["shape"])
    )


def _is_fraction(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x <= 1


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
    if not is_integer(x.get("num_classes"), 1, _MAX_INT):
        return False
    if x["type"] == "Recipe":
        return is_recipe(x)
    if x["type"] != "LogisticRegression":
        return set(x) == {"type", "num_classes"}
    return (
        set(x) == {"type", "in_features", "num_classes", "use_intercept"}
        and is_integer(x["in_features"], 1, _MAX_INT)
        and type(x["use_intercept"]) is bool
    )


def is_inner(x: Any) -> bool:
    """Whether a description is of an inner solver, with numbers in their ranges."""
    if type(x) is not dict or type(x.get("type")) is not str:
        return False
    if x["type"] not in SOLVERS:
        return set(x) == {"type", "text"} and type(x["text"]) is str
    cls, plain = SOLVERS[x["type"]]
    default = cls()
    return set(x) == {"type", *plain} and all(
        _is_in_range(field, x[field])
        or (x[field] is None and getattr(default, field) is None)
        for field in plain
    )


def _is_in_range(field: str, x: Any) -> bool:
    low, high = _RANGES[field]
    types = (int,) if type(low) is int else (int, float)
    return type(x) in types and low <= x <= high
