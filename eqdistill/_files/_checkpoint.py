import dataclasses
import os
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from .._checks import check_at_least, needs
from .._conversions import as_int
from .._describe import describe, differences
from .._outer._callbacks import AbstractCheckpoints, Snapshot


class Checkpoints(AbstractCheckpoints):
    """Saves checkpoints of a run in a folder. The same call of [`eqdistill.distill`][]
    resumes from the newest one, and ends with exactly the arrays of an uninterrupted
    run. Needs Orbax, from `eqdistill[checkpoints]`.

    !!! Example
        ```python
        checkpoints = eqd.Checkpoints("checkpoints/digits")
        result = eqd.distill(start, model, train, callbacks=[checkpoints])
        ```

    You can kill the run at any time: at most `every` steps are lost. A checkpoint
    appears in the folder once it is complete. You get a warning if a checkpoint
    cannot be read, in which case the previous one is used, or if one cannot be written,
    for example on a full disk.

    A checkpoint of another problem raises an error: shapes, settings of the objective
    and the optimiser, and the key must be the same. The data and the number of steps
    may change. Results are bitwise identical on the same machine with the same versions
    of all packages.
    """

    directory: str
    every: int = eqx.field(converter=as_int)
    keep: int = eqx.field(converter=as_int)

    def __init__(
        self, directory: str | os.PathLike, *, every: int = 100, keep: int = 2
    ):
        """**Arguments:**

        - `directory`: a folder for this run only. It is created if necessary.
        - `every`: the number of steps between checkpoints. The run also ends with one.
        - `keep`: how many checkpoints are kept, at least 1.
        """
        check_at_least(1, every=every, keep=keep)
        self.directory = os.path.abspath(directory)
        self.every, self.keep = every, keep

    def open(self, problem, state):
        with needs("`Checkpoints`", "Orbax", "checkpoints"):
            import orbax.checkpoint as ocp
        os.makedirs(self.directory, exist_ok=True)
        parts = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
        problem = describe(**parts, state=_shapes(state), key=state.key)
        return _Store(self.directory, self.keep, problem, ocp)


class _Store:
    """The checkpoints of one run, in folders named after their steps."""

    def __init__(self, directory: str, keep: int, problem: dict[str, str], ocp: Any):
        self._directory, self._problem, self._args = directory, problem, ocp.args
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            lightweight_initialize=True,
        )
        self._manager = ocp.CheckpointManager(directory, options=options)
        self._newest: int | None = None
        self.close = self._manager.close

    def restore(self, template: Snapshot) -> Snapshot | None:
        """Returns the newest readable snapshot, with the structure of `template`.
        Raises a `ValueError` if it belongs to a different problem."""
        parts = {"arrays": self._args.PyTreeRestore(), "run": self._args.JsonRestore()}
        args = self._args.Composite(**parts)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._manager.restore(step, args=args)
                arrays, run = found.arrays, found.run
            except Exception as e:
                self._warn(f"Checkpoint {step} cannot be read", e)
                continue
            changed = differences(run["problem"], self._describe(template))
            if changed:
                raise ValueError(
                    f"The checkpoints in {self._directory} belong to a different "
                    f"problem: {changed[0]}. Pass the same arguments, or another "
                    "`directory`."
                )
            self._newest = step
            empty = np.zeros(0, np.float32)
            columns = {x: arrays.get(f"column {x}", empty) for x in run["columns"]}
            leaves, structure = jax.tree.flatten((template.state, template.callbacks))
            new = [
                _to_leaf(arrays[f"leaf {i}"], leaf) if np.size(leaf) else leaf
                for i, leaf in enumerate(leaves)
            ]
            state, callbacks = jax.tree.unflatten(structure, new)
            return Snapshot(state, columns, callbacks, run["has_stopped"])
        return None

    def save(self, snapshot: Snapshot) -> None:
        """Saves a snapshot, or warns if that fails."""
        step = int(snapshot.state.step)
        if step == self._newest:
            return
        leaves = jax.tree.leaves((snapshot.state, snapshot.callbacks))
        arrays = {f"leaf {i}": _to_array(leaf) for i, leaf in enumerate(leaves)}
        arrays |= {f"column {name}": x for name, x in snapshot.history.items()}
        # Orbax cannot save empty arrays.
        arrays = {name: x for name, x in arrays.items() if x.size > 0}
        run = {"problem": self._describe(snapshot), "columns": list(snapshot.history)}
        run["has_stopped"] = snapshot.has_stopped
        parts = self._args.PyTreeSave(arrays), self._args.JsonSave(run)
        args = self._args.Composite(arrays=parts[0], run=parts[1])
        try:
            for later in self._manager.all_steps():
                if later >= step:  # This one cannot be read.
                    self._manager.delete(later)
            self._manager.save(step, args=args, force=True)
            self._newest = step
        except Exception as e:
            self._warn(f"Checkpoint {step} cannot be written", e)

    def _describe(self, snapshot: Snapshot) -> dict[str, str]:
        # Callbacks without arrays may be added or removed.
        callbacks = filter(jax.tree.leaves, snapshot.callbacks)
        return self._problem | describe(callbacks=list(map(_shapes, callbacks)))

    def _warn(self, what: str, error: Exception) -> None:
        line = str(error).strip().partition("\n")[0]
        message = f"{what} in {self._directory}: {type(error).__name__}: {line}"
        warnings.warn(message, stacklevel=3)


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _to_array(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jr.key_data(leaf) if is_key else leaf)


def _to_leaf(array: np.ndarray, like: Any) -> Any:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jr.wrap_key_data(jnp.asarray(array), impl=jr.key_impl(like))
    if isinstance(like, jax.Array):
        return jax.device_put(array, like.sharding if like.committed else None)
    return array[()] if isinstance(like, np.generic) else array
