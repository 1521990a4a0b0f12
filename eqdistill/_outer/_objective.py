import abc
from typing import Generic, TypeVar

import equinox as eqx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from ._data import AbstractData, FullBatch


State = TypeVar("State")


class Outcome(eqx.Module, Generic[State]):
    """What an objective returns besides its loss.

    **Attributes:**

    - `state`: the state for the next step.
    - `failure`: 0, or 1 plus the index of the reason in the objective's `failures`.
    - `metrics`: numbers for the history, each under a name.
    """

    state: State
    failure: Int[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class AbstractObjective(eqx.Module, Generic[State]):
    """What is minimised over the distilled set. Its attribute `failures` holds the
    reasons to stop a run, in words."""

    failures: eqx.AbstractVar[tuple[str, ...]]

    @abc.abstractmethod
    def init(self, distilled: DistilledSet, *, key: PRNGKeyArray) -> State:
        """Returns the first state: a pytree of arrays, or `None` if there are none.
        `distilled` is the distilled set at the start of the run."""

    @abc.abstractmethod
    def __call__(
        self,
        distilled: DistilledSet,
        data: AbstractData,
        state: State,
        *,
        step: Int[Array, ""],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, ""], Outcome[State]]:
        """**Arguments:**

        - `distilled`, `data`, `state`: the distilled set, the real data of this step,
            and the current state.
        - `step`: the number of the outer step, from 0.
        - `key`: a `jax.random.key`, the same in all steps of a run: fold the step in
            where each step needs new random numbers.

        **Returns:** the loss, differentiable in the floating-point arrays of
        `distilled` and of the objective itself; and the [`eqdistill.Outcome`][].
        """

    def layout(self, dataset: Dataset) -> AbstractData:
        """Returns the real data in the form that suits this objective best. By default,
        an [`eqdistill.FullBatch`][]."""
        return FullBatch(dataset)
