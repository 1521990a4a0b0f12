from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.core
import numpy as np
from jaxtyping import Array


_Array = TypeVar("_Array", bound=Array)


def error_if(x: _Array, is_bad: Callable, message: str) -> _Array:
    """As `equinox.error_if`, but a plain `ValueError` when nothing is traced: the
    caller is then an ordinary Python user, whom a stack of compiled code cannot help.

    `is_bad` is given `x`, or its values as a NumPy array, for which nothing need be
    compiled.
    """
    if isinstance(x, jax.core.Tracer):
        return eqx.error_if(x, is_bad(x), message)
    if is_bad(np.asarray(x)):
        raise ValueError(message)
    return x
