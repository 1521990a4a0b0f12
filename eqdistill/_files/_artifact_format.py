import json
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from .._classifier import LinearClassifier, LogisticRegression
from .._data._distilled_set import DistilledSet
from .._data._frequencies import Frequencies
from .._data._packed import Packed
from .._data._preprocessing import AbstractPreprocessing, Standardisation, ZCA
from .._inner._argmin_solver import ArgminSolver
from .._inner._auto_solver import AutoSolver
from .._inner._inner_solver import AbstractInnerSolver
from .._inner._ridge_solver import RidgeSolver
from .._inner._span_solver import SpanSolver
from .._losses import CrossEntropy, SquaredError
from ._recipe_format import is_integer, is_recipe


TENSORS = ("images", "labels", "log_l2")
_FLOATS = ("F32", "F64")
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
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
FORMAT = "eqdistill"
FORMAT_VERSION = 4
MAX_BYTES = 2**30
_MAX_HEADER_BYTES = 2**20
_MAX_INT = 2**31 - 1
# Beyond this the ridge is no normal number of single precision.
_MAX_LOG_L2 = 87.0
# The most pixels that a parameterisation makes of a number that is stored.
_MOST_PIXELS = 1024


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


def read(
    data: bytes,
) -> tuple[dict[str, Any], PyTree, AbstractPreprocessing | None]:
    """Checks the bytes of a file, and takes its metadata, its distilled set, or the
    parameterisation of one, and its preprocessing from them.

    **Raises:**

    A `ValueError` with the reason, as a clause.
    """
    header = _json(data[8 : 8 + header_bytes(data, len(data))], "its header")
    check(type(header) is dict, "its header must be a JSON object")
    metadata = _metadata(header.pop("__metadata__", None))
    own = preprocessing_tensors(metadata["preprocessing"])
    tensors = _tensors(header, (*TENSORS, *LOSSES[metadata["loss"]], *own), data)
    images, labels, log_l2 = (_canonical(tensors[name]) for name in TENSORS)
    num_classes = metadata["classifier"]["num_classes"]

    check(images.ndim >= 2, f"`images` must have shape (n, ...); got {images.shape}")
    check(np.isfinite(images).all(), "`images` must be finite; some pixels are not")
    n = images.shape[0]
    if labels.dtype.kind == "f":
        check(
            labels.shape == (n, num_classes),
            f"floating-point `labels` must have shape ({n}, {num_classes}); got "
            f"{labels.shape}",
        )
        check(np.isfinite(labels).all(), "`labels` must be finite; some are not")
    else:
        check(
            labels.shape == (n,),
            f"integer `labels` must have shape ({n},); got {labels.shape}",
        )
        # Before they are made narrower.
        low, high = int(tensors["labels"].min()), int(tensors["labels"].max())
        check(
            low >= 0 and high < num_classes,
            f"`labels` must be in [0, {num_classes}); got values from {low} to {high}",
        )
    check(log_l2.shape == (), f"`log_l2` must be a scalar; got shape {log_l2.shape}")
    check(
        abs(float(log_l2)) <= _MAX_LOG_L2,
        f"`log_l2` must be from {-_MAX_LOG_L2} to {_MAX_LOG_L2}; got {float(log_l2)}",
    )
    loss = CrossEntropy()
    if metadata["loss"] == "SquaredError":
        log_temperature = _canonical(tensors["log_temperature"])
        check(
            log_temperature.shape == () and abs(float(log_temperature)) <= _MAX_LOG_L2,
            "`log_temperature` must be a scalar from "
            f"{-_MAX_LOG_L2} to {_MAX_LOG_L2}; got {log_temperature}",
        )
        where = lambda loss: loss.log_temperature
        loss = eqx.tree_at(where, SquaredError(), jnp.asarray(log_temperature))
    # The logarithms are put in as they are: to take them of the ridge and of the
    # temperature again would round. Labels, too, which have been checked.
    distilled = DistilledSet(images, np.zeros(n, np.int32), l2=1.0, loss=loss)
    distilled = eqx.tree_at(
        lambda d: (d.labels, d.log_l2),
        distilled,
        (jnp.asarray(labels), jnp.asarray(log_l2)),
    )
    start, shape = distilled, images.shape[1:]
    if metadata["parameterisation"] is not None:
        name = metadata["parameterisation"]["type"]
        shape = tuple(metadata["parameterisation"]["shape"])
        check(
            math.prod(shape) <= _MOST_PIXELS * math.prod(images.shape[1:])
            and 8 * n * math.prod(shape) <= MAX_BYTES,
            f"its images must be at most {_MOST_PIXELS} times as large as what is "
            f"stored of shape {images.shape[1:]}, and have at most {MAX_BYTES} bytes; "
            f"got {n} of shape {shape}",
        )
        start = PARAMETERISATIONS[name][0](distilled, shape)
    preprocessing = None
    if metadata["preprocessing"] is not None:
        description = metadata["preprocessing"]
        make, fields, plain = PREPROCESSINGS[description["type"]]
        arrays = {f: _canonical(tensors[f"preprocessing.{f}"]) for f in fields}
        _check_preprocessing(arrays, shape)
        preprocessing = make(
            **{field: jnp.asarray(x) for field, x in arrays.items()},
            **{field: description[field] for field in plain},
        )
    return metadata, start, preprocessing


def preprocessing_tensors(description: dict[str, Any] | None) -> dict[str, str]:
    """The names of the tensors of a preprocessing in a file, and their fields."""
    fields = () if description is None else PREPROCESSINGS[description["type"]][1]
    return {f"preprocessing.{field}": field for field in fields}


def _check_preprocessing(arrays: dict[str, np.ndarray], shape: tuple[int, ...]) -> None:
    for name, x in arrays.items():
        check(np.isfinite(x).all(), f"`preprocessing.{name}` must be finite")
    pixels = math.prod(shape)
    if "whitening" in arrays:
        wanted = {"mean": shape, "whitening": (pixels, pixels)}
    else:
        channels = shape[0] if len(shape) == 3 else 1
        ones = (channels, *[1] * (len(shape) - 1))
        wanted = {"mean": ones, "deviation": ones}
        check(
            bool((arrays["deviation"] > 0).all()),
            "`preprocessing.deviation` must be positive",
        )
    for name, x in arrays.items():
        check(
            x.shape == wanted[name],
            f"`preprocessing.{name}` must have shape {wanted[name]}; got {x.shape}",
        )


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


def _tensors(
    header: dict[str, Any], names: tuple[str, ...], data: bytes
) -> dict[str, np.ndarray]:
    check(
        set(header) == set(names),
        f"its tensors must be {', '.join(names)}; got {sorted(header)}",
    )
    for name, entry in header.items():
        check(type(entry) is dict, f"the entry of `{name}` must be a JSON object")
        allowed = _FLOATS + _INTEGERS if name == "labels" else _FLOATS
        dtype, shape = entry.get("dtype"), entry.get("shape")
        check(
            dtype in allowed,
            f"`{name}` must have one of the dtypes {', '.join(allowed)}; got {dtype!r}",
        )
        check(
            type(shape) is list
            and len(shape) <= 8
            and all(is_integer(x, 1, MAX_BYTES) for x in shape),
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
        recipe = metadata.get("classifier")
        if isinstance(recipe, dict) and {"network", "name"} <= set(recipe):
            # An older recipe of FRePo has no augmentation.
            default = {"augment": False} if recipe["name"] == "frepo" else {}
            metadata["classifier"] = {**default, **recipe}
    checks = {
        "format": (lambda x: True, ""),
        "format_version": (lambda x: True, ""),
        "classifier": (_is_classifier, "a classifier's `type` and sizes"),
        "inner": (
            lambda x: x is None or _is_inner(x),
            "null, or an inner solver's `type` and settings",
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
        type(x[field]) in (int, float) and 0 <= x[field] <= _MAX_INT for field in plain
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
        # It is about to be built: its weights may not fill the memory.
        and 8 * x["in_features"] * x["num_classes"] <= MAX_BYTES
    )


def _is_inner(x: Any) -> bool:
    if type(x) is not dict or type(x.get("type")) is not str:
        return False
    if x["type"] not in SOLVERS:
        return set(x) == {"type", "text"} and type(x["text"]) is str
    _, plain = SOLVERS[x["type"]]
    return set(x) == {"type", *plain} and all(
        is_integer(x[field], 1, _MAX_INT)
        if field == "max_steps"
        else x[field] is None
        or (type(x[field]) in (int, float) and 0 <= x[field] <= _MAX_INT)
        for field in plain
    )


def build_classifier(
    description: dict[str, Any], distilled: DistilledSet
) -> LinearClassifier | None:
    if description["type"] != "LogisticRegression":
        return None
    in_features = description["in_features"]
    pixels = math.prod(distilled.images.shape[1:])
    check(
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


def build_inner(description: dict[str, Any] | None) -> AbstractInnerSolver | None:
    if description is None or description["type"] not in SOLVERS:
        return None
    cls, plain = SOLVERS[description["type"]]
    # JSON does not tell 1.0 from 1, but type checks do.
    return cls(
        **{
            field: float(value) if field != "max_steps" and value is not None else value
            for field, value in ((field, description[field]) for field in plain)
        }
    )
