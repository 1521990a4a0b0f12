import contextlib
import logging
import threading
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import array_difference
from .._conversions import as_int
from .._data._dataset import Dataset
from .._data._parameterisation import AbstractParameterisation
from .._models._models import as_models
from .._typechecking import describe
from ._bilevel import Bilevel
from ._callbacks import AbstractCallback, AbstractCheckpoints, Snapshot
from ._data import AbstractData, check_cached
from ._distillation import Distillation, DistillationError, History, to_result
from ._loop import CompiledStep, Record
from ._objective import AbstractObjective
from ._problem import DistillState, Problem, REASONS, Status


# The metrics are fetched after this number of steps, to see whether the run has failed.
# Fetching them more often would hold up an accelerator.
_FETCH_EVERY = 10
# After this time a run reports that it is still compiling.
_PATIENCE_SECONDS = 10.0
_LOGGER = logging.getLogger("eqdistill")


def distill(
    start: AbstractParameterisation,
    objective: AbstractObjective | PyTree,
    data: Dataset | AbstractData | Callable[[int], AbstractData],
    *,
    optimiser: optax.GradientTransformation = optax.adam(0.02),
    steps: int = 50,
    learn: Callable = lambda start: start.images,
    learn_objective: Callable = lambda objective: (),
    callbacks: Sequence[AbstractCallback | AbstractCheckpoints] = (),
    key: PRNGKeyArray | None = None,
    state: DistillState | None = None,
) -> Distillation:
    r"""Distils a dataset: minimises an objective over a distilled set,

    $$\min_\theta F(\theta),$$

    by the steps of an Optax optimiser along the gradient $\nabla F$. For
    [`eqdistill.Bilevel`][], $F$ is the loss on real data of a model that is fitted to
    the distilled set.

    **Arguments:**

    - `start`: the distilled set to start with; or another
        [`eqdistill.AbstractParameterisation`][], such as [`eqdistill.Packed`][].
    - `objective`: the [`eqdistill.AbstractObjective`][]. A model, or a source of models
        such as [`eqdistill.Pool`][], stands for `Bilevel` of it.
    - `data`: the real data to distil. All of a [`eqdistill.Dataset`][] is used in each
        step; [`eqdistill.Batches`][] use a part of it. Or a function from the number of
        the step to its data, for data that are not in memory.

    All other arguments are keyword only.

    - `optimiser`: any Optax optimiser. Optimisers with a line search, such as
        `optax.lbfgs`, receive the value, the gradient and the function that they need.
        With a convex inner problem and all data in each step,
        `optax.lbfgs(learning_rate=1.0, linesearch=None)` converges in far fewer steps,
        and with [`eqdistill.linear.whitened`][] around it in fewer still.
    - `steps`: the number of the step at which the run ends.
    - `learn`: picks what is learned of `start`, as `where` in `equinox.tree_at`. It
        defaults to the images. `lambda s: s` learns all of its floating-point arrays.
    - `learn_objective`: picks what is learned of `objective`, such as a temperature,
        `lambda o: o.loss.log_temperature`. It defaults to nothing.
    - `callbacks`: [`eqdistill.AbstractCallback`][]s, such as
        [`eqdistill.ProgressBar`][] and [`eqdistill.EarlyStopping`][]. With
        [`eqdistill.Checkpoints`][] among them, a run that was killed resumes.
    - `key`: a `jax.random.key` for all random numbers. Defaults to `jax.random.key(0)`.
    - `state`: continues from this state, which is the `state` of an earlier result. All
        other arguments must be those of the earlier call, except for `steps`, which
        counts from the start of the first run.

    **Returns:**

    An [`eqdistill.Distillation`][].

    **Raises:**

    - A `TypeError` or `ValueError` for an argument that is out of its range, or does
        not fit the others; or if checkpoints belong to another problem.
    - An [`eqdistill.DistillationError`][], with the last good distilled set, if the
        objective fails, for example because the inner solver did not converge; if the
        loss, its gradient or the distilled set stop being finite; or if the data or a
        callback raise an error.
    """
    steps = as_int(steps)
    if not isinstance(objective, AbstractObjective):
        wanted = "`objective` must be an `AbstractObjective`,"
        objective = Bilevel(as_models(objective, wanted))
    problem = Problem(
        start,
        objective,
        optimiser=optimiser,
        learn=learn,
        learn_objective=learn_objective,
    )
    data_at = _as_function(objective, data)
    if state is None:
        state = problem.init(key=jr.key(0) if key is None else key)
    else:
        _check_state(problem, state, key)
    with contextlib.ExitStack() as stack:
        run = _Run(problem, data_at, state, steps, callbacks, stack)
        while not run.has_ended():
            run.advance()
        return run.result()


class _Run:
    """A run of the outer loop, with its callbacks and checkpoints."""

    def __init__(self, problem, data_at, state, steps, callbacks, stack):
        for callback in callbacks:
            if not isinstance(callback, AbstractCallback | AbstractCheckpoints):
                raise TypeError(
                    "`callbacks` must be `AbstractCallback`s; got "
                    f"{describe(callback)} among them."
                )
        is_store = lambda x: isinstance(x, AbstractCheckpoints)
        if sum(map(is_store, callbacks)) > 1:
            raise ValueError("`callbacks` must have at most one `Checkpoints`.")
        self.problem = problem
        self.data_at = data_at
        self.steps = steps
        self.all_callbacks = callbacks
        self.callbacks = [x for x in callbacks if not is_store(x)]
        self.checkpoints = next(filter(is_store, callbacks), None)
        self.state = state
        self.columns: dict[str, np.ndarray] = {}
        self.has_stopped = False
        self.store = None
        if self.checkpoints is not None:
            self.store = self.checkpoints.open(problem, state)
            stack.callback(self.store.close)
        self.own = []
        for i, callback in enumerate(self.callbacks):
            self.own.append(callback.init(problem, state, steps))
            stack.callback(lambda i=i: self.callbacks[i].close(self.own[i]))
        is_found = self._restore()
        step = int(self.state.step)
        if steps < step or (steps == step and not is_found):
            wanted = f"above {step}, the step of `state`" if step > 0 else "at least 1"
            if is_found:
                wanted = f"at least {step}, the step of the newest checkpoint"
            raise ValueError(f"`steps` must be {wanted}; got {steps}.")
        self.compiled = None
        if self.has_ended():
            self._call(lambda x: step % x.every != 0)

    def _restore(self) -> bool:
        if self.store is None:
            return False
        found = self.store.restore(self._snapshot())
        if found is None or int(found.state.step) < int(self.state.step):
            return False
        self.state, self.columns = found.state, found.history
        self.has_stopped = found.has_stopped
        self.own = [
            eqx.combine(arrays, own)
            for arrays, own in zip(found.callbacks, self.own, strict=True)
        ]
        return True

    def _snapshot(self) -> Snapshot:
        arrays = tuple(eqx.filter(own, eqx.is_array) for own in self.own)
        return Snapshot(self.state, self.columns, arrays, self.has_stopped)

    def has_ended(self) -> bool:
        return self.has_stopped or int(self.state.step) >= self.steps

    def result(self, *, has_failed: bool = False) -> Distillation:
        own = iter(self.own)
        callbacks = tuple(
            None if x is self.checkpoints else next(own) for x in self.all_callbacks
        )
        return to_result(
            self.problem, self.state, self.columns, callbacks, has_failed=has_failed
        )

    def advance(self) -> None:
        """Takes the steps until a callback is due, and calls it."""
        step = int(self.state.step)
        every = [_FETCH_EVERY, *(x.every for x in self.all_callbacks)]
        num_steps = min(self.steps - step, *(n - step % n for n in every))
        records = self._take_steps(step, num_steps)
        status = int(self.state.status)
        taken = records[: int(self.state.step) - step]
        for record, values in zip(taken, jax.device_get([r.values for r in taken])):
            for name, value in zip(record.names, values, strict=True):
                column = self.columns.get(name, np.zeros(0, values.dtype))
                self.columns[name] = np.append(column, value)
        if status != Status.RUNNING:
            reasons = (*REASONS, *self.problem.objective.failures)
            raise DistillationError(
                f"Distillation stopped at step {int(self.state.step)}: "
                f"{reasons[status]}.",
                self.result(has_failed=True),
            )
        step = int(self.state.step)
        try:
            stops = self._call(lambda x: step % x.every == 0)
            self.has_stopped = stops
            is_last = self.has_ended()
            # Before the last calls of the other callbacks: a run that continues to more
            # steps must not contain what they make of a step that is the last one now.
            if self.store and (is_last or step % self.checkpoints.every == 0):
                self.store.save(self._snapshot())
            if is_last:
                self._call(lambda x: step % x.every != 0)
        except Exception as e:
            raise DistillationError(
                f"Distillation stopped at step {step}: a callback raised the error "
                "above.",
                self.result(),
            ) from e

    def _take_steps(self, step: int, num_steps: int) -> list[Record]:
        records: list[Record] = []
        for i in range(num_steps):
            try:
                data = self.data_at(step + i)
            except Exception as e:
                if self.compiled is not None:
                    self.state = self.compiled.state()
                raise DistillationError(
                    f"Distillation stopped at step {step + i}: `data` raised the error "
                    "above.",
                    self.result(has_failed=True),
                ) from e
            try:
                if self.compiled is None:
                    check_cached(self.problem.objective, data)
                    self.compiled = CompiledStep(self.problem, self.state)
                    with _reported_compilation():
                        records.append(self.compiled(data))
                else:
                    records.append(self.compiled(data))
                # At most two steps are under way, so that Ctrl-C is prompt.
                if i > 0:
                    jax.block_until_ready(records[i - 1])
                if i == num_steps - 1:
                    self.state = self.compiled.state()
                    jax.block_until_ready(self.state)
            except jax.errors.JaxRuntimeError as e:
                raise DistillationError(
                    f"Distillation stopped in the {num_steps} steps after step {step}: "
                    "the objective raised the error above.",
                    self.result(has_failed=True),
                ) from e
        return records

    def _call(self, is_due: Callable) -> bool:
        stops = False
        history = History.of(self.columns)
        for i, callback in enumerate(self.callbacks):
            if is_due(callback):
                self.own[i], stop = callback(
                    self.problem, self.state, history, self.own[i]
                )
                stops = stops or bool(stop)
        return stops


@contextlib.contextmanager
def _reported_compilation():
    message = "Still compiling the first step. Large networks may take some minutes."
    timer = threading.Timer(_PATIENCE_SECONDS, _LOGGER.warning, (message,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _as_function(objective, data) -> Callable[[int], AbstractData]:
    if isinstance(data, Dataset):
        data = objective.layout(data)
    if isinstance(data, AbstractData):
        return lambda step: data
    if not callable(data) or isinstance(data, type):
        raise TypeError(
            "`data` must be a `Dataset`, an `AbstractData` such as `Batches(train, 128)`, "
            f"or a function from the step to an `AbstractData`; got {describe(data)}."
        )
    return data


def _check_state(
    problem: Problem, state: DistillState, key: PRNGKeyArray | None
) -> None:
    if key is not None:
        raise ValueError("`key` must not be given with `state`, which has the key.")
    template = eqx.filter_eval_shape(problem.init, key=state.key)
    difference = array_difference(template, state)
    if difference is not None:
        raise ValueError(f"`state` must be a state of the same problem: {difference}.")
    if state.status != Status.RUNNING:
        raise ValueError(
            "`state` must be of a run that can continue; this run has stopped with "
            f"status {int(state.status)}."
        )
