import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree

from ._in_turn import take_turn
from ._objective import AbstractObjective, Outcome


class ByLoss(AbstractObjective[PyTree]):
    r"""Several objectives for one distilled set: each outer step draws one of
    them at random. The larger an objective's loss, the more often it is drawn:
    objective $k$ is drawn with probability

    $$\frac{\bar\ell_k^2}{\sum_j \bar\ell_j^2},$$

    where $\bar\ell_k$ is a moving average of its losses. Each objective is used once
    before any is drawn. Drawing by loss keeps any one of several architectures from
    being left behind, as would happen if they took turns.

    !!! Example

        ```python
        pools = [eqd.Pool(make) for make in (conv_net, perceptron)]
        objective = eqd.ByLoss(*map(eqd.Bilevel, pools))
        ```

    Source: after Sagawa et al., *Distributionally robust neural networks for group
    shifts*, 2020, who weight the losses of groups.
    """

    objectives: tuple[AbstractObjective, ...]
    failures: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, *objectives: AbstractObjective):
        """**Arguments:**

        - `objectives`: at least one objective. Their losses must be positive and
            comparable, that is, values of the same outer loss.

        **Raises:**

        A `ValueError` if there is no objective.
        """
        if not objectives:
            raise ValueError("`objectives` must have at least one objective; got none.")
        self.objectives = objectives
        self.failures = sum((x.failures for x in objectives), ())

    def init(self, distilled, *, key):
        keys = jr.split(key, len(self.objectives))
        states = tuple(
            objective.init(distilled, key=own_key)
            for objective, own_key in zip(self.objectives, keys, strict=True)
        )
        return states, jnp.zeros(len(states), distilled.images.dtype)

    def __call__(self, distilled, data, state, *, step, key):
        """As in [`eqdistill.AbstractObjective`][]. Each step uses one objective: the
        metrics of all others are NaN, and the metric `"objective"` is its index."""
        states, losses = state
        # No objective has this index.
        turn_key = jr.fold_in(jr.fold_in(key, len(states)), step)
        is_new = losses == 0
        drawn = jr.categorical(turn_key, 2 * jnp.log(losses))
        turn = jnp.where(is_new.any(), jnp.argmax(is_new), drawn)
        loss, outcome = take_turn(
            self.objectives, turn, distilled, data, states, step=step, key=key
        )
        value = jax.lax.stop_gradient(loss)
        before = losses[turn]
        new = jnp.where(before == 0, value, 0.95 * before + 0.05 * value)
        metrics = {**outcome.metrics, "objective": turn.astype(loss.dtype)}
        state = outcome.state, losses.at[turn].set(new.astype(losses.dtype))
        return loss, Outcome(state, outcome.failure, metrics)
