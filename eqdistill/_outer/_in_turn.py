from collections.abc import Sequence

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree

from .._conversions import as_ints
from .._sharding import vary_like
from ._objective import AbstractObjective, Outcome


class InTurn(AbstractObjective[tuple[PyTree, ...]]):
    """Several objectives for one distilled set: each outer step uses one of them. All
    objectives use the same data.

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

        def of(i, distilled):
            loss, outcome = self.objectives[i](
                distilled, data, state[i], step=step, key=jr.fold_in(key, i)
            )
            before = sum(len(x.failures) for x in self.objectives[:i])
            failure = jnp.where(outcome.failure > 0, before + outcome.failure, 0)
            new_state = (*state[:i], outcome.state, *state[i + 1 :])
            return loss, Outcome(new_state, failure, outcome.metrics)

        # The branches must return the same metrics.
        indices = range(len(self.objectives))
        metrics = lambda i: jax.eval_shape(lambda: of(i, distilled)[1].metrics)
        items = [item for i in indices for item in metrics(i).items()]
        absent = {name: jnp.array(jnp.nan, x.dtype) for name, x in items}
        absent = vary_like(absent, distilled)

        def branch(i):
            def call(distilled):
                loss, outcome = of(i, distilled)
                metrics = {**absent, **outcome.metrics}
                return loss, Outcome(outcome.state, outcome.failure, metrics)

            return call

        # The seeds of a `vmap` take the same step: only one objective is computed.
        turn = jnp.array(self.order)[eqxi.unvmap_max(step) % len(self.order)]
        return jax.lax.switch(turn, [branch(i) for i in indices], distilled)
