import abc
import io
import sys
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._checks import check_at_least
from .._conversions import as_int
from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from ._data import AbstractData, as_data
from ._distill_state import DistillState
from ._distillation import History
from ._outer_loss import check_data, decode, loss_of
from ._problem import Problem


Own = TypeVar("Own")


class AbstractCallback(eqx.Module, Generic[Own]):
    """Watches a distillation, and may stop it.

    A callback has a state of its own, which it is given and returns. The states at the
    end of the run are the `callbacks` of the [`eqdistill.Distillation`][]. With
    [`eqdistill.Checkpoints`][] a state survives the end of the program if it consists
    of numbers, strings, arrays, and lists, tuples and dicts of these; and of modules
    that are in the same place of the first state. Functions, files and real data in it
    are taken from a new first state.

    **Attributes:**

    - `every`: the callback is called after each step whose number is a multiple of
        this, and after the last step.
    """

    every: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init(self, problem: Problem, state: DistillState, steps: int) -> Own:
        """**Arguments:**

        - `problem`: all that stays fixed.
        - `state`: the state that the run begins with, and began with if it goes on
            from a checkpoint.
        - `steps`: the number of the step at which the run ends.

        **Returns:**

        The first state of the callback.
        """

    @abc.abstractmethod
    def __call__(
        self, problem: Problem, state: DistillState, history: History, own: Own
    ) -> tuple[Own, bool]:
        """**Arguments:**

        - `problem`: all that stays fixed. `problem.distilled(state)` is the distilled
            set.
        - `state`: the state after the last step: a copy, which may be kept.
        - `history`: what was measured in all steps so far.
        - `own`: the state of the callback.

        **Returns:**

        The new state of the callback, and whether the run is to stop.
        """

    @abc.abstractmethod
    def close(self, own: Own) -> None:
        """Is called once at the end, also after an error.

        **Arguments:**

        - `own`: the last state of the callback.
        """


class ProgressBar(AbstractCallback["_Bar"]):
    """Shows a progress bar, with the outer loss of the last step. The speed that it
    shows leaves out the time for compiling. Where the standard error is no terminal, as
    in a log file, there is a line for each tenth of the run. Needs `tqdm`, of
    `eqdistill[progress]`.
    """

    every: int = eqx.field(default=10, converter=as_int)

    def __check_init__(self):
        check_at_least(1, every=self.every)

    def init(self, problem, state, steps):
        """**Raises:**

        An `ImportError` without `tqdm`.
        """
        del problem
        try:
            from tqdm.auto import tqdm
            from tqdm.notebook import tqdm_notebook
        except ImportError as e:
            raise ImportError(
                "`ProgressBar` needs tqdm: pip install 'eqdistill[progress]'."
            ) from e
        # The bar of a notebook is no text, and its standard error no terminal.
        in_lines = not issubclass(tqdm, tqdm_notebook) and not sys.stderr.isatty()
        bar = tqdm(
            total=steps,
            initial=int(state.step),
            unit="step",
            file=io.StringIO() if in_lines else None,
        )
        return _Bar(bar, in_lines)

    def __call__(self, problem, state, history, own):
        del problem
        own.show(int(state.step), float(history.loss[-1]) if len(history) else None)
        return own, False

    def close(self, own):
        own.bar.close()


class _Bar:
    """A bar of tqdm, or lines of the same words."""

    def __init__(self, bar: Any, in_lines: bool):
        self.bar = bar
        self._in_lines = in_lines
        self._is_first = True

    def __reduce__(self):
        # A bar cannot be sent to another process. What arrives there shows nothing.
        return type(self), (None, False)

    def show(self, step: int, loss: float | None) -> None:
        bar = self.bar
        tenth = 10 * bar.n // bar.total
        if self._is_first:
            # The first steps were waited for until they were compiled. The clock starts
            # after them.
            bar.initial = bar.n = bar.last_print_n = step
            bar.start_t = bar.last_print_t = time.time()
            self._is_first = False
        if loss is not None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update(step - bar.n)
        if not self._in_lines:
            bar.refresh()
        elif 10 * step // bar.total > tenth:
            print(bar, file=sys.stderr, flush=True)


class Log(AbstractCallback[None]):
    """Writes a line after each `every` steps, with what the last one measured."""

    write: Callable[[str], Any]
    every: int = eqx.field(converter=as_int)

    def __init__(self, write: Callable[[str], Any] = print, *, every: int = 10):
        """**Arguments:**

        - `write`: takes the line, such as `print` or the `info` of a `logging.Logger`.
        - `every`: as for [`eqdistill.AbstractCallback`][]. (Keyword only argument.)

        **Raises:**

        A `ValueError` if `every` is less than 1.
        """
        check_at_least(1, every=every)
        self.write = write
        self.every = every

    def init(self, problem, state, steps):
        del problem, state, steps
        return None

    def __call__(self, problem, state, history, own):
        del problem
        if len(history) > 0:
            self.write(
                f"step {int(state.step)}: loss {history.loss[-1]:.5g}, gradient norm "
                f"{history.gradient_norm[-1]:.3g}, inner residual "
                f"{history.inner_residual[-1]:.3g}"
            )
        return own, False

    def close(self, own):
        del own


class Best(eqx.Module):
    """The state of [`eqdistill.EarlyStopping`][].

    **Attributes:**

    - `distilled`: the distilled set with the least loss on the held-out data.
    - `step`: the number of steps after which it was found.
    - `steps`, `losses`: after how many steps the held-out loss was taken, and what it
        was, in nats per image. The first entry is that of the start. A loss is NaN if
        the fit did not converge.
    - `data`: the held-out data, laid out once.
    """

    distilled: DistilledSet
    step: int
    steps: tuple[int, ...]
    losses: Float[np.ndarray, " checks"]
    data: AbstractData


class EarlyStopping(AbstractCallback[Best]):
    """Stops when the distilled set gets no better on held-out data, and keeps the best
    one: `result.callbacks[i].distilled`, with a [`eqdistill.Best`][] for a state.

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

        - `data`: real data that are not in the training data: see
            [`eqdistill.Dataset.split`][].
        - `every`: the held-out loss is taken after each such number of steps. (Keyword
            only argument.)
        - `patience`: the run stops after this many held-out losses in a row that are no
            better than the best. A loss that is not finite is no better. (Keyword only
            argument.)

        **Raises:**

        A `ValueError` if `every` or `patience` is less than 1.
        """
        check_at_least(1, every=every, patience=patience)
        self.data = data
        self.every = every
        self.patience = patience

    def init(self, problem, state, steps):
        """**Raises:**

        A `ValueError` if the held-out data do not suit the problem, or if the loss on
        them is not finite at the start.
        """
        del steps
        distilled = problem.distilled(state)
        check_data("data", self.data, distilled, problem.model, problem.inner)
        data = as_data(self.data, problem.model)
        loss = _loss_on(data, problem, state)
        if not np.isfinite(loss):
            raise ValueError(
                "The loss on the held-out `data` must be finite at the start; it is "
                f"{loss}."
            )
        step = int(state.step)
        losses = np.array([loss], np.float32)
        return Best(distilled, step, (step,), losses, data)

    def __call__(self, problem, state, history, own):
        del history
        step = int(state.step)
        loss = _loss_on(own.data, problem, state)
        is_better = loss < np.nanmin(own.losses)
        own = Best(
            problem.distilled(state) if is_better else own.distilled,
            step if is_better else own.step,
            (*own.steps, step),
            np.append(own.losses, np.float32(loss)),
            own.data,
        )
        since_best = len(own.steps) - 1 - own.steps.index(own.step)
        return own, since_best >= self.patience

    def close(self, own):
        del own


def _loss_on(data: AbstractData, problem: Problem, state: DistillState) -> float:
    start, inner = problem.pair(state)
    args = (start, problem.model, data, inner, state.inner_state)
    return float(_loss(*args, state.step, state.key))


@eqx.filter_jit
def _loss(start, model, data, inner, inner_state, step, key):
    distilled = decode(start)
    loss, outcome = loss_of(
        distilled, model, data, inner, inner_state, step=step, key=key
    )
    fitted = outcome.fitted
    return jnp.where(fitted.converged & ~fitted.collapsed, loss, jnp.nan)
