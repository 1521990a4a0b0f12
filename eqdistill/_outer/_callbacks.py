import abc
import sys
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._checks import check_at_least, needs
from .._conversions import as_int
from .._data._class_names import check_same_classes
from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from ._data import AbstractData
from ._distillation import History
from ._problem import DistillState, Problem


Own = TypeVar("Own")


class AbstractCallback(eqx.Module, Generic[Own]):
    """Watches a distillation, and may stop it.

    A callback has a state, which it receives and returns. The final states are the
    `callbacks` of the [`Distillation`][]. [`eqdistill.Checkpoints`][] saves the
    arrays in a state, which must therefore have the same structure, shapes and dtypes
    throughout. Other leaves, such as an open file, are recreated by `init` when a run
    resumes.

    **Attributes:**

    - `every`: the callback is called after each step whose number is a multiple of
        this, and after the last step.
    """

    every: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init(self, problem: Problem, state: DistillState, steps: int) -> Own:
        """**Arguments:**

        - `problem`: everything that stays fixed in the run.
        - `state`: the state at the start of the run, even when resuming.
        - `steps`: the number of the step at which the run ends.

        **Returns:** the first state of the callback, any pytree.
        """

    @abc.abstractmethod
    def __call__(
        self, problem: Problem, state: DistillState, history: History, own: Own
    ) -> tuple[Own, bool]:
        """**Arguments:**

        - `problem`: everything that stays fixed. `problem.distilled(state)` is the
            distilled set.
        - `state`: the state after the last step: a copy, which may be kept.
        - `history`: the metrics of all steps so far.
        - `own`: the state of the callback.

        **Returns:**

        The new state of the callback, and whether the run should stop.
        """

    def on_step(self, step: int, own: Own) -> None:
        """Called after each step, whatever `every` is, with the number of steps taken.
        Does nothing by default; `ProgressBar` advances its bar."""
        del step, own

    @abc.abstractmethod
    def close(self, own: Own) -> None:
        """Called once at the end, even after an error, with the final state."""


class Snapshot(eqx.Module):
    """Everything that a run needs to continue: the state after the last step, the
    metrics of all steps under their names, the arrays in the states of the callbacks,
    and whether a callback has stopped the run."""

    state: DistillState
    history: dict[str, Float[np.ndarray, " steps"]]
    callbacks: tuple[PyTree, ...]
    has_stopped: bool


class AbstractCheckpoints(eqx.Module):
    """Keeps snapshots of a run, from which the run can continue.

    **Attributes:**

    - `every`: a snapshot is saved after each step whose number is a multiple of this,
        and after the last step.
    """

    every: eqx.AbstractVar[int]

    @abc.abstractmethod
    def open(self, problem: Problem, state: DistillState) -> Any:
        """Returns an object with the methods `restore(template)`, which returns the
        newest readable [`Snapshot`][] or `None`, `save(snapshot)` and `close()`.
        `state` is the state at the start of the run."""


class ProgressBar(AbstractCallback[Any]):
    """Shows a progress bar. It reports that the first step is being compiled, and the
    displayed speed excludes the compilation. The bar advances after each step, and
    updates the loss every `every` steps. Needs `tqdm`, which is in
    `eqdistill[progress]`."""

    every: int = eqx.field(default=10, converter=as_int)

    def __check_init__(self):
        check_at_least(1, every=self.every)

    def init(self, problem, state, steps):
        """**Raises:** an `ImportError` if `tqdm` is not installed."""
        del problem
        with needs("`ProgressBar`", "tqdm", "progress"):
            from tqdm.auto import tqdm
        return tqdm(
            total=steps,
            initial=int(state.step),
            desc="compiling the first step",
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # Rarely in log files.
            miniters=1,  # Without it, tqdm skips updates when a run slows down.
        )

    def __call__(self, problem, state, history, own):
        del problem
        if len(history) > 0:
            own.set_postfix(loss=f"{history.loss[-1]:.4f}", refresh=False)
        self.on_step(int(state.step), own)
        return own, False

    def on_step(self, step, own):
        if own.desc:  # The clock starts after the compilation, and after resuming.
            own.initial = own.n = step - 1
            own.set_description(refresh=False)
            own.unpause()
        own.update(step - own.n)

    def close(self, own):
        own.close()


class _Best(eqx.Module):
    distilled: DistilledSet
    step: Int[Array, ""]
    loss: Float[Array, ""]
    checks: Int[Array, ""]  # The number of checks since this step.
    layout: Any  # A function, so that checkpoints do not save the held-out data.


class EarlyStopping(AbstractCallback[_Best]):
    """Stops the run when the distilled set no longer improves on held-out data, and
    keeps the best one: its state, `result.callbacks[i]`, has the fields `distilled`,
    `step` and `loss`.

    !!! Example

        ```python
        train, held_out = train.split(0.1, key=jr.key(0))
        stopping = eqd.EarlyStopping(held_out)
        result = eqd.distill(start, model, train, callbacks=[stopping])
        best = result.callbacks[0].distilled
        ```
    """

    data: Dataset | AbstractData
    every: int = eqx.field(converter=as_int)
    patience: int = eqx.field(converter=as_int)

    def __init__(
        self, data: Dataset | AbstractData, *, every: int = 10, patience: int = 3
    ):
        """**Arguments:**

        - `data`: held-out real data, which the run does not train on.
        - `every`: as for [`eqdistill.AbstractCallback`][]. (Keyword only argument.)
        - `patience`: the run stops after this number of checks without improvement.
            (Keyword only argument.)

        **Raises:**

        A `ValueError` if `every` or `patience` is less than 1.
        """
        check_at_least(1, every=every, patience=patience)
        self.data = data
        self.every = every
        self.patience = patience

    def init(self, problem, state, steps):
        """**Raises:**

        A `ValueError` if the loss on the held-out data is not finite at the start, or
        the names of the classes differ.
        """
        del steps
        data, distilled = self.data, problem.distilled(state)
        check_same_classes("`start`", distilled, "held-out `data`", data)
        if isinstance(data, Dataset):
            data = problem.objective.layout(data)
        loss = _held_out_loss(problem, state, data)
        if not jnp.isfinite(loss):
            raise ValueError(
                "The loss on the held-out `data` must be finite at the start; it is "
                f"{loss}."
            )
        return _Best(distilled, state.step, loss, jnp.array(0), lambda: data)

    def __call__(self, problem, state, history, own):
        del history
        loss = _held_out_loss(problem, state, own.layout())
        if loss < own.loss:
            distilled = problem.distilled(state)
            own = _Best(distilled, state.step, loss, jnp.array(0), own.layout)
        else:
            own = eqx.tree_at(lambda best: best.checks, own, own.checks + 1)
        return own, bool(own.checks >= self.patience)

    def close(self, own):
        del own


@eqx.filter_jit
def _held_out_loss(problem: Problem, state: DistillState, data: AbstractData) -> Array:
    """The loss of the objective. It is NaN if the objective fails."""
    start, objective = problem.pair(state)
    loss, outcome = objective(
        start.decode(),
        data,
        state.objective_state,
        step=state.step,
        key=state.key,
    )
    return jax.lax.convert_element_type(
        jnp.where(outcome.failure > 0, jnp.nan, loss), jnp.result_type(float)
    )
