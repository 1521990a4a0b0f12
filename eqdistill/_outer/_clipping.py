from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._checks import check_positive


class RunningNorm(NamedTuple):
    """The exponential mean of the norm of the gradient, and the sum of its weights."""

    mean: Float[Array, ""]
    weight: Float[Array, ""]


def clip_by_running_norm(
    factor: float = 2.0, decay: float = 0.9
) -> optax.GradientTransformation:
    r"""Clips the gradient at a multiple of the running mean of its norm: an Optax
    transformation, to be chained before an optimiser. Gradients of long training runs
    have a few norms that are far beyond all others.

    !!! Example

        ```python
        optimiser = optax.chain(eqd.clip_by_running_norm(), optax.adam(1e-3))
        ```

    **Arguments:**

    - `factor`: the multiple, positive.
    - `decay`: of the running mean, in [0, 1). Norms enter the mean as they are after
        clipping, and the first gradient is not clipped.

    Source: Feng, Vedantam and Kempe, *Embarrassingly simple dataset distillation*
    (RaT-BPTT), 2024, with these defaults.
    """
    check_positive(factor=factor)
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be in [0, 1); got {decay}.")

    def init(params):
        zero = jnp.zeros_like(optax.tree.norm(params))
        return RunningNorm(zero, zero)

    def update(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates)
        limit = factor * state.mean / jnp.where(state.weight > 0, state.weight, 1)
        is_long = (state.weight > 0) & (norm > limit)
        scale = jnp.where(is_long, limit / jnp.where(norm > 0, norm, 1), 1)
        mean = decay * state.mean + (1 - decay) * scale * norm
        weight = decay * state.weight + 1 - decay
        state = RunningNorm(mean.astype(norm.dtype), weight.astype(norm.dtype))
        return optax.tree.scale(scale, updates), state

    return optax.GradientTransformation(init, update)
