import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from threadpoolctl import threadpool_limits

from ._classifier import LogisticRegression
from ._distilled_set import DistilledSet
from ._error_bound import ErrorBound
from ._hypergradient import Hypergradient, hypergradient
from ._inner_solver import AbstractInnerSolver, Fitted
from ._layout import AbstractLayout, data_loss, RowLayout
from ._steering import steered, Tolerances


class Status(eqx.Enumeration):
    running = "running"
    converged = "the gradient norm reached the tolerance"
    inner_failed = "the inner solver did not converge"
    loss_not_finite = "the outer loss is not finite"
    gradient_not_finite = "the hypergradient is not finite"
    update_not_finite = "the updated distilled set is not finite"


class Problem(eqx.Module):
    """All that stays fixed over the outer loop. `frozen` is what is not learned of the
    distilled set."""

    frozen: DistilledSet
    classifier: PyTree
    layout: AbstractLayout
    inner: AbstractInnerSolver
    optimiser: optax.GradientTransformationExtraArgs
    tolerance: float
    accuracy: float | None
    batch_size: int | None = eqx.field(static=True)
    key: PRNGKeyArray | None


class State(eqx.Module):
    """All that changes over the outer loop. `last_good` trails `learned` by a step, as
    `learned` is known to be good only once it has been differentiated at. The inner
    solver begins at `start`, and ends at `tolerances` if it is steered. Batches, if
    there are any, are drawn in `order`."""

    learned: PyTree[Float[Array, "..."]]
    last_good: PyTree[Float[Array, "..."]]
    start: PyTree
    tolerances: Tolerances | None
    optimiser_state: PyTree
    order: Int[Array, " N"] | None
    step: Int[Array, ""]
    status: Status


class StepInfo(eqx.Module):
    """A step's part of the [`eqdistill.History`][], whose fields it has."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    inner_residual: Float[Array, ""]
    adjoint_residual: Float[Array, ""]
    error_bound: Float[Array, ""]


def new_state(learned: PyTree, problem: Problem) -> State:
    # Compiled as one. The rest is put on the device, for which nothing is compiled.
    optimiser_state = jax.jit(problem.optimiser.init)(learned)
    return State(
        learned=learned,
        last_good=learned,
        start=problem.classifier,
        tolerances=(
            None
            if problem.accuracy is None
            else Tolerances.of(problem.accuracy, learned)
        ),
        optimiser_state=optimiser_state,
        order=(
            None
            if problem.batch_size is None
            else jnp.arange(problem.layout.num_images)
        ),
        step=jax.device_put(np.array(0)),
        status=Status.running,
    )


def on_host(status: Status) -> Status:
    """To be compared there, for which nothing need be compiled."""
    return jax.tree.map(np.asarray, status)


def quiet_blas(problem: Problem) -> AbstractContextManager:
    """In which LAPACK, which JAX calls on a CPU to decompose the small matrices of an
    inner problem, takes one thread. Those of OpenBLAS go on spinning after it has
    returned, and hold up the passes over the data: by as much again, at twenty images
    or 1,568 pixels.
    """
    if isinstance(problem.classifier, LogisticRegression):
        return threadpool_limits(limits=1, user_api="blas")
    return nullcontext()


def compiled(fn: Callable, problem: Problem, num_images: int) -> Callable:
    """`fn`, which is to run blocks, under `jax.jit`.

    All that takes time in the outer loop of a small linear problem are products in
    libraries. What is left for XLA to compile are some hundred small loops: for CPUs,
    it need not optimise them as far as it can, and then takes a quarter less long.
    """
    is_small = False
    if isinstance(problem.classifier, LogisticRegression):
        _, num_classes = problem.classifier.weights.shape
        is_small = num_images * num_classes <= 1000
    return _jit(fn, is_small and jax.default_backend() == "cpu")


@functools.cache
def _jit(fn: Callable, quickly: bool) -> Callable:
    options: dict[str, Any] = {}
    if quickly:
        options["compiler_options"] = {"xla_backend_optimization_level": 1}
    return eqx.filter_jit(fn, **options)


def run_block(
    state: State, num_steps: Int[Array, ""], problem: Problem, block_size: int
) -> tuple[State, Float[Array, "block fields"]]:
    """Takes `num_steps` steps of the outer loop, or fewer if its status changes, and
    returns the state after them and the [`StepInfo`][] of each, in a row.

    To be [`compiled`][]. `block_size`, the length of the history that is returned, is
    static; `num_steps` is not, so that a shorter last block is not compiled anew.
    """
    first = state.step
    dynamic, static = eqx.partition(state, eqx.is_array)
    history = jnp.full((block_size, 5), jnp.nan)

    def cond_fun(carry):
        state = eqx.combine(carry[0], static)
        return (state.status == Status.running) & (state.step < first + num_steps)

    def body_fun(carry):
        dynamic, history = carry
        state = eqx.combine(dynamic, static)
        new_state, info = _step(state, problem)
        row = jnp.stack(jax.tree.leaves(info)).astype(history.dtype)
        history = jax.lax.dynamic_update_index_in_dim(
            history, row, state.step - first, axis=0
        )
        return eqx.filter(new_state, eqx.is_array), history

    dynamic, history = jax.lax.while_loop(cond_fun, body_fun, (dynamic, history))
    return eqx.combine(dynamic, static), history


def _step(state: State, problem: Problem) -> tuple[State, StepInfo]:
    batch, state = _next_batch(state, problem)
    inner = problem.inner
    if state.tolerances is not None:
        inner = state.tolerances.apply(inner)

    def value_fn(learned):
        distilled = eqx.combine(learned, problem.frozen)
        fitted = inner(state.start, distilled)
        return data_loss(fitted.classifier, batch)

    here, fitted, tolerances = _unless_stored(state, problem, inner, batch)
    loss, gradient = here.loss, here.gradient
    updates, optimiser_state = problem.optimiser.update(
        gradient,
        state.optimiser_state,
        state.learned,
        value=loss,
        grad=gradient,
        value_fn=value_fn,
    )
    updated = eqx.apply_updates(state.learned, updates)
    gradient_norm = optax.tree.norm(gradient)

    # The first of these that holds is what is reported.
    status = Status.running
    for pred, outcome in (
        (~_all_finite(updated), Status.update_not_finite),
        (gradient_norm <= problem.tolerance, Status.converged),
        (~jnp.isfinite(gradient_norm), Status.gradient_not_finite),
        (~jnp.isfinite(loss), Status.loss_not_finite),
        (~fitted.converged, Status.inner_failed),
    ):
        status = Status.where(pred, outcome, status)

    here_is_good = (
        (status == Status.running)
        | (status == Status.converged)
        | (status == Status.update_not_finite)
    )
    new_state = State(
        learned=optax.tree.where(status == Status.running, updated, state.learned),
        last_good=optax.tree.where(here_is_good, state.learned, state.last_good),
        start=state.start if fitted.next_start is None else fitted.next_start,
        tolerances=tolerances,
        optimiser_state=optimiser_state,
        order=state.order,
        step=state.step + here_is_good,
        status=status,
    )
    return new_state, StepInfo(
        loss=loss,
        gradient_norm=gradient_norm,
        inner_residual=fitted.gradient_norm,
        adjoint_residual=here.error_bound.adjoint_residual,
        error_bound=here.error_bound.value,
    )


def _unless_stored(
    state: State, problem: Problem, inner: AbstractInnerSolver, batch: AbstractLayout
) -> tuple[Hypergradient, Fitted, Tolerances | None]:
    def evaluate(learned):
        def solve(inner):
            return hypergradient(learned, problem.frozen, state.start, inner, batch)

        if state.tolerances is None:
            return *solve(inner), None
        return steered(lambda t: solve(t.apply(inner)), state.tolerances)

    loss = optax.tree.get(state.optimiser_state, "value")
    gradient = optax.tree.get(state.optimiser_state, "grad")
    # A line search ends where the next step begins, and keeps what it evaluated there.
    # That is of no use if the next step is on another batch, or to steer by.
    if (
        problem.batch_size is not None
        or problem.accuracy is not None
        or loss is None
        or jax.tree.structure(gradient) != jax.tree.structure(state.learned)
    ):
        return evaluate(state.learned)
    # It does not keep the adjoint.
    unknown = ErrorBound.unknown(jnp.full_like(loss, jnp.inf))
    stored = Hypergradient(loss, gradient, unknown)
    here = jax.lax.cond(
        jnp.isfinite(loss),
        lambda _: stored,
        lambda learned: evaluate(learned)[0],
        state.learned,
    )
    distilled = eqx.combine(state.learned, problem.frozen)
    return here, inner(state.start, distilled), None


def _next_batch(state: State, problem: Problem) -> tuple[AbstractLayout, State]:
    layout = problem.layout
    if problem.batch_size is None:
        return layout, state
    assert isinstance(layout, RowLayout)
    assert problem.key is not None
    key = problem.key
    batches_per_epoch = layout.num_images // problem.batch_size
    epoch, batch = jnp.divmod(state.step, batches_per_epoch)
    order = jax.lax.cond(
        batch == 0,
        lambda order: jr.permutation(jr.fold_in(key, epoch), order),
        lambda order: order,
        state.order,
    )
    indices = jax.lax.dynamic_slice_in_dim(
        order, batch * problem.batch_size, problem.batch_size
    )
    return layout.batch(indices), eqx.tree_at(lambda s: s.order, state, order)


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
