import equinox as eqx
import numpy as np
from jaxtyping import Float

from ._distilled_set import DistilledSet


class History(eqx.Module):
    """What happened at each step of the outer loop, before its update.

    **Attributes:**

    - `loss`: the outer loss, in nats per image: on the step's batch, if batches are
        used.
    - `gradient_norm`: the Euclidean norm of the hypergradient over all that is
        learned.
    - `inner_residual`: the `gradient_norm` of the step's [`eqdistill.Fitted`][].
    - `adjoint_residual`: that of the adjoint's linear system, relative to its
        right-hand side.
    - `error_bound`: a bound on the Euclidean distance of the hypergradient from the
        exact one, but for rounding errors. It holds for an
        [`eqdistill.LogisticRegression`][] without an intercept, and is infinite for
        all else, for which none is known.

    The last two are infinite for a step whose gradient a line search kept.
    """

    loss: Float[np.ndarray, " steps"]
    gradient_norm: Float[np.ndarray, " steps"]
    inner_residual: Float[np.ndarray, " steps"]
    adjoint_residual: Float[np.ndarray, " steps"]
    error_bound: Float[np.ndarray, " steps"]

    def __len__(self) -> int:
        return len(self.loss)


class Distillation(eqx.Module):
    """The result of [`eqdistill.distill`][].

    **Attributes:**

    - `distilled`: the distilled set, after the last update; with held-out data, the
        best by these.
    - `history`: what happened at each step.
    - `converged`: whether the gradient norm reached the tolerance that was asked for.
    - `held_out_loss`: the outer loss on the held-out data after each block of steps, in
        nats per image. Empty if no data were held out.
    """

    distilled: DistilledSet
    history: History
    converged: bool
    held_out_loss: Float[np.ndarray, " blocks"]


class DistillationError(RuntimeError):
    """Raised when a distillation cannot go on.

    **Attributes:**

    - `distillation`: a [`eqdistill.Distillation`][] with the last good distilled set:
        the last one at which the outer loss and its gradient were known to be finite
        and the inner solver to converge, or else the one that it began with.
    """

    distillation: Distillation

    def __init__(self, message: str, distillation: Distillation):
        super().__init__(message)
        self.distillation = distillation


NO_HISTORY = History(*[np.zeros(0, np.float32)] * 5)


def to_history(rows: Float[np.ndarray, "block fields"], num_steps: int) -> History:
    return History(*rows[:num_steps].T)
