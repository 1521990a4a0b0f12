import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._checks import check_at_least
from .._conversions import as_int
from .._outer._distill_state import DistillState
from .._outer._snapshot import AbstractCheckpoints, Snapshot
from ._fingerprint import differences, digest, fingerprint


_FORMAT = 1


class Checkpoints(AbstractCheckpoints["_Folder"]):
    """Keeps the last checkpoints of a run in a folder. The same call of
    [`eqdistill.distill`][] goes on from the newest one, and ends in the very arrays of
    a run that was never left. Needs `orbax-checkpoint`, of `eqdistill[checkpoints]`.

    !!! Example

        ```python
        checkpoints = eqd.Checkpoints("checkpoints/digits")
        result = eqd.distill(start, model, train, callbacks=[checkpoints])
        ```

    A checkpoint holds the state of the run, the history, and the states of the other
    callbacks. It is written under another name, and renamed once it is whole: between
    two steps, in a tenth of a second or two. One that cannot be read is left out with a
    warning, and the run goes on from the one before; one that cannot be written, as on
    a full disk, is a warning, and the run goes on.

    Checkpoints of another problem are refused: of other arrays, such as other data, or
    of other settings, as far as modules and functions hold them. The number of steps
    may change. The bits are the same on one machine, with the same versions of all
    packages.

    SIGTERM, by which most clusters end a job, ends the run after the step under way:
    with a checkpoint, and with the exit status 143. This is so only while `distill`
    runs in the main thread.
    """

    directory: str
    every: int = eqx.field(converter=as_int)
    keep: int = eqx.field(converter=as_int)

    def __init__(
        self, directory: str | os.PathLike[str], *, every: int = 100, keep: int = 3
    ):
        """**Arguments:**

        - `directory`: a folder for this run alone. It is made if it is not there.
        - `every`: a checkpoint is saved after each such number of steps, and at the end
            of the run. (Keyword only argument.)
        - `keep`: how many checkpoints are kept. (Keyword only argument.)

        **Raises:**

        A `ValueError` if `every` or `keep` is less than 1.
        """
        check_at_least(1, every=every, keep=keep)
        self.directory = os.path.abspath(directory)
        self.every = every
        self.keep = keep

    def init(self, problem, state, steps):
        """**Raises:**

        An `ImportError` without `orbax-checkpoint`, or an `OSError` if there is no such
        folder and it cannot be made.
        """
        del steps
        try:
            import orbax.checkpoint as ocp
        except ImportError as e:
            raise ImportError(
                "`Checkpoints` needs Orbax: pip install 'eqdistill[checkpoints]'."
            ) from e
        shapes = jax.eval_shape(lambda: state)
        described = fingerprint(problem=problem, key=state.key, state=shapes)
        return _Folder(pathlib.Path(self.directory), self.keep, described, ocp)

    def restore(self, state, own):
        return own.restore(state)

    def save(self, snapshot, own):
        own.save(snapshot)

    def is_asked_to_leave(self, own):
        return own.is_asked_to_leave

    def close(self, own):
        own.close()


class _Folder:
    """The checkpoints of one run: folders of the name of their step."""

    def __init__(
        self, path: pathlib.Path, keep: int, described: dict[str, str], ocp: Any
    ):
        self._path = path
        self._keep = keep
        self._described = described
        self._ocp = ocp
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._newest = None
        path.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        self.is_asked_to_leave = False
        self._handler = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGTERM)
            # What ignores the signal is left to do so, as is what is not of Python.
            if handler not in (signal.SIG_IGN, None):
                self._handler = handler
                signal.signal(signal.SIGTERM, self._ask_to_leave)

    def _ask_to_leave(self, number, frame) -> None:
        del number, frame
        self.is_asked_to_leave = True

    def steps(self) -> list[int]:
        names = [entry.name for entry in self._path.iterdir()]
        return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))

    def restore(self, state: DistillState) -> Snapshot | None:
        for step in reversed(self.steps()):
            try:
                arrays, found = self._read(step)
            except Exception as e:
                _warn(f"Checkpoint {self._path / str(step)} cannot be read", e)
                continue
            if found["format"] != _FORMAT:
                raise ValueError(
                    f"{self._path / str(step)} must be of format {_FORMAT}; got "
                    f"{found['format']}."
                )
            difference = differences(self._described, found["problem"])
            if difference is not None:
                raise ValueError(
                    f"The checkpoints in {self._path} are of another problem: "
                    f"{difference}. Use the same arguments, or another `directory`."
                )
            self._newest = step
            leaves, structure = jax.tree.flatten(state)
            new = [_to_leaf(arrays[f"state{i}"], leaf) for i, leaf in enumerate(leaves)]
            return Snapshot(
                jax.tree.unflatten(structure, new),
                arrays["rows"],
                [tuple(pair) for pair in _unpack(found["callbacks"], arrays)],
                found["has_stopped"],
            )
        return None

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        args = self._ocp.args
        restored = self._checkpointer.restore(
            self._path / str(step),
            args=args.Composite(arrays=args.PyTreeRestore(), run=args.JsonRestore()),
        )
        found = restored.run
        arrays = {
            name: restored.arrays[name].reshape(shape)
            if np.prod(shape)
            else np.zeros(shape, dtype)
            for name, (shape, dtype, _) in found["arrays"].items()
        }
        for name, (_, dtype, wanted) in found["arrays"].items():
            if str(arrays[name].dtype) != dtype or digest(arrays[name]) != wanted:
                raise ValueError(f"the values of {name} are not those that were saved")
        return arrays, found

    def save(self, snapshot: Snapshot) -> None:
        step = int(snapshot.state.step)
        if step == self._newest:
            return
        arrays: dict[str, np.ndarray] = {"rows": snapshot.rows}
        for i, leaf in enumerate(jax.tree.leaves(snapshot.state)):
            arrays[f"state{i}"] = _to_array(leaf)
        found = {
            "format": _FORMAT,
            "problem": self._described,
            "callbacks": _pack(snapshot.callbacks, arrays),
            "has_stopped": snapshot.has_stopped,
        }
        found["arrays"] = {
            name: [list(x.shape), str(x.dtype), digest(x)] for name, x in arrays.items()
        }
        # Orbax refuses arrays without values.
        arrays = {name: x for name, x in arrays.items() if x.size > 0}
        args = self._ocp.args
        try:
            self._checkpointer.save(
                self._path / str(step),
                args=args.Composite(
                    arrays=args.PyTreeSave(arrays), run=args.JsonSave(found)
                ),
                force=True,
            )
        except Exception as e:
            _warn(f"Checkpoint {self._path / str(step)} cannot be written", e)
            self._remove_unfinished()
            return
        self._newest = step
        # Later ones are of no run that goes on: they could not be read.
        for old in [x for x in self.steps() if x <= step][: -self._keep]:
            shutil.rmtree(self._path / str(old), ignore_errors=True)

    def _remove_unfinished(self) -> None:
        for entry in self._path.iterdir():
            if re.fullmatch(r"\d+\.orbax-checkpoint-tmp.*", entry.name):
                shutil.rmtree(entry, ignore_errors=True)

    def close(self) -> None:
        self._checkpointer.close()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        if self.is_asked_to_leave:
            if callable(self._handler):
                signal.raise_signal(signal.SIGTERM)
            sys.exit(128 + signal.SIGTERM)


def _to_array(leaf: jax.Array) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jr.key_data(leaf) if is_key else leaf)


def _to_leaf(array: np.ndarray, like: jax.Array) -> jax.Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jr.wrap_key_data(jnp.asarray(array), impl=jr.key_impl(like))
    return jax.device_put(array)


def _pack(x: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Puts arrays in the place of which their names stand in the tree that is
    returned."""
    if isinstance(x, np.ndarray):
        name = f"array{len(arrays)}"
        arrays[name] = x
        return {"stored": name}
    if isinstance(x, dict):
        return {key: _pack(part, arrays) for key, part in x.items()}
    if isinstance(x, tuple | list):
        return [_pack(part, arrays) for part in x]
    return x


def _unpack(x: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(x, dict):
        if x.keys() == {"stored"}:
            return arrays[x["stored"]]
        return {key: _unpack(part, arrays) for key, part in x.items()}
    if isinstance(x, list):
        return [_unpack(part, arrays) for part in x]
    return x


def _warn(what: str, error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    warnings.warn(f"{what}: {type(error).__name__}: {lines[0]}", stacklevel=2)
