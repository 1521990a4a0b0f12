"""What changes in a distillation."""

import enum

import equinox as eqx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._inner._fit import COLLAPSED, NOT_CONVERGED


class Status(enum.IntEnum):
    """Whether a run goes on, or why it has ended."""

    RUNNING = 0
    CONVERGED = 1
    COLLAPSED = 2
    INNER_FAILED = 3
    LOSS_NOT_FINITE = 4
    GRADIENT_NOT_FINITE = 5
    UPDATE_NOT_FINITE = 6


REASONS = {
    Status.COLLAPSED: COLLAPSED,
    Status.INNER_FAILED: NOT_CONVERGED,
    Status.LOSS_NOT_FINITE: "the outer loss is not finite",
    Status.GRADIENT_NOT_FINITE: "the hypergradient is not finite",
    Status.UPDATE_NOT_FINITE: "the updated distilled set is not finite",
}


class Metrics(eqx.Module):
    """What an outer step measures, before its update: one entry of an
    [`eqdistill.History`][], whose fields it has."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    inner_residual: Float[Array, ""]


class DistillState(eqx.Module):
    """All that changes, or may differ between runs of one problem. It holds arrays
    only: a checkpoint of a run is its leaves.

    **Attributes:**

    - `learned`: the learned arrays of the pair of `start` and `inner`.
    - `fixed`: the other arrays of the pair.
    - `last_good`: the learned arrays a step before. Only in a step from them do
        `learned` prove to be good.
    - `optimiser_state`, `inner_state`: the states of the optimiser and of the inner
        solver.
    - `key`: the key of the run, or `None`.
    - `step`: the number of steps taken.
    - `status`: zero while the run goes on, or else a number that says why it has ended.
    """

    learned: PyTree
    fixed: PyTree
    last_good: PyTree
    optimiser_state: PyTree
    inner_state: PyTree
    key: PRNGKeyArray | None
    step: Int[Array, ""]
    status: Int[Array, ""]
