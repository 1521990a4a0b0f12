from collections.abc import Sequence

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import array_difference
from .._conversions import as_int
from .._data._dataset import Dataset
from .._inner._auto_solver import AutoSolver
from .._inner._inner_solver import AbstractInnerSolver
from ._callbacks import AbstractCallback
from ._data import AbstractData
from ._distill_state import DistillState, REASONS, Status
from ._distillation import (
    Distillation,
    DistillationError,
    to_result,
    to_rows,
)
from ._loop import CompiledStep
from ._problem import Problem
from ._snapshot import AbstractCheckpoints
from ._watch import Watch


def distill(
    start: PyTree,
    model: PyTree,
    train: Dataset | AbstractData,
    *,
    inner: AbstractInnerSolver = AutoSolver(),
    optimiser: optax.GradientTransformation = optax.adam(0.02),
    steps: int = 50,
    learn: PyTree[bool] | None = None,
    tolerance: float = 0.0,
    callbacks: Sequence[AbstractCallback | AbstractCheckpoints] = (),
    key: PRNGKeyArray | None = None,
    state: DistillState | None = None,
) -> Distillation:
    r"""Distils a dataset: minimises the outer loss over a distilled set,

    $$\min_\theta F(\theta) = \frac{1}{N} \sum_{i=1}^N \ell(y_i,
    w^\star(\theta)(x_i)),$$

    by the steps of an Optax optimiser along the hypergradient $\nabla F$ of
    [`eqdistill.outer_loss`][].

    **Arguments:**

    - `start`: the distilled set to begin with; or any `equinox.Module` whose `decode`
        gives one, if something else than the images is to be learned.
    - `model`: as for [`eqdistill.fit`][].
    - `train`: the real data to distil. All of a [`eqdistill.Dataset`][] is used in each
        step. [`eqdistill.Batches`][] take some in each.

    All other arguments are keyword only.

    - `inner`: how to fit the model.
    - `optimiser`: any Optax optimiser. Those with a line search, such as
        `optax.lbfgs`, are given the value, the gradient and the value function that
        they need. A convex inner problem and all of the data in each step converge in
        far fewer steps with `optax.lbfgs(learning_rate=1.0, linesearch=None)`, and in
        fewer still with [`eqdistill.whitened`][] around that.
    - `steps`: the number of the step at which the run ends.
    - `learn`: what is learned: bools with the structure of the pair `(start, inner)`,
        or a prefix of it. `(True, False)` learns all floating-point arrays of `start`.
        The default learns its `images`.
    - `tolerance`: the run has converged when the Euclidean norm of the hypergradient is
        at most this. With zero a run takes all of its steps.
    - `callbacks`: [`eqdistill.AbstractCallback`][]s, such as
        [`eqdistill.ProgressBar`][] and [`eqdistill.EarlyStopping`][]. With
        [`eqdistill.Checkpoints`][] among them, a run that was killed goes on.
    - `key`: a `jax.random.key`, for data in batches and inner solvers that draw random
        numbers.
    - `state`: goes on from this state, the `state` of an earlier result. All other
        arguments must be those of the earlier call, except for `steps`, which counts
        from the start of the first run.

    **Returns:**

    An [`eqdistill.Distillation`][].

    **Raises:**

    - A `TypeError` or `ValueError` as [`eqdistill.outer_loss`][], or for an argument
        that is out of its range; or if checkpoints are of another problem.
    - An [`eqdistill.DistillationError`][], with the last good distilled set, if the
        inner solver fails or its fit collapses, or if the loss, its gradient or the
        distilled set stop being finite; or if a callback raises an error.

    Source: the bilevel problem is that of JAXopt's dataset-distillation notebook; its
    gradient by implicit differentiation, Pedregosa 2016, equation (2).
    """
    steps = as_int(steps)
    problem = Problem(
        start,
        model,
        train,
        inner,
        optimiser=optimiser,
        learn=learn,
        tolerance=tolerance,
    )
    if state is None:
        state = problem.init(key=key)
    else:
        _check_state(problem, state, key)
    watch = Watch(callbacks)
    try:
        begin = watch.init(problem, state, steps)
        state, rows = begin.state, begin.rows
        if begin.has_stopped or _has_ended(state, steps):
            watch.finish(problem, state, rows)
            return to_result(problem, state, rows, watch.own)
        run = CompiledStep(problem, state, is_batched=False)
        while True:
            step = int(state.step)
            num_steps = min(steps - step, watch.steps_until_due(step))
            try:
                found = []
                for i in range(num_steps):
                    found.append(run())
                    # At most two steps are under way, so that Ctrl-C is prompt.
                    if i > 0:
                        jax.block_until_ready(found[i - 1])
                    if watch.is_asked_to_leave():
                        break
                new_state = run.state()
                rows = np.concatenate(
                    [rows, to_rows(found, int(new_state.step) - step)]
                )
            except jax.errors.JaxRuntimeError as e:
                raise DistillationError(
                    f"Distillation stopped in the {num_steps} steps after step {step}: "
                    "the inner solver raised the error above.",
                    to_result(problem, state, rows, watch.own, has_failed=True),
                ) from e
            state = new_state
            status = Status(int(state.status))
            if status in REASONS:
                raise DistillationError(
                    f"Distillation stopped at step {int(state.step)}: "
                    f"{REASONS[status]}.",
                    to_result(problem, state, rows, watch.own, has_failed=True),
                )
            try:
                if watch(problem, state, rows, _has_ended(state, steps)):
                    break
            except Exception as e:
                raise DistillationError(
                    f"Distillation stopped at step {int(state.step)}: a callback "
                    "raised the error above.",
                    to_result(problem, state, rows, watch.own),
                ) from e
    finally:
        watch.close()
    return to_result(problem, state, rows, watch.own)


def _has_ended(state: DistillState, steps: int) -> bool:
    return int(state.status) == Status.CONVERGED or int(state.step) >= steps


def _check_state(
    problem: Problem, state: DistillState, key: PRNGKeyArray | None
) -> None:
    if key is not None:
        raise ValueError("`key` must not be given with `state`, which has the key.")
    template = eqx.filter_eval_shape(problem.init, key=state.key)
    difference = array_difference(template, state)
    if difference is not None:
        raise ValueError(f"`state` must be of the same problem: {difference}.")
    if state.status != Status.RUNNING:
        raise ValueError(
            "`state` must be of a run that goes on; this one has ended, with status "
            f"{Status(int(state.status)).name}."
        )
