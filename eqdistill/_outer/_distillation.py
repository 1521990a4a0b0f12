from collections.abc import Sequence

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, PyTree

from .._data._distilled_set import DistilledSet
from .._inner._inner_solver import AbstractInnerSolver
from ._distill_state import DistillState, Status
from ._outer_loss import decode
from ._problem import names, Problem


class History(eqx.Module):
    """What was measured at each step of the outer loop, before its update.

    **Attributes:**

    - `loss`: the outer loss, in nats per image: on the batch of the step, with batches.
    - `gradient_norm`: the Euclidean norm of the hypergradient over all that is
        learned.
    - `inner_residual`: the `gradient_norm` of the [`eqdistill.Fitted`][] of the step.
    """

    loss: Float[np.ndarray, " steps"]
    gradient_norm: Float[np.ndarray, " steps"]
    inner_residual: Float[np.ndarray, " steps"]

    def __len__(self) -> int:
        return len(self.loss)


class Distillation(eqx.Module):
    """The result of [`eqdistill.distill`][].

    **Attributes:**

    - `distilled`: the distilled set after the last update. The best one by held-out
        data is in the state of [`eqdistill.EarlyStopping`][], in `callbacks`.
    - `start`, `inner`: the two arguments of the same names, as they have been learned.
    - `history`: what was measured at each step of this call, and of the calls from
        whose checkpoints it went on.
    - `converged`: whether the norm of the hypergradient reached the tolerance.
    - `learned`: the names of what was learned, such as `"images"` and `"log_l2"`.
    - `state`: the last state, with which [`eqdistill.distill`][] goes on.
    - `callbacks`: the last states of the callbacks, and `None` for
        [`eqdistill.Checkpoints`][].
    """

    distilled: DistilledSet
    start: PyTree
    inner: AbstractInnerSolver
    history: History
    converged: bool
    learned: tuple[str, ...]
    state: DistillState
    callbacks: tuple[PyTree, ...]


class DistillationError(RuntimeError):
    """Raised when a distillation cannot go on.

    **Attributes:**

    - `distillation`: an [`eqdistill.Distillation`][] with the last good distilled set:
        the last one from which a step found the outer loss and its gradient finite, and
        the inner solver converged; or else the one that the run began with.
    """

    distillation: Distillation

    def __init__(self, message: str, distillation: Distillation):
        super().__init__(message)
        self.distillation = distillation

    def __reduce__(self):
        # An exception is rebuilt from its `args`, which hold the message only.
        return type(self), (str(self), self.distillation)


NO_ROWS = np.zeros((0, 3), np.float32)


def to_result(
    problem: Problem,
    state: DistillState,
    rows: Float[np.ndarray, "steps 3"],
    callbacks: tuple[PyTree, ...] = (),
    *,
    has_failed: bool = False,
) -> Distillation:
    """The result of a run that has ended in `state`: after a failure, with the last
    good arrays."""
    if has_failed:
        state = eqx.tree_at(lambda s: s.learned, state, state.last_good)
    start, inner = problem.pair(state)
    return Distillation(
        distilled=decode(start),
        start=start,
        inner=inner,
        history=History(*rows.T),
        converged=int(state.status) == Status.CONVERGED,
        learned=names(problem.learn),
        state=state,
        callbacks=callbacks,
    )


def to_rows(
    rows: Sequence[jax.Array | np.ndarray], length: int
) -> Float[np.ndarray, "steps 3"]:
    """Fetches what steps have measured. Steps after the end of the run are left out."""
    return np.stack(jax.device_get(rows[:length])) if length else NO_ROWS
