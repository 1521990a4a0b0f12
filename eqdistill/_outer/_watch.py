import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, PyTree

from .._checks import name_kind
from ._callbacks import AbstractCallback
from ._distill_state import DistillState
from ._distillation import History, NO_ROWS
from ._problem import Problem
from ._snapshot import AbstractCheckpoints, from_plain, Snapshot, to_plain


# After this many steps their results are fetched, to see whether the run has ended. To
# fetch more often would hold up an accelerator.
_FETCH_EVERY = 10


class Watch:
    """The callbacks of a run, with their states, and what keeps its checkpoints."""

    def __init__(self, callbacks: Sequence[AbstractCallback | AbstractCheckpoints]):
        for callback in callbacks:
            if not isinstance(callback, AbstractCallback | AbstractCheckpoints):
                raise TypeError(
                    "`callbacks` must be `AbstractCallback`s; got "
                    f"{name_kind(callback)} among them."
                )
            if not callback.every >= 1:
                raise ValueError(
                    f"`every` of a `{type(callback).__name__}` must be at least 1; got "
                    f"{callback.every}."
                )
        found = [i for i, x in enumerate(callbacks) if _is_checkpoints(x)]
        if len(found) > 1:
            raise ValueError(
                f"`callbacks` must have at most one `Checkpoints`; got {len(found)}."
            )
        self._all = tuple(callbacks)
        self._callbacks = {
            i: x for i, x in enumerate(callbacks) if isinstance(x, AbstractCallback)
        }
        self._checkpoints = {
            i: x for i, x in enumerate(callbacks) if isinstance(x, AbstractCheckpoints)
        }
        self._own = {}
        self._first = {}
        self._warned = set()

    @property
    def own(self) -> tuple[PyTree, ...]:
        """The states of the callbacks. That of checkpoints is of no use to others."""
        return tuple(
            None if _is_checkpoints(callback) else self._own.get(i)
            for i, callback in enumerate(self._all)
        )

    def init(self, problem: Problem, state: DistillState, steps: int) -> Snapshot:
        """**Returns:**

        What the run begins with: its state, or the newest snapshot of a run that was
        left, if that is further on.
        """
        begin = Snapshot(state, NO_ROWS, [], False)
        first = int(state.step)
        is_found = False
        for i, checkpoints in self._checkpoints.items():
            self._own[i] = checkpoints.init(problem, state, steps)
            snapshot = checkpoints.restore(state, self._own[i])
            if snapshot is not None and int(snapshot.state.step) >= first:
                begin, is_found = snapshot, True
        step = int(begin.state.step)
        if steps < step or (steps == step and not is_found):
            wanted = f"above {step}, the step of `state`" if step > 0 else "at least 1"
            if is_found:
                wanted = f"at least {step}, the step of the newest checkpoint"
            raise ValueError(f"`steps` must be {wanted}; got {steps}.")
        for i, callback in self._callbacks.items():
            self._own[i] = self._first[i] = callback.init(problem, state, steps)
        if is_found:
            self._restore(begin.callbacks)
        return begin

    def _restore(self, stored: list[tuple[str, Any]]) -> None:
        # Those without a state come and go: a progress bar makes no other run.
        indices = [i for i, own in self._first.items() if _has_state(own)]
        names = [type(self._callbacks[i]).__name__ for i in indices]
        if names != [name for name, _ in stored]:
            raise ValueError(
                "`callbacks` with a state must be those of the checkpoint, "
                f"{[name for name, _ in stored]}; got {names}."
            )
        for i, (name, plain) in zip(indices, stored, strict=True):
            if plain is not None:
                try:
                    self._own[i] = from_plain(plain["state"], self._first[i])
                except ValueError as e:
                    raise ValueError(
                        f"The state of `{name}` must be that of the checkpoint, which "
                        f"holds {e}."
                    ) from e

    def steps_until_due(self, step: int) -> int:
        """How many steps to take until a callback is due, or results are fetched."""
        every = (_FETCH_EVERY, *(callback.every for callback in self._all))
        return min(n - step % n for n in every)

    def __call__(
        self,
        problem: Problem,
        state: DistillState,
        rows: Float[np.ndarray, "steps 3"],
        is_last: bool,
    ) -> bool:
        """Calls the callbacks that are due, and says whether the run ends here."""
        step = int(state.step)
        due = [i for i, x in self._callbacks.items() if step % x.every == 0]
        has_stopped = self._call(due, problem, state, rows)
        is_last = is_last or has_stopped
        # Before the others are called for the last time: what they make of a step that
        # is the last one only now must not be in a run that goes on to further steps.
        if is_last or any(step % x.every == 0 for x in self._checkpoints.values()):
            self._save(state, rows, has_stopped)
        if is_last:
            self.finish(problem, state, rows)
        elif self.is_asked_to_leave():
            self._save(state, rows, False)
            return True
        return is_last

    def finish(
        self,
        problem: Problem,
        state: DistillState,
        rows: Float[np.ndarray, "steps 3"],
    ) -> None:
        """Calls those that have not been called after the last step."""
        step = int(state.step)
        rest = [i for i, x in self._callbacks.items() if step % x.every != 0]
        self._call(rest, problem, state, rows)

    def is_asked_to_leave(self) -> bool:
        return any(
            checkpoints.is_asked_to_leave(self._own[i])
            for i, checkpoints in self._checkpoints.items()
        )

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # Also after an error of one of them.
            for i, callback in enumerate(self._all):
                if i in self._own:
                    stack.callback(callback.close, self._own[i])

    def _call(self, indices, problem, state, rows) -> bool:
        stops = False
        for i in indices:
            history = History(*rows.T)
            own, stop = self._callbacks[i](problem, state, history, self._own[i])
            self._own[i] = own
            stops = stops or bool(stop)
        return stops

    def _save(self, state, rows, has_stopped) -> None:
        for i, checkpoints in self._checkpoints.items():
            plain = [
                (type(self._callbacks[j]).__name__, self._to_plain(j))
                for j, own in self._first.items()
                if _has_state(own)
            ]
            checkpoints.save(Snapshot(state, rows, plain, has_stopped), self._own[i])

    def _to_plain(self, i: int):
        try:
            return {"state": to_plain(self._own[i], self._first[i])}
        except ValueError as e:
            if i not in self._warned:
                self._warned.add(i)
                warnings.warn(
                    f"The state of `{type(self._callbacks[i]).__name__}` cannot be in "
                    f"a checkpoint: {e}. A run that goes on from a checkpoint starts "
                    "this callback anew.",
                    stacklevel=2,
                )
            return None


def _is_checkpoints(x) -> bool:
    return isinstance(x, AbstractCheckpoints)


def _has_state(own) -> bool:
    """Whether a state is more than an object of the outside world, such as a bar."""
    try:
        plain = to_plain(own, own)
    except ValueError:
        return True
    return plain is not None and not (isinstance(plain, dict) and "object" in plain)
