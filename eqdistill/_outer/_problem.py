import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from .._checks import array_difference, check_key
from .._conversions import as_float
from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from .._inner._auto_solver import AutoSolver
from .._inner._fit import check_inner
from .._inner._inner_solver import AbstractInnerSolver
from ._data import AbstractData, AbstractFeatureData, as_data, check_features
from ._distill_state import DistillState, Metrics, Status
from ._outer_loss import check_data, decode, loss_of, split_key


class Problem(eqx.Module):
    """All that stays fixed over a distillation, and its step.

    [`eqdistill.distill`][] is a loop around `step`, which is pure: `equinox.filter_jit`
    and `jax.vmap` work as for any function.

    !!! Example

        ```python
        problem = eqd.Problem(start, model, train, optimiser=optax.adam(0.02))
        state = problem.init()
        step = eqx.filter_jit(problem.step)
        for _ in range(50):
            state, metrics = step(state)
        distilled = problem.distilled(state)
        ```

    **Attributes:** as the arguments of [`eqdistill.distill`][]. `learn` is a tree of
    bools with the structure of the pair `(start, inner)`.
    """

    start: PyTree
    model: PyTree
    data: AbstractData
    inner: AbstractInnerSolver
    optimiser: optax.GradientTransformation
    learn: PyTree[bool]
    tolerance: float = eqx.field(converter=as_float)

    def __init__(
        self,
        start: PyTree,
        model: PyTree,
        data: Dataset | AbstractData,
        inner: AbstractInnerSolver = AutoSolver(),
        *,
        optimiser: optax.GradientTransformation,
        learn: PyTree[bool] | None = None,
        tolerance: float = 0.0,
    ):
        """**Arguments:** as for [`eqdistill.distill`][].

        **Raises:**

        A `TypeError` or `ValueError` for an argument that is not as it should be.
        """
        distilled = check_inner(decode(start), model, inner)
        check_data("train", data, distilled, model, inner)
        if not tolerance >= 0:
            raise ValueError(f"`tolerance` must not be negative; got {tolerance}.")
        if not isinstance(optimiser, optax.GradientTransformation):
            raise TypeError(
                "`optimiser` must be an Optax optimiser, an "
                f"`optax.GradientTransformation`; got a {type(optimiser).__name__}."
            )
        self.start = start
        self.model = model
        self.data = as_data(data, model)
        if isinstance(self.data, AbstractFeatureData):
            # Here the values of arrays can be compared, too.
            check_features(self.data, model)
        self.inner = inner
        self.optimiser = optimiser
        self.learn = _learn(start, inner, learn)
        self.tolerance = tolerance

    def init(self, *, key: PRNGKeyArray | None = None) -> DistillState:
        """**Arguments:**

        - `key`: a `jax.random.key`, for data in batches and inner solvers that draw
            random numbers. (Keyword only argument.)

        **Returns:**

        The state to begin with. Its arrays are copies.
        """
        check_key("key", key)
        arrays = eqx.filter((self.start, self.inner), eqx.is_array)
        return self._init_from(arrays, key)

    def _init_from(self, arrays: PyTree, key: PRNGKeyArray | None) -> DistillState:
        """The state to begin with, from a pair of arrays in the place of those of
        `start` and `inner`."""
        return _init(self, arrays, key)

    def step(self, state: DistillState) -> tuple[DistillState, Metrics]:
        """One step of the optimiser along the hypergradient.

        **Arguments:**

        - `state`: the state before.

        **Returns:**

        The state after the step, and what was measured in it. A step from a state that
        has ended leaves it as it is.
        """

        def loss_fn(learned):
            start, inner = self._pair(learned, state.fixed)
            return loss_of(
                decode(start),
                self.model,
                self.data,
                inner,
                state.inner_state,
                step=state.step,
                key=state.key,
            )

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, outcome), gradient = value_and_grad(state.learned)
        # Here, and not once for all: the function that Optax makes is a new one each
        # time, and what holds it would be compiled anew.
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

        # The last of these that holds is the one that is reported.
        status = jnp.array(int(Status.RUNNING))
        for pred, found in (
            (~_all_finite(updated), Status.UPDATE_NOT_FINITE),
            # A network that died gives zeros, and the next one need not have.
            (
                (self.tolerance > 0) & (gradient_norm <= self.tolerance),
                Status.CONVERGED,
            ),
            (~jnp.isfinite(gradient_norm), Status.GRADIENT_NOT_FINITE),
            (~jnp.isfinite(loss), Status.LOSS_NOT_FINITE),
            (~outcome.fitted.converged, Status.INNER_FAILED),
            (outcome.fitted.collapsed, Status.COLLAPSED),
        ):
            status = jnp.where(pred, int(found), status)
        goes_on = status == Status.RUNNING
        is_good = goes_on | (status == Status.CONVERGED)
        is_good = is_good | (status == Status.UPDATE_NOT_FINITE)
        new_state = DistillState(
            learned=optax.tree.where(goes_on, updated, state.learned),
            fixed=state.fixed,
            last_good=optax.tree.where(is_good, state.learned, state.last_good),
            # An update that is not made must not be in an average either.
            optimiser_state=jax.tree.map(
                functools.partial(_keep, goes_on),
                optimiser_state,
                state.optimiser_state,
            ),
            inner_state=outcome.state,
            key=state.key,
            step=state.step + is_good,
            status=status,
        )
        was_running = state.status == Status.RUNNING
        new_state = jax.tree.map(
            lambda new, old: old if new is old else _keep(was_running, new, old),
            new_state,
            state,
        )
        metrics = Metrics(loss, gradient_norm, outcome.fitted.gradient_norm)
        return new_state, metrics

    def pair(self, state: DistillState) -> tuple[PyTree, AbstractInnerSolver]:
        """**Returns:**

        `start` and `inner` as they have been learned.
        """
        return self._pair(state.learned, state.fixed)

    def distilled(self, state: DistillState) -> DistilledSet:
        """**Returns:**

        The distilled set as it has been learned.
        """
        return decode(self.pair(state)[0])

    def _pair(self, learned: PyTree, fixed: PyTree):
        static = eqx.filter((self.start, self.inner), eqx.is_array, inverse=True)
        return eqx.combine(learned, fixed, static)


@eqx.filter_jit
def _init(problem: Problem, arrays: PyTree, key: PRNGKeyArray | None) -> DistillState:
    """Compiled as one program. Its results are copies: a loop that donates the state
    would otherwise delete the arrays of the user."""
    arrays = jax.tree.map(_strongly_typed, arrays)
    learned, fixed = eqx.partition(arrays, problem.learn)
    start, inner = problem._pair(learned, fixed)
    _, init_key, _ = split_key(key)
    inner_state = inner.init(decode(start), problem.model, key=init_key)
    difference = array_difference(inner_state, inner_state)
    if difference is not None:
        raise TypeError(
            f"`inner.init` must give a state of arrays only; `{type(inner).__name__}` "
            f"did not: {difference}."
        )
    state = DistillState(
        learned=learned,
        fixed=fixed,
        last_good=learned,
        optimiser_state=problem.optimiser.init(learned),
        inner_state=inner_state,
        key=key,
        step=jnp.array(0),
        status=jnp.array(int(Status.RUNNING)),
    )
    return jax.tree.map(_strongly_typed, state)


def _strongly_typed(x: Array) -> Array:
    # A weak type would make the first step another program than the second.
    return jax.lax.convert_element_type(x, x.dtype)


def _keep(is_new: Bool[Array, ""], new: Array, old: Array) -> Array:
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return jnp.where(is_new, new, old)
    return jnp.where(is_new, jax.lax.convert_element_type(new, old.dtype), old)


def _learn(
    start: PyTree, inner: AbstractInnerSolver, learn: PyTree[bool] | None
) -> PyTree[bool]:
    """What is learned, as bools with the structure of `(start, inner)`."""
    pair = (start, inner)
    if learn is None:
        if not hasattr(start, "images"):
            raise ValueError(
                "`learn` must say what is learned of a start that has no `images`, "
                f"such as this {type(start).__name__}."
            )
        nothing = jax.tree.map(lambda _: False, start)
        learn = (eqx.tree_at(lambda s: s.images, nothing, True), False)
    try:
        if not all(isinstance(x, bool | np.bool_) for x in jax.tree.leaves(learn)):
            raise ValueError
        learn = jax.tree.map(
            lambda on, part: jax.tree.map(
                lambda x: on and eqx.is_inexact_array(x), part
            ),
            learn,
            pair,
        )
    except (TypeError, ValueError) as e:
        raise ValueError(
            "`learn` must be bools with the structure of the pair `(start, inner)`, or "
            f"a prefix of it, such as `(True, False)`; got {learn}."
        ) from e
    if not any(jax.tree.leaves(learn)):
        raise ValueError(
            "`learn` must pick at least one floating-point array of the pair `(start, "
            "inner)`; it picks none."
        )
    return learn


def names(learn: PyTree[bool]) -> tuple[str, ...]:
    """The names of what is learned: of the arrays of `start` as they are, and of
    `inner` behind `inner.`"""
    start, inner = learn
    found = []
    for prefix, part in (("", start), ("inner.", inner)):
        for path, on in jax.tree.flatten_with_path(part)[0]:
            if on:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                found.append(prefix + name)
    return tuple(found)


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
