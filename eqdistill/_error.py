from typing import TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, PyTree


_T = TypeVar("_T", bound=PyTree)


def error_if(x: _T, pred: Bool[ArrayLike, "..."], message: str) -> _T:
    """As `equinox.error_if`, but a plain `ValueError` when nothing is traced: the
    caller is then an ordinary Python user, whom a stack of compiled code cannot help.
    """
    if isinstance(pred, jax.core.Tracer):
        return eqx.error_if(x, pred, message)
    if jnp.any(pred):
        raise ValueError(message)
    return x
