from collections.abc import Sequence

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._conversions import as_ints
from .._data._distilled_set import DistilledSet
from .._sharding import vary_like
from ._data import AbstractData
from ._objective import AbstractObjective, Outcome


class InTurn(AbstractObjective[tuple[PyTree, ...]]):
    """Several objectives for one distilled set: one of them in each outer step, on the
    same data.

    !!! Example

        Three backbones, and a pool in one step of five:

        ```python
        objective = eqd.InTurn(
            *(eqd.Bilevel(backbone) for backbone in backbones),
            eqd.Bilevel(eqd.Pool(make)),
            order=[0, 1, 2, 0, 3, 1, 2, 0, 1, 3, 2, 0, 1, 2, 3],
        )
        ```
    """

    objectives: tuple[AbstractObjective, ...]
    order: tuple[int, ...] = eqx.field(static=True)
    failures: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self, *objectives: AbstractObjective, order: Sequence[int] | None = None
    ):
        """**Arguments:**

        - `objectives`: at least one objective.
        - `order`: the indices of the objectives of successive steps, repeated for as
            long as the run lasts. Defaults to each objective once. (Keyword only
            argument.)

        **Raises:**

        A `ValueError` if there is no objective, or if `order` does not hold the index
        of each objective.
        """
        if not objectives:
            raise ValueError("`objectives` must have at least one objective; got none.")
        indices = range(len(objectives))
        self.order = tuple(indices) if order is None else as_ints("order", order)
        if set(self.order) != set(indices):
            raise ValueError(
                f"`order` must hold each index from 0 to {len(objectives) - 1}, and no "
                f"other; got {self.order}."
            )
        self.objectives = objectives
        self.failures = sum((x.failures for x in objectives), ())

    def init(self, distilled, *, key):
        keys = jr.split(key, len(self.objectives))
        return tuple(
            objective.init(distilled, key=own_key)
            for objective, own_key in zip(self.objectives, keys, strict=True)
        )

    def __call__(self, distilled, data, state, *, step, key):
        """Like [`eqdistill.AbstractObjective`][]. The metrics of all objectives other
        than that of the step are NaN. States under one `jax.vmap` must be at the same
        step."""
        # The seeds of a `vmap` take the same step: only one objective is computed.
        turn = jnp.array(self.order)[eqxi.unvmap_max(step) % len(self.order)]
        return take_turn(
            self.objectives, turn, distilled, data, state, step=step, key=key
        )


def take_turn(
    objectives: tuple[AbstractObjective, ...],
    turn: Int[Array, ""],
    distilled: DistilledSet,
    data: AbstractData,
    states: tuple[PyTree, ...],
    *,
    step: Int[Array, ""],
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], Outcome[tuple[PyTree, ...]]]:
    """The loss and the outcome of one of several objectives. The metrics of the others
    are NaN."""

    def of(i, distilled):
        loss, outcome = objectives[i](
            distilled, data, states[i], step=step, key=jr.fold_in(key, i)
        )
        before = sum(len(x.failures) for x in objectives[:i])
        failure = jnp.where(outcome.failure > 0, before + outcome.failure, 0)
        new_states = (*states[:i], outcome.state, *states[i + 1 :])
        return loss, Outcome(new_states, failure, outcome.metrics)

    # The branches must return the same metrics.
    indices = range(len(objectives))
    shapes = [jax.eval_shape(lambda i=i: of(i, distilled)[1].metrics) for i in indices]
    absent = {
        name: jnp.array(jnp.nan, x.dtype) for s in shapes for name, x in s.items()
    }
    absent = vary_like(absent, distilled)

    def branch(i):
        def call(distilled):
            loss, outcome = of(i, distilled)
            metrics = {**absent, **outcome.metrics}
            return loss, Outcome(outcome.state, outcome.failure, metrics)

        return call

    return jax.lax.switch(turn, [branch(i) for i in indices], distilled)
