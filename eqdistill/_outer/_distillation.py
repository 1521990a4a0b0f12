import dataclasses
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Float, PyTree

from .._data._distilled_set import DistilledSet
from .._data._parameterisation import AbstractParameterisation
from ._objective import AbstractObjective
from ._optimisers import average_of
from ._problem import DistillState, learned_names, Problem


class History(eqx.Module):
    """The metrics of each outer step, before its update.

    **Attributes:**

    - `loss`: the loss of the objective. With batches, it is the loss on the batch of
        the step.
    - `gradient_norm`: the Euclidean norm of its gradient in the learned arrays.
    - `metrics`: the metrics of the objective, under their names: for
        [`eqdistill.Bilevel`][], the `"inner_residual"`.
    """

    loss: Float[np.ndarray, " steps"]
    gradient_norm: Float[np.ndarray, " steps"]
    metrics: dict[str, Float[np.ndarray, " steps"]]

    @classmethod
    def of(cls, columns: dict[str, np.ndarray]) -> "History":
        metrics, empty = dict(columns), np.zeros(0, np.float32)
        loss, norm = (metrics.pop(x, empty) for x in ("loss", "gradient_norm"))
        return cls(loss, norm, metrics)

    def __len__(self) -> int:
        return len(self.loss)


class Distillation(eqx.Module):
    """The result of [`eqdistill.distill`][].

    **Attributes:**

    - `distilled`: the distilled set after the last update. The best one on held-out
        data is in the state of [`eqdistill.EarlyStopping`][], in `callbacks`.
    - `start`, `objective`: the arguments of these names, with the learned arrays.
    - `history`: the metrics of each step of this call, and of the calls whose
        checkpoints it continued.
    - `learned`: the names of the learned arrays, such as `"images"` and `"log_l2"`.
    - `state`: the last state, from which [`eqdistill.distill`][] can continue.
    - `settings`: the arguments of the call in words, each part under its name.
    - `changes`: how `settings` differ from those of the result that the call continued,
        if any, preceded by the changes of that result. Data are compared by 64 of their
        rows, other large arrays by shape.
    - `callbacks`: the last states of the callbacks, without leaves that are not data,
        such as open files; `None` for [`eqdistill.Checkpoints`][].
    """

    distilled: DistilledSet
    start: AbstractParameterisation
    objective: AbstractObjective
    history: History
    learned: tuple[str, ...]
    state: DistillState
    settings: dict[str, str]
    changes: tuple[str, ...]
    callbacks: tuple[PyTree, ...]

    def average(self) -> "Distillation":
        """Returns the same result with the moving average of the learned arrays instead
        of their last values. The optimiser must be wrapped in [`eqdistill.averaged`][].
        Runs continue from its `state` just as from the `state` of this result."""
        average = average_of(self.state.optimiser_state)
        start, objective = eqx.combine(average, (self.start, self.objective))
        changed = {"distilled": start.decode(), "start": start, "objective": objective}
        return dataclasses.replace(self, **changed)

    def __repr__(self) -> str:
        loss = f", loss {self.history.loss[-1]:.4g}" if len(self.history) else ""
        changes = f"; changes: {len(self.changes)}" if self.changes else ""
        return (
            f"<Distillation: {int(self.state.step)} steps{loss}; images of shape "
            f"{self.distilled.images.shape}; learned {', '.join(self.learned)}"
            f"{changes}>"
        )


class DistillationError(RuntimeError):
    """Raised when a distillation cannot continue.

    **Attributes:** `distillation`: the result so far, with the last good distilled set.
    This is the last one for which a step found that everything was finite and that the
    objective did not fail, or the one that the run started with.
    """

    distillation: Distillation

    def __init__(self, message: str, distillation: Distillation):
        super().__init__(message)
        self.distillation = distillation

    def __reduce__(self):
        # An exception is rebuilt from its `args`, which hold the message only.
        return type(self), (str(self), self.distillation)


def to_result(
    problem: Problem,
    state: DistillState,
    columns: dict[str, np.ndarray],
    **others: Any,
) -> Distillation:
    """The result of a run that has ended in `state`."""
    start, objective = problem.pair(state)
    distilled, history = start.decode(), History.of(columns)
    learned = learned_names(problem.learn)
    return Distillation(distilled, start, objective, history, learned, state, **others)
