"""What users may give in the place of Python's numbers, and of arrays. For a compiled
program Python's numbers are known, and NumPy's are traced."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from ._typechecking import describe


ArrayOrList = ArrayLike | list | tuple


def as_int(x: int) -> int:
    return int(x)


def as_int_or_none(x: int | None) -> int | None:
    return None if x is None else int(x)


def as_ints(name: str, x: Sequence) -> tuple[int, ...]:
    """**Raises:**

    A `TypeError` that names the argument, if an item is no integer: beartype looks at
    one of them only.
    """
    if any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in x):
        raise TypeError(f"`{name}` must be integers; got {describe(x)}.")
    return tuple(int(i) for i in x)


def as_float(x: float) -> float:
    return float(x)


def as_float_or_none(x: float | None) -> float | None:
    return None if x is None else float(x)


def as_array(name: str, x: ArrayOrList) -> Array | np.ndarray:
    """**Returns:**

    An array of JAX as it is, and all else as an array of NumPy, whose numbers are as
    wide as they came.

    **Raises:**

    A `TypeError` or `ValueError` for what is no array of numbers, which names the
    argument by `name`.
    """
    if isinstance(x, jax.Array):
        return x
    try:
        array = np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return jnp.asarray(x)  # A list of arrays that are traced.
    except ValueError:
        raise ValueError(
            f"`{name}` must be an array, or a list whose rows all have one shape; got "
            f"{describe(x)}, whose rows differ."
        ) from None
    if array.dtype.kind in "OSUMmc":
        raise TypeError(f"`{name}` must be real numbers; got {describe(x)}.")
    return array


def name_value(x: Any) -> str:
    """A number as it is, and an array by its type and shape."""
    return str(x) if np.ndim(x) == 0 else describe(x)
