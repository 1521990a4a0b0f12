from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.core
import numpy as np
from jaxtyping import Array


_Array = TypeVar("_Array", bound=Array)


def error_if(x: _Array, is_bad: Callable, message: str) -> _Array:
    """Like `equinox.error_if`, but raises a plain `ValueError` if `x` is not traced.

    `is_bad` is applied to `x` if `x` is traced, and otherwise to a NumPy array of its
    values, so that nothing is compiled.
    """
    if isinstance(x, jax.core.Tracer):
        return eqx.error_if(x, is_bad(x), message)
    if is_bad(np.asarray(x)):
        raise ValueError(message)
    return x
