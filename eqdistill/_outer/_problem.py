import enum
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._checks import array_difference
from .._data._class_names import check_same_classes
from .._data._distilled_set import DistilledSet
from .._data._parameterisation import AbstractParameterisation
from .._sharding import vary_like
from ._data import AbstractData
from ._objective import AbstractObjective
from ._optimisers import as_optimiser


class Status(enum.IntEnum):
    """Whether a run continues, or why it has stopped. `FAILED` plus `i` stands for the
    reason with index `i` among the `failures` of the objective."""

    RUNNING = 0
    UPDATE_NOT_FINITE = 1
    GRADIENT_NOT_FINITE = 2
    LOSS_NOT_FINITE = 3
    FAILED = 4


_REASONS = (
    "the updated distilled set is not finite",
    "the gradient of the loss is not finite",
    "the outer loss is not finite",
)
Metrics = dict[str, Float[Array, ""]]


class DistillState(eqx.Module):
    """Everything that changes in a run, or differs between runs of one problem. It
    holds arrays only: a checkpoint of a run consists of its leaves.

    **Attributes:**

    - `learned`: the learned arrays of the pair of `start` and `objective`.
    - `rest`: the other arrays of `start`.
    - `last_good`: the learned arrays of the previous step. Only a step from `learned`
        shows whether it is good.
    - `optimiser_state`, `objective_state`: the states of the optimiser and of the
        objective.
    - `key`: the key of the run.
    - `step`: the number of steps taken.
    - `status`: 0 while the run continues; otherwise the reason why it has stopped.
    """

    learned: PyTree
    rest: PyTree
    last_good: PyTree
    optimiser_state: PyTree
    objective_state: PyTree
    key: PRNGKeyArray
    step: Int[Array, ""]
    status: Int[Array, ""]


class Problem(eqx.Module):
    """Everything that stays fixed in a run, and its step.

    [`eqdistill.distill`][] is a loop around `step`, which is pure: `equinox.filter_jit`
    and `jax.vmap` work as for any function.

    !!! Example

        ```python
        problem = eqd.Problem(start, objective, optimiser=optax.adam(0.02))
        data = objective.layout(train)
        state = problem.init(key=jr.key(0))
        step = eqx.filter_jit(problem.step)
        for _ in range(50):
            state, metrics = step(state, data)
        distilled = problem.distilled(state)
        ```

        Many seeds at once:

        ```python
        states = jax.vmap(problem.init)(starts, key=jr.split(jr.key(0), 32))
        step = eqx.filter_jit(eqx.filter_vmap(problem.step, in_axes=(0, None)))
        states, metrics = step(states, data)
        ```

    **Attributes:** the arguments of [`eqdistill.distill`][]. `learn` is a pair of trees
    of bools, with the structures of `start` and of `objective`.
    """

    start: AbstractParameterisation
    objective: AbstractObjective
    optimiser: optax.GradientTransformation
    learn: tuple[PyTree[bool], PyTree[bool]]

    def __init__(
        self,
        start: AbstractParameterisation,
        objective: AbstractObjective,
        *,
        optimiser: optax.GradientTransformation | optax.MultiSteps,
        learn: Callable = lambda start: start.images,
        learn_objective: Callable = lambda objective: (),
    ):
        """**Arguments:** as for [`eqdistill.distill`][].

        **Raises:**

        A `TypeError` or `ValueError` for an argument that does not fit the others.
        """
        self.start = start
        self.objective = objective
        self.optimiser = as_optimiser(optimiser)
        self.learn = (
            _learned("learn", start, learn),
            _learned("learn_objective", objective, learn_objective),
        )
        if not any(jax.tree.leaves(self.learn)):
            raise ValueError(
                "`learn` or `learn_objective` must pick at least one array."
            )
        distilled = start.decode()
        # Labels are concrete here, and can be checked.
        state = eqx.filter_eval_shape(
            lambda key: objective.init(distilled, key=key), jr.key(0)
        )
        difference = array_difference(state, state)
        if difference is not None:
            raise TypeError(f"`objective.init` must return arrays only: {difference}.")

    def init(
        self, start: AbstractParameterisation | None = None, *, key: PRNGKeyArray
    ) -> DistillState:
        """**Arguments:**

        - `start`: what to start with instead of the `start` of the problem, with the
            same structure, shapes and dtypes. Defaults to that `start`.
        - `key`: a `jax.random.key` for all random numbers of the run. (Keyword only
            argument.)

        **Returns:**

        The first state. Its arrays are copies.
        """
        arrays = eqx.filter(self.start if start is None else start, eqx.is_array)
        return _init(self, arrays, key)

    def step(
        self, state: DistillState, data: AbstractData
    ) -> tuple[DistillState, Metrics]:
        """One step of the optimiser along the gradient of the objective.

        **Arguments:**

        - `state`: the current state.
        - `data`: the real data of this step.

        **Returns:**

        The next state; and the metrics of the step, before its update: `"loss"`,
        `"gradient_norm"` and the metrics of the objective. If the step fails, or the
        run has already stopped, the state stays the same, except for its `status`.
        """

        problem, data = vary_like((self, data), state.learned)

        def loss_fn(learned):
            start, objective = problem._pair(learned, state.rest)
            distilled = start.decode()
            check_same_classes("`start`", distilled, "`data`", data)
            return objective(
                distilled,
                data,
                state.objective_state,
                step=state.step,
                key=state.key,
            )

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, outcome), gradient = value_and_grad(state.learned)
        # Wrap it here: Optax returns a new function on every call, and storing it would
        # trigger recompilation.
        optimiser = optax.with_extra_args_support(self.optimiser)
        updates, optimiser_state = optimiser.update(
            gradient,
            state.optimiser_state,
            state.learned,
            value=loss,
            grad=gradient,
            value_fn=lambda learned: loss_fn(learned)[0],
        )
        updated = eqx.apply_updates(state.learned, updates)
        gradient_norm = optax.tree.norm(gradient)

        # The last condition that holds is the one that is reported.
        status = jnp.array(int(Status.RUNNING))
        for holds, reason in (
            (~_all_finite(updated), Status.UPDATE_NOT_FINITE),
            (~jnp.isfinite(gradient_norm), Status.GRADIENT_NOT_FINITE),
            (~jnp.isfinite(loss), Status.LOSS_NOT_FINITE),
            (outcome.failure > 0, Status.FAILED - 1 + outcome.failure),
        ):
            status = jnp.where(holds, reason, status)
        new_state = DistillState(
            learned=updated,
            rest=state.rest,
            last_good=state.learned,
            optimiser_state=optimiser_state,
            objective_state=outcome.state,
            key=state.key,
            step=state.step + 1,
            status=state.status,
        )
        was_running = state.status == Status.RUNNING
        continues = was_running & (status == Status.RUNNING)
        new_state = jax.tree.map(
            lambda new, old: new if new is old else _where(continues, new, old),
            new_state,
            state,
        )
        # If only the update of a step is not finite, the state before it was good.
        is_good = was_running & (status == Status.UPDATE_NOT_FINITE)
        last_good = optax.tree.where(is_good, state.learned, new_state.last_good)
        status = jnp.where(was_running, status, state.status)
        new_state = eqx.tree_at(
            lambda s: (s.last_good, s.status), new_state, (last_good, status)
        )
        metrics = {"loss": loss, "gradient_norm": gradient_norm, **outcome.metrics}
        return new_state, metrics

    def pair(
        self, state: DistillState
    ) -> tuple[AbstractParameterisation, AbstractObjective]:
        """`start` and `objective` with the learned arrays of a state."""
        return self._pair(state.learned, state.rest)

    def distilled(self, state: DistillState) -> DistilledSet:
        """The distilled set of a state."""
        return self.pair(state)[0].decode()

    def failure(self, state: DistillState) -> str | None:
        """Why the run of a state has stopped, or `None` while it continues."""
        reasons = (None, *_REASONS, *self.objective.failures)
        return reasons[int(state.status)]

    def _pair(self, learned: PyTree, rest: PyTree):
        static = eqx.filter(self.start, eqx.is_array, inverse=True)
        fixed = eqx.filter(self.objective, self.learn[1], inverse=True)
        return eqx.combine(learned[0], rest, static), eqx.combine(learned[1], fixed)


@eqx.filter_jit
def _init(problem: Problem, arrays: PyTree, key: PRNGKeyArray) -> DistillState:
    """Compiled as one program. Its results are copies: a loop that donates the state
    would otherwise delete the user's arrays."""
    of_start, rest = eqx.partition(arrays, problem.learn[0])
    learned = of_start, eqx.filter(problem.objective, problem.learn[1])
    learned, rest = jax.tree.map(_strongly_typed, (learned, rest))
    start, objective = problem._pair(learned, rest)
    state = DistillState(
        learned=learned,
        rest=rest,
        last_good=learned,
        optimiser_state=problem.optimiser.init(learned),
        objective_state=objective.init(start.decode(), key=key),
        key=key,
        step=jnp.array(0),
        status=jnp.array(int(Status.RUNNING)),
    )
    return jax.tree.map(_strongly_typed, state)


def _strongly_typed(x: Array) -> Array:
    # A weak type would make the first step a different program from the second.
    return jax.lax.convert_element_type(x, x.dtype)


def _where(is_new: Bool[Array, ""], new: Array, old: Array) -> Array:
    if not jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        new = jax.lax.convert_element_type(new, old.dtype)
    return jnp.where(is_new, new, old)


def _learned(name: str, tree: PyTree, where: Callable) -> PyTree[bool]:
    """The leaves of a tree that are learned: the floating-point arrays that `where`
    picks."""
    nothing = jax.tree.map(lambda _: False, tree)
    try:
        parts = where(tree)
        if isinstance(parts, tuple) and not parts:
            return nothing
        learned = jax.tree.map(eqx.is_inexact_array, parts)
        if not any(jax.tree.leaves(learned)):
            raise ValueError("it picks no floating-point array")
        return eqx.tree_at(where, nothing, learned)
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise ValueError(
            f"`{name}` must be a function that picks parts of a {type(tree).__name__}, "
            f"such as `lambda s: (s.images, s.log_l2)`: {e}."
        ) from e


def learned_names(learn: tuple[PyTree[bool], PyTree[bool]]) -> tuple[str, ...]:
    """The names of the learned arrays: those of `objective` begin with
    `objective.`."""
    found = []
    for prefix, tree in zip(("", "objective."), learn, strict=True):
        for path, is_learned in jax.tree.leaves_with_path(tree):
            if is_learned:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                found.append(prefix + name)
    return tuple(found)


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
