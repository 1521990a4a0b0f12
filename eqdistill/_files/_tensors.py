"""The arrays of a file, and what is built of them.

What is built takes no more room than the size of the file allows.
"""

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
from .._data._preprocessing import AbstractPreprocessing
from .._inner._inner_solver import AbstractInnerSolver
from .._losses import CrossEntropy, SquaredError
from ._metadata import (
    check,
    LOSSES,
    MAX_BYTES,
    PARAMETERISATIONS,
    PREPROCESSINGS,
    SOLVERS,
)
from ._recipe_format import is_integer


TENSORS = ("images", "labels", "log_l2")
_FLOATS = ("F32", "F64")
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
# Beyond this the ridge is no normal number of single precision.
_MAX_LOG_L2 = 87.0
# A parameterisation makes a table for the height and one for the width, from what is
# stored to pixels. For each number in them it may take so many bytes, at its peak.
_TABLE_BYTES = 40


def read_tensors(
    data: bytes, header: dict[str, Any], metadata: dict[str, Any]
) -> tuple[PyTree, AbstractPreprocessing | None]:
    """Checks the tensors in the bytes of a file, and makes its distilled set of them,
    or the parameterisation of one, and its preprocessing.

    **Raises:**

    A `ValueError` with the reason, as a clause.
    """
    own = preprocessing_tensors(metadata["preprocessing"])
    tensors = _tensors(header, (*TENSORS, *LOSSES[metadata["loss"]], *own), data)
    images, labels, log_l2 = (_canonical(tensors[name]) for name in TENSORS)
    num_classes = metadata["model"]["num_classes"]

    check(images.ndim >= 2, f"`images` must have shape (n, ...); got {images.shape}")
    check(np.isfinite(images).all(), "`images` must be finite; some pixels are not")
    n = images.shape[0]
    # Whoever fits to class indices makes one-hot rows of them.
    check_room("its labels", images.itemsize * n * num_classes, data)
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
        sides = [a * b for a, b in zip(images.shape[-2:], shape[-2:], strict=True)]
        check_room(
            "its images",
            images.itemsize * n * math.prod(shape) + _TABLE_BYTES * sum(sides),
            data,
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
    return start, preprocessing


def check_room(name: str, wanted: int, data: bytes) -> None:
    """Checks that what is built of a file takes no more than sixteen times its size and
    16 MiB: four by four pixels for one that is stored."""
    most = min(16 * len(data), MAX_BYTES) + 2**24
    check(
        wanted <= most,
        f"{name} would take {wanted} bytes, where {most} are allowed for a file of "
        f"{len(data)}",
    )


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


def build_classifier(
    description: dict[str, Any], distilled: DistilledSet, data: bytes
) -> LinearClassifier | None:
    if description["type"] != "LogisticRegression":
        return None
    in_features, num_classes = description["in_features"], description["num_classes"]
    pixels = math.prod(distilled.images.shape[1:])
    check(
        in_features == pixels,
        f"its model must have `in_features` = {pixels}, the pixels of an image; "
        f"got {in_features}",
    )
    dtype = distilled.images.dtype
    check_room("its model", dtype.itemsize * (in_features + 1) * num_classes, data)
    return LogisticRegression(
        in_features,
        num_classes,
        use_intercept=description["use_intercept"],
        dtype=dtype,
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
