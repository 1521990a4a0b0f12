"""Converters for arguments. Python numbers are constants in a compiled program, but
NumPy numbers would be traced."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int

from ._sharding import to_host
from ._typechecking import describe


ArrayOrList = ArrayLike | list | tuple
Labels = Int[Array, " n"] | Float[Array, "n c"]


def as_weights(weights: ArrayOrList, n: int) -> Float[Array | np.ndarray, " n"]:
    """Divides weights of `n` examples by their mean. Traced weights are not checked."""
    weights_ = as_array("weights", weights)
    is_good = weights_.shape == (n,)
    if is_good and not isinstance(weights_, Tracer):
        weights_ = to_host(weights_).astype(np.float64)
        is_good = bool(((weights_ > 0) & (weights_ < np.inf)).all())
    if not is_good:
        raise ValueError(
            f"`weights` must be positive and finite, one for each of the {n} examples; "
            f"got {describe(weights)}."
        )
    weights_ = weights_ / weights_.max()  # The sum of large weights could overflow.
    return weights_ / weights_.mean()


def as_int(x: int) -> int:
    return int(x)


def as_int_or_none(x: int | None) -> int | None:
    return None if x is None else int(x)


def as_float(x: float) -> float:
    return float(x)


def as_float_or_none(x: float | None) -> float | None:
    return None if x is None else float(x)


def as_ints(name: str, x: Sequence) -> tuple[int, ...]:
    """Checks and converts all items. (Beartype checks only one of them.)"""
    if any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in x):
        raise TypeError(f"`{name}` must be integers; got {describe(x)}.")
    return tuple(int(i) for i in x)


def as_array(name: str, x: ArrayOrList) -> Array | np.ndarray:
    """Converts anything but a JAX array to a NumPy array, which keeps its precision."""
    if isinstance(x, jax.Array):
        return x
    try:
        array = np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return jnp.asarray(x)  # A list of traced arrays.
    except ValueError:
        problem = f"`{name}` must have rows of equal shape; got {describe(x)}."
        raise ValueError(problem) from None
    if array.dtype.kind in "OSUMmc":
        raise TypeError(f"`{name}` must be real numbers; got {describe(x)}.")
    return array
