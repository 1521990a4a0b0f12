import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._checks import check_positive
from .._describe import describe


def averaged(
    optimiser: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    r"""An optimiser that keeps the exponential moving average of the arrays that it
    trains. After update number $t$, with decay $\beta$, the average is

    $$\bar\theta_t = \frac{1 - \beta}{1 - \beta^t} \sum_{s=1}^t \beta^{t-s} \theta_s,$$

    whose weights add up to one. The updates themselves do not change. The method
    `average` of the resulting [`Distillation`][] returns the average.

    !!! Example
        ```python
        optimiser = eqd.averaged(optax.adam(0.02), decay=0.99)
        result = eqd.distill(start, model, train, optimiser=optimiser)
        evaluation = eqd.evaluate(result.average().distilled, model, test)
        ```

    **Arguments:**

    - `optimiser`: any Optax optimiser. [`eqdistill.linear.whitened`][] belongs inside,
        and `averaged` outermost.
    - `decay`: $\beta$, between 0 and 1.

    **Returns:** an Optax optimiser, whose state also holds the average.

    Source: Polyak and Juditsky, *Acceleration of Stochastic Approximation by
    Averaging*, 1992; with the bias correction of Kingma and Ba, *Adam*, 2015.
    """
    if not 0 < decay < 1:
        raise ValueError(f"`decay` must be between 0 and 1; got {decay}.")
    optimiser = optax.with_extra_args_support(optimiser)

    def init(params) -> _State:
        return _State(params, jnp.array(0), optimiser.init(params))

    def update(updates, state, params=None, **extra_args) -> tuple[Any, _State]:
        if params is None:
            raise ValueError("`averaged` must be given `params` with each update.")
        updates, inner = optimiser.update(updates, state.inner, params, **extra_args)
        num_updates = state.num_updates + 1
        weight = (1 - decay) / -jnp.expm1(num_updates * math.log(decay))
        new = optax.apply_updates(params, updates)
        average = optax.incremental_update(new, state.average, weight)
        average = optax.tree.cast_like(average, state.average)
        return updates, _State(average, num_updates, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def average_of(state: PyTree) -> PyTree:
    """The average in the state of an optimiser."""
    if not isinstance(state, _State):
        raise ValueError("The optimiser must be wrapped in `eqdistill.averaged`.")
    return state.average


class _State(NamedTuple):
    average: PyTree
    num_updates: Int[Array, ""]
    inner: optax.OptState


_REFUSED = {
    "lookahead": "it needs two copies of the learned arrays.",
    "sam": "it needs gradients at points other than the learned arrays.",
    "scale_by_sophia": "it needs the loss as `obj_fn`, and random numbers.",
    "schedule_free": "its result is not the learned arrays but their average. Wrap "
    "another optimiser in `eqdistill.averaged`.",
}


def as_optimiser(
    optimiser: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformation:
    """Converts `optax.MultiSteps`. Raises an error for optimisers whose updates need
    more than the loss and its gradient, or whose result is not the learned arrays."""
    for text in describe(optimiser=optimiser).values():
        name = text.partition(".<locals>")[0].rpartition(".")[2]
        if text.startswith("optax.") and name in _REFUSED:
            raise ValueError(
                f"`optimiser` must not be `{name.removeprefix('scale_by_')}`: "
                f"{_REFUSED[name]}"
            )
    if isinstance(optimiser, optax.MultiSteps):
        return optimiser.gradient_transformation()
    return optimiser


class RunningNorm(NamedTuple):
    """The exponential mean of the norm of the gradient, and the sum of its weights."""

    mean: Float[Array, ""]
    weight: Float[Array, ""]


def clip_by_running_norm(
    factor: float = 2.0, decay: float = 0.9
) -> optax.GradientTransformation:
    r"""Clips the gradient at a multiple of the running mean of its norm: an Optax
    transformation, to be chained before an optimiser. In long training runs, a few
    gradients have a far larger norm than all others.

    !!! Example
        ```python
        optimiser = optax.chain(
            eqd.adjoints.clip_by_running_norm(), optax.adam(1e-3)
        )
        ```

    **Arguments:**

    - `factor`: the multiple, positive.
    - `decay`: the decay of the running mean, in [0, 1). Norms enter the mean after
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
