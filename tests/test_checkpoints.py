"""Checkpoints: a run that is interrupted resumes, and ends with the same bits."""

import resource
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd
from eqdistill._outer._callbacks import Snapshot
from eqdistill._outer._problem import DistillState

from . import killed_runs
from .conftest import assert_same_bits, OneStep, subset


# When Orbax finds a damaged array, it closes its event loop while other arrays are
# still being read. Their callbacks then come too late.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)

STEPS = 30
SCHEDULE = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))
MODEL = eqd.linear.LogisticRegression(64, 10)
OBJECTIVE = eqd.Bilevel(MODEL, OneStep())


@pytest.fixture(scope="module")
def arguments(digits):
    data, held_out = subset(digits[0], 300).split(0.2, key=jr.key(0))
    start = eqd.DistilledSet.from_noise(data, l2=0.05, scale=0.02, key=jr.key(0))
    stopping = eqd.EarlyStopping(held_out, every=4, patience=STEPS)
    return start, data, eqd.Batches(data, 70), stopping


@pytest.fixture
def run(arguments, tmp_path):
    """A run with checkpoints in a folder of the test, and other callbacks."""
    start, _, data, stopping = arguments

    def run(*callbacks, every=5, keep=3, steps=STEPS, seed=1, **changes):
        checkpoints = eqd.Checkpoints(tmp_path / "runs", every=every, keep=keep)
        settings = {"start": start, "objective": OBJECTIVE, "data": data}
        settings["optimiser"] = SCHEDULE
        return eqd.distill(
            steps=steps,
            key=jr.key(seed),
            callbacks=[checkpoints, stopping, *callbacks],
            **(settings | changes),
        )

    run.folder = tmp_path / "runs"
    return run


@pytest.fixture(scope="module")
def uninterrupted(arguments):
    start, _, data, stopping = arguments
    settings = {"optimiser": SCHEDULE, "steps": STEPS, "key": jr.key(1)}
    return eqd.distill(start, OBJECTIVE, data, **settings, callbacks=[stopping])


class At(eqd.AbstractCallback[None]):
    """Does something after a step, and stops the run if that is true."""

    step: int
    do: Callable[[], Any]
    every: int = 1

    def init(self, problem, state, steps):
        return None

    def __call__(self, problem, state, history, own):
        return None, int(state.step) == self.step and bool(self.do())

    def close(self, own):
        pass


def crash():
    raise OSError("The machine has crashed.")


def interrupt(run, step):
    with pytest.raises(eqd.DistillationError):
        run(At(step, crash))


def kept(run):
    return sorted(int(x.name) for x in run.folder.iterdir() if x.name.isdigit())


def assert_same_run(result, other):
    parts = lambda x, i: (x.state, x.history, eqx.filter(x.callbacks[i], eqx.is_array))
    assert_same_bits(parts(result, 1), parts(other, 0))


def test_interrupted_runs_end_with_the_same_bits(run, uninterrupted):
    for step in (3, 13, 29):
        interrupt(run, step)
    assert kept(run) == [15, 20, 25]
    assert_same_run(run(eqd.ProgressBar()), uninterrupted)
    assert kept(run) == [20, 25, 30]
    # A finished run is not run again.
    assert_same_run(run(At(STEPS, crash)), uninterrupted)


def test_finished_runs_continue_to_more_steps(run, uninterrupted):
    run(steps=10, every=100)
    # The held-out loss after step 10, then the last one, belongs to that run only.
    assert_same_run(run(), uninterrupted)
    with pytest.raises(ValueError, match=r"`steps` must be at least 30.*got 29"):
        run(steps=29)


def test_stopped_runs_are_not_run_again(run):
    first, second = run(At(7, lambda: True)), run(At(8, crash))
    assert len(first.history) == len(second.history) == 7


def truncate(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-20])


def remove_arrays(folder):
    shutil.rmtree(folder / "arrays")


@pytest.mark.parametrize("how", [truncate, remove_arrays])
@pytest.mark.parametrize("keep", [1, 3])
def test_unreadable_checkpoints_are_skipped(run, uninterrupted, how, keep):
    interrupt(run, 13)
    how(run.folder / "10")
    # A process that is killed while it writes leaves this.
    (run.folder / "15.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    with pytest.warns(UserWarning, match="Checkpoint 10 cannot be read"):
        interrupt(lambda *callbacks: run(*callbacks, keep=keep), 16)
    assert kept(run) == [5, 10, 15][-keep:]
    assert_same_run(run(keep=keep), uninterrupted)
    assert kept(run) == [20, 25, 30][-keep:]


def test_a_full_disk_is_a_warning(run, uninterrupted):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    free = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    try:
        with (
            pytest.warns(UserWarning, match="Checkpoint 15 cannot be written"),
            pytest.raises(eqd.DistillationError),
        ):
            run(At(15, fill), At(16, free), At(18, crash))
    finally:
        free()
    assert kept(run) == [5, 10]
    assert_same_run(run(), uninterrupted)


def test_runs_in_another_thread(run, uninterrupted):
    results = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    assert_same_run(results[0], uninterrupted)


def test_another_problem_is_refused(run, arguments):
    run(steps=5)
    start, data, *_ = arguments

    def refused(match, *callbacks, **changes):
        with pytest.raises(ValueError, match=match):
            run(*callbacks, **changes)

    other = optax.adam(optax.cosine_decay_schedule(0.04, STEPS))
    refused("init_value` was 0.05 and is 0.04 now", optimiser=other)
    learn = lambda s: (s.images, s.log_l2)
    refused(r"`learn.0.log_l2` was False .* True now", learn=learn)
    refused(r"`key` was .*\[0, 1\] and is .*\[0, 2\] now", seed=2)
    few = eqd.DistilledSet(start.images[:9], start.labels[:9], l2=0.05)
    refused(r"images` was .*\(10, 8, 8\) .*\(9, 8, 8\) now", start=few)
    hotter = eqd.DistilledSet(start.images, start.labels, l2=0.06)
    refused("`start.log_l2` was", start=hotter)
    faster = eqd.Bilevel(MODEL, OneStep(learning_rate=9.0))
    refused("inner.learning_rate` was 10 .* 9 now", objective=faster)
    refused("`callbacks.1", Kept())
    # The data may change.
    run(steps=6, data=eqd.Batches(data, 71))


class Kept(eqd.AbstractCallback):
    """Has arrays of all kinds in its state."""

    every: int = 4

    def init(self, problem, state, steps):
        own = {"sum": jnp.array(0.0), "key": jr.key(3), "empty": jnp.ones((0, 2))}
        return own | {"print": print}

    def __call__(self, problem, state, history, own):
        assert own["print"] is print  # From `init`, also when a run resumes.
        key, draw = jr.split(own["key"])
        return own | {"sum": own["sum"] + jr.normal(draw), "key": key}, False

    def close(self, own):
        pass


def test_states_of_callbacks_are_kept(run):
    whole = run(Kept(), steps=11).callbacks[2]
    for step in ("10", "11"):
        shutil.rmtree(run.folder / step)
    again = run(Kept(), steps=11).callbacks[2]
    assert_same_bits(again, whole)


def test_all_arrays_survive_to_the_bit(tmp_path, arguments):
    tree = {
        "numpy": np.array([[1e-300, np.nan], [np.inf, -0.0]]),
        "scalars": (np.float32(0.1), np.int64(2**40), np.bool_(True)),
        "jax": [jnp.arange(3, dtype=jnp.uint8), jnp.ones(2, jnp.bfloat16)],
        "keys": (jr.key(1), jr.split(jr.key(2, impl="rbg"), 3)),
        "empty": (jnp.zeros((2, 0)), np.zeros(0, np.int8)),
    }
    numbers = jnp.array(7), jnp.array(0)
    state = DistillState(tree, None, None, (), (), jr.key(0), *numbers)
    snapshot = Snapshot(state, {"loss": np.arange(7.0)}, (None, tree), has_stopped=True)
    problem = eqd.Problem(arguments[0], OBJECTIVE, optimiser=SCHEDULE)
    store = eqd.Checkpoints(tmp_path, keep=1).open(problem, state)
    assert store.restore(snapshot) is None
    store.save(snapshot)
    store.close()
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    with np.errstate(invalid="ignore"):
        template = jax.tree.map(
            lambda x: x if x is True or is_key(x) else (x * 0).astype(x.dtype), snapshot
        )
    store = eqd.Checkpoints(tmp_path).open(problem, state)
    restored = store.restore(template)
    store.close()
    assert restored is not None
    assert_same_bits(restored, snapshot)
    leaves = map(jax.tree.leaves, (restored.state, state))
    assert all(isinstance(x, type(y)) for x, y in zip(*leaves, strict=True))


def test_refuses(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="at most one `Checkpoints`"):
        run(eqd.Checkpoints(tmp_path))
    run.folder.touch()
    with pytest.raises(OSError, match="runs"):
        run()
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'eqdistill\[checkpoints\]'"):
        run()


@pytest.mark.slow
def test_killed_runs_on_mnist():
    assert killed_runs.compare(2)
