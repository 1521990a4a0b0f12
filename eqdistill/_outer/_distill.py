import contextlib
import dataclasses
import logging
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import array_difference, check_at_least, check_concrete
from .._conversions import as_int
from .._data._class_names import describe_class
from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from .._data._parameterisation import AbstractParameterisation
from .._describe import describe as describe_parts, differences
from .._models._models import as_models
from .._sharding import to_host
from .._typechecking import describe
from ._batches import Batches
from ._bilevel import Bilevel
from ._callbacks import AbstractCallback, AbstractCheckpoints, Snapshot
from ._data import AbstractData, check_cached, FullBatch
from ._distillation import Distillation, DistillationError, History, to_result
from ._loop import CompiledStep, Record
from ._objective import AbstractObjective
from ._problem import DistillState, Problem


# The metrics are fetched at this interval, in steps, to see if the run has failed.
# Fetching them more often would hold up an accelerator.
_FETCH_EVERY = 10
# After this time a run reports that it is still compiling.
_PATIENCE_SECONDS = 10.0
_WAIT = ("Still compiling the first step. Large networks may take a few minutes.",)
_LOGGER = logging.getLogger("eqdistill")


def distill(
    start: AbstractParameterisation,
    objective: AbstractObjective | PyTree,
    data: Dataset | AbstractData | Callable[[int], AbstractData],
    *,
    optimiser: optax.GradientTransformation | optax.MultiSteps = optax.adam(0.02),
    steps: int = 50,
    learn: Callable = lambda start: start.images,
    learn_objective: Callable = lambda objective: (),
    callbacks: Sequence[AbstractCallback | AbstractCheckpoints] = (),
    key: PRNGKeyArray | None = None,
    state: Distillation | DistillState | None = None,
) -> Distillation:
    r"""Distils a dataset: minimises an objective over a distilled set,

    $$\min_\theta F(\theta),$$

    with an Optax optimiser and the gradient $\nabla F$. For [`eqdistill.Bilevel`][],
    $F$ is the loss on real data of a model that is fitted to the distilled set.

    **Arguments:**

    - `start`: the distilled set to start from; or another
        [`eqdistill.AbstractParameterisation`][], such as [`eqdistill.Packed`][].
    - `objective`: the [`eqdistill.AbstractObjective`][]. A model, or a source of models
        such as [`eqdistill.Pool`][], is wrapped in `Bilevel`.
    - `data`: the real data to distil. Each step uses all of an
        [`eqdistill.Dataset`][], or a part of it with [`eqdistill.Batches`][]. For data
        that do not fit in memory, pass a function from the step number to the data
        for that step.

    All other arguments are keyword only.

    - `optimiser`: any Optax optimiser. Optimisers with a line search, such as
        `optax.lbfgs`, receive the value, the gradient and the function that they need.
        With a convex inner problem and all data in each step,
        `optax.lbfgs(learning_rate=1.0, linesearch=None)` converges in far fewer steps,
        and in fewer still when wrapped in [`eqdistill.linear.whitened`][]. `lookahead`,
        `sam`, `sophia` and `schedule_free` are not supported. Use
        [`eqdistill.averaged`][] instead of `schedule_free`.
    - `steps`: the number of the step at which the run ends.
    - `learn`: selects what to learn in `start`, like `where` in `equinox.tree_at`. It
        defaults to the images. `lambda s: s` learns all of its floating-point arrays.
    - `learn_objective`: selects what to learn in `objective`, such as a temperature,
        `lambda o: o.loss.log_temperature`. It defaults to nothing.
    - `callbacks`: [`eqdistill.AbstractCallback`][]s, such as
        [`eqdistill.ProgressBar`][] and [`eqdistill.EarlyStopping`][]. With
        [`eqdistill.Checkpoints`][] among them, a run that was killed resumes.
    - `key`: a `jax.random.key` for all random numbers. Defaults to `jax.random.key(0)`.
    - `state`: an earlier result to continue from, as if its run had not stopped.
        `steps` counts from the start of the first run. The data, the objective and the
        settings of the optimiser may change: the `changes` of the new result list them.
        You can also pass the `state` of an earlier result, but then the changes are not
        known.

    **Returns:**

    A [`Distillation`][].

    **Raises:**

    - A `TypeError` or `ValueError` for an argument that is out of range, or does not
        fit the others; or if checkpoints belong to a different problem.
    - An [`eqdistill.DistillationError`][], with the last good distilled set, if the
        objective fails, for example because the inner solver did not converge; if the
        loss, its gradient or the distilled set is no longer finite; or if the data or a
        callback raises an error.
    """
    steps = as_int(steps)
    if key is not None and state is not None:
        raise ValueError("`key` must not be given with `state`, which holds the key.")
    key = jr.key(0) if key is None else key
    check_concrete(
        "distill", start=start, objective=objective, data=data, state=state, key=key
    )
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
    _check_labels(start.decode(), objective, data)
    settings, changes = _settings(problem, data), ()
    if state is None:
        state = problem.init(key=key)
    elif isinstance(state, Distillation):
        changes = *state.changes, *_changes(state, settings)
        state = _check_state(problem, state.state)
    else:
        state = _check_state(problem, state)
        changes = (f"from step {state.step}: unknown, as `state` was not a result",)
    for change in changes:
        _LOGGER.info(change)
    record = {"settings": settings, "changes": changes}
    with contextlib.ExitStack() as stack:
        run = _Run(problem, data_at, state, steps, callbacks, record, stack)
        while not run.has_ended():
            run.advance()
        return run.result()


class _Run:
    """A run of the outer loop, with its callbacks and checkpoints."""

    def __init__(self, problem, data_at, state, steps, callbacks, record, stack):
        is_store = lambda x: isinstance(x, AbstractCheckpoints)
        for x in callbacks:
            if not isinstance(x, AbstractCallback | AbstractCheckpoints):
                raise TypeError(
                    f"`callbacks` must be `AbstractCallback`s; got {describe(x)}."
                )
        if sum(map(is_store, callbacks)) > 1:
            raise ValueError("`callbacks` must have at most one `Checkpoints`.")
        self.problem = problem
        self.data_at = data_at
        self.snapshot = Snapshot(state, {}, (), False)
        self.steps = steps
        self.record = record
        self.every = [_FETCH_EVERY, *(x.every for x in callbacks)]
        check_at_least(1, every=min(self.every))
        self.order = [is_store(x) for x in callbacks]
        self.callbacks = [x for x in callbacks if not is_store(x)]
        self.checkpoints = next(filter(is_store, callbacks), None)
        self.compiled: CompiledStep | None = None
        self.own = []
        for i, callback in enumerate(self.callbacks):
            self.own.append(callback.init(problem, state, steps))
            stack.callback(lambda i=i: self.callbacks[i].close(self.own[i]))
        self.store: Any = None
        is_found = False
        if self.checkpoints is not None:
            self.store = self.checkpoints.open(problem, state)
            stack.callback(self.store.close)
            is_found = self._restore()
        step = self.step
        if steps < step or (steps == step and not is_found):
            wanted = f"above {step}, the step of `state`" if step > 0 else "at least 1"
            if is_found:
                wanted = f"at least {step}, the step of the newest checkpoint"
            raise ValueError(f"`steps` must be {wanted}; got {steps}.")
        if self.has_ended():
            self._call(lambda every: step % every != 0)

    @property
    def step(self) -> int:
        return int(self.snapshot.state.step)

    def _arrays(self) -> tuple[PyTree, ...]:
        is_array = lambda x: isinstance(x, jax.Array | np.ndarray | np.generic)
        return tuple(eqx.filter(own, is_array) for own in self.own)

    def _restore(self) -> bool:
        template = dataclasses.replace(self.snapshot, callbacks=self._arrays())
        found = self.store.restore(template)
        if found is None or int(found.state.step) < self.step:
            return False
        self.snapshot = found
        self.own = list(map(eqx.combine, found.callbacks, self.own))
        return True

    def has_ended(self) -> bool:
        return self.snapshot.has_stopped or self.step >= self.steps

    def result(self, *, has_failed: bool = False) -> Distillation:
        is_data = lambda x: eqx.is_array_like(x) or isinstance(x, str)
        own = iter(eqx.filter(self.own, is_data))
        callbacks = tuple(None if is_store else next(own) for is_store in self.order)
        state = self.snapshot.state
        if has_failed:
            state = eqx.tree_at(lambda s: s.learned, state, state.last_good)
        others = {"callbacks": callbacks, **self.record}
        return to_result(self.problem, state, self.snapshot.history, **others)

    def advance(self) -> None:
        """Takes the steps until a callback is due, and calls it."""
        step = self.step
        num_steps = min(self.steps - step, *(n - step % n for n in self.every))
        self._take_steps(step, num_steps)
        failure = self.problem.failure(self.snapshot.state)
        if failure is not None:
            # The error raised by data that are read within a step, if any.
            cause = getattr(self.data_at, "error", None)
            reason = failure if cause is None else "`data` raised the error above"
            error = self._error(f"at step {self.step}: {reason}", has_failed=True)
            raise error from cause
        step = self.step
        try:
            stops = self._call(lambda every: step % every == 0)
            self.snapshot = dataclasses.replace(self.snapshot, has_stopped=stops)
            is_last = self.has_ended()
            # Save before the final calls of the other callbacks: a run that continues
            # to more steps must not contain the effect of those calls.
            is_due = self.checkpoints and step % self.checkpoints.every == 0
            if self.store and (is_last or is_due):
                snapshot = dataclasses.replace(self.snapshot, callbacks=self._arrays())
                self.store.save(snapshot)
            if is_last:
                self._call(lambda every: step % every != 0)
        except Exception as e:
            raise self._error(
                f"at step {step}: a callback raised the error above"
            ) from e

    def _take_steps(self, step: int, num_steps: int) -> None:
        records: list[Record] = []
        for i in range(num_steps):
            try:
                data = self.data_at(step + i)
            except Exception as e:
                self._fetch(records)
                message = f"at step {step + i}: `data` raised the error above"
                raise self._error(message, has_failed=True) from e
            try:
                if self.compiled is None:
                    check_cached(self.problem.objective, data)
                    state = self.snapshot.state
                    self.compiled = CompiledStep(self.problem, state, data)
                    timer = threading.Timer(_PATIENCE_SECONDS, _LOGGER.warning, _WAIT)
                    timer.start()
                    try:
                        records.append(self.compiled(data))
                    finally:
                        timer.cancel()
                else:
                    records.append(self.compiled(data))
                # Keep at most two steps in flight, so that Ctrl-C acts promptly.
                jax.block_until_ready(records[max(i - 1, 0)])
                for callback, own in zip(self.callbacks, self.own, strict=True):
                    callback.on_step(step + max(i, 1), own)
                if i + 1 == num_steps:
                    self._fetch(records)
            except jax.errors.JaxRuntimeError as e:
                message = (
                    f"in the {num_steps} steps after step {step}: the objective or "
                    "`data` raised the error above"
                )
                raise self._error(message, has_failed=True) from e

    def _fetch(self, records: list[Record]) -> None:
        """Waits for the steps, and reads their state and their metrics."""
        if self.compiled is None or not records:
            return
        state = self.compiled.state()
        # A run that has failed takes no further steps.
        values = np.stack(jax.device_get([x.values for x in records]))
        values = values[: int(state.step) - self.step]
        history = dict(self.snapshot.history)
        for i, name in enumerate(records[0].names):
            before = history.get(name, values[:0, i])
            history[name] = np.concatenate([before, values[:, i]])
        self.snapshot = dataclasses.replace(self.snapshot, state=state, history=history)

    def _error(self, message: str, *, has_failed: bool = False) -> DistillationError:
        result = self.result(has_failed=has_failed)
        return DistillationError(f"Distillation stopped {message}.", result)

    def _call(self, is_due: Callable[[int], bool]) -> bool:
        stops = False
        history = History.of(self.snapshot.history)
        for i, callback in enumerate(self.callbacks):
            if is_due(callback.every):
                self.own[i], stop = callback(
                    self.problem, self.snapshot.state, history, self.own[i]
                )
                stops = stops or bool(stop)
        return stops


def _as_function(objective, data) -> Callable[[int], AbstractData]:
    if isinstance(data, Dataset):
        data = objective.layout(data)
    return (lambda step: data) if isinstance(data, AbstractData) else data


def _check_labels(distilled: DistilledSet, objective: Any, data: Any) -> None:
    """Checks that the real labels suit the outer loss, and warns of classes without
    real images: a distilled image of such a class only learns not to look like the
    other classes."""
    data = data.data if isinstance(data, Batches) else data
    if not isinstance(data, Dataset | FullBatch):
        return
    labels = to_host(data.labels)
    if isinstance(objective, Bilevel):
        (objective.loss or distilled.loss).check_labels(labels)
    if distilled.labels.ndim == labels.ndim == 1:
        for y in np.setdiff1d(distilled.labels, labels):
            name = describe_class(y, distilled.class_names or data.class_names)
            _LOGGER.warning(f"`data` has no images of {name}, but `start` does.")


def _settings(problem: Problem, data: Any) -> dict[str, str]:
    """The arguments as text, without the arrays that the state holds."""
    return describe_parts(
        start=eqx.filter(problem.start, eqx.is_array, inverse=True),
        objective=eqx.filter(problem.objective, problem.learn[1], inverse=True),
        optimiser=problem.optimiser,
        data=jax.tree.map(_describe_data, data),
    )


def _describe_data(x: Any) -> Any:
    if not eqx.is_array(x) or x.ndim == 0 or not x.is_fully_addressable:
        return x
    rows = np.asarray(x[:: max(1, len(x) // 64)])
    return f"{x.dtype} of shape {x.shape}, checksum {zlib.crc32(rows.tobytes()):x}"


def _changes(old: Distillation, new: dict[str, str]) -> list[str]:
    """One sentence for each argument that has changed."""
    found = []
    for argument in ("start", "objective", "optimiser", "data"):
        before, now = (
            {path: x for path, x in settings.items() if path.startswith(argument)}
            for settings in (old.settings, new)
        )
        if lines := differences(before, now):
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            found.append(f"from step {old.state.step}: {lines[0]}{more}")
    return found


def _check_state(problem: Problem, state: DistillState) -> DistillState:
    """Checks that a run can continue from a state, and returns the state with the
    structure of this problem."""
    # `optax.tree.set` may have put Python numbers into the state.
    to_array = lambda x: jnp.asarray(x, float) if isinstance(x, float) else x
    state = jax.tree.map(to_array, state)
    template = eqx.filter_eval_shape(problem.init, key=state.key)
    for argument, part in (
        ("start` and `learn", "learned"),
        ("start", "rest"),
        ("objective", "objective_state"),
        ("optimiser", "optimiser_state"),
    ):
        wanted, got = getattr(template, part), getattr(state, part)
        difference = array_difference(wanted, got, check_structure=False)
        if difference is not None:
            raise ValueError(
                f"`state` must fit `{argument}`: {difference}. To continue "
                "from its images only, pass `start=result.start` and no `state`."
            )
    _check_hyperparameters(problem, state)
    failure = problem.failure(state)
    if failure is not None:
        raise ValueError(
            "`state` must come from a run that can continue; this run has stopped: "
            f"{failure}."
        )
    return jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(state))


def _check_hyperparameters(problem: Problem, state: DistillState) -> None:
    """Checks the numbers that `optax.inject_hyperparams` keeps in the state."""
    is_injected = lambda x: hasattr(x, "hyperparams")
    find = lambda tree: list(
        filter(is_injected, jax.tree.leaves(tree, is_leaf=is_injected))
    )
    injected = find(state.optimiser_state)
    fresh = find(problem.optimiser.init(state.learned)) if injected else []
    for old, new in zip(injected, fresh, strict=True):
        for name in old.hyperparams.keys() - old.hyperparams_states.keys():
            before, now = old.hyperparams[name], new.hyperparams[name]
            if not jnp.array_equal(before, now):
                before, now = np.asarray(before), np.asarray(now)
                raise ValueError(
                    f"`optimiser` must have the `{name}` of `state`, {before!s}; got "
                    f"{now!s}. `optax.inject_hyperparams` keeps the value in the "
                    "state. To change it, also pass "
                    f"`state=optax.tree.set(result.state, {name}={now!s})`."
                )
