import dataclasses
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from ._distillation import Distillation
from ._outer_loss import decode


def averaged(
    optimiser: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    r"""An optimiser that keeps the exponential average of what it has trained. After
    the update number $t$, with the decay $\beta$, the average is

    $$\bar\theta_t = \frac{1 - \beta}{1 - \beta^t} \sum_{s=1}^t \beta^{t-s} \theta_s,$$

    of weights that add up to one.

    The updates stay as they are. [`eqdistill.average_of`][] takes the average out of a
    result.

    !!! Example

        ```python
        optimiser = eqd.averaged(optax.adam(0.02), decay=0.99)
        result = eqd.distill(start, model, train, optimiser=optimiser)
        average = eqd.average_of(result)
        evaluation = eqd.evaluate(average.distilled, model, test)
        ```

    **Arguments:**

    - `optimiser`: any Optax optimiser. [`eqdistill.whitened`][] belongs inside, and
        `averaged` outermost.
    - `decay`: $\beta$, between 0 and 1.

    **Returns:**

    An Optax optimiser, whose state holds the average too.

    **Raises:**

    A `ValueError` if `decay` is out of its range.

    Source: Polyak and Juditsky, *Acceleration of Stochastic Approximation by
    Averaging*, 1992; with the correction of the bias as in Kingma and Ba, *Adam*, 2015.
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
        average = optax.incremental_update(
            optax.apply_updates(params, updates), state.average, weight
        )
        average = optax.tree.cast_like(average, state.average)
        return updates, _State(average, num_updates, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def average_of(result: Distillation) -> Distillation:
    """The result of a distillation with the average in the place of what was learned.

    **Arguments:**

    - `result`: of [`eqdistill.distill`][] with an optimiser that is
        [`eqdistill.averaged`][].

    **Returns:**

    The same result, but `distilled`, `start` and `inner` are the averages. With its
    `state` the run goes on as with that of `result`.

    **Raises:**

    A `ValueError` if the optimiser was not `averaged`.
    """
    state = result.state.optimiser_state
    if not isinstance(state, _State):
        raise ValueError(
            "`result` must be of an optimiser that is `eqdistill.averaged`; the state "
            f"of its optimiser is a {type(state).__name__}."
        )
    start, inner = eqx.combine(state.average, (result.start, result.inner))
    return dataclasses.replace(
        result, distilled=decode(start), start=start, inner=inner
    )


class _State(NamedTuple):
    average: PyTree
    num_updates: Int[Array, ""]
    inner: optax.OptState
