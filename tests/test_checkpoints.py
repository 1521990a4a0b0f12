"""Checkpoints: a run that is cut off goes on from them, and ends in the same bits."""

import os
import resource
import shutil
import signal
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

from . import killed_runs
from .conftest import OneStep, subset


# When Orbax finds a damaged array, it closes its event loop, while other arrays are
# still being read. Their callbacks then come too late.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)

STEPS = 30
INNER = OneStep()
SCHEDULE = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))


@pytest.fixture(scope="module")
def arguments(digits):
    data, held_out = subset(digits[0], 300).split(0.2, key=jr.key(0))
    start = eqd.DistilledSet.from_noise(data, l2=0.05, scale=0.02, key=jr.key(0))
    args = (start, eqd.LogisticRegression(64, 10), eqd.Batches(data, 70))
    return args, eqd.EarlyStopping(held_out, every=4, patience=STEPS)


@pytest.fixture
def run(arguments, tmp_path):
    """A run with checkpoints in a folder of the test, and other callbacks."""
    args, stopping = arguments

    def run(*callbacks, every=5, keep=3, args=args, steps=STEPS, seed=1, **more):
        checkpoints = eqd.Checkpoints(tmp_path / "runs", every=every, keep=keep)
        settings = {"inner": INNER, "optimiser": SCHEDULE} | more
        return eqd.distill(
            *args,
            **settings,
            steps=steps,
            key=jr.key(seed),
            callbacks=[checkpoints, stopping, *callbacks],
        )

    run.folder = tmp_path / "runs"
    return run


@pytest.fixture(scope="module")
def undisturbed(arguments):
    args, stopping = arguments
    settings = {"inner": INNER, "optimiser": SCHEDULE, "steps": STEPS}
    return eqd.distill(*args, **settings, key=jr.key(1), callbacks=[stopping])


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


def cut(run, step):
    with pytest.raises(eqd.DistillationError):
        run(At(step, crash))


def kept(run):
    return sorted(int(entry.name) for entry in run.folder.iterdir())


def numbers(x):
    x = (
        jr.key_data(x)
        if eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else x
    )
    return np.asarray(x)


def check_same(result, other):
    for x, y in zip(
        jax.tree.leaves((result.state, result.history, result.callbacks[1])),
        jax.tree.leaves((other.state, other.history, other.callbacks[0])),
        strict=True,
    ):
        np.testing.assert_array_equal(numbers(x), numbers(y))


def test_a_run_that_was_cut_off_ends_in_the_same_bits(run, undisturbed):
    for step in (3, 13, 29):
        cut(run, step)
    assert kept(run) == [15, 20, 25]
    result = run(eqd.ProgressBar())
    check_same(result, undisturbed)
    assert result.callbacks[1].steps == (0, *range(4, STEPS, 4), STEPS)
    assert kept(run) == [20, 25, 30]


def test_a_run_that_has_ended_is_not_run_again(run, undisturbed):
    run()
    check_same(run(At(STEPS, crash)), undisturbed)


def test_a_run_goes_on_to_more_steps(run, undisturbed):
    run(steps=10, every=100)
    # The held-out loss after step 10, which was the last one, was taken for that run.
    check_same(run(), undisturbed)
    with pytest.raises(ValueError, match=r"`steps` must be at least 30.*got 29"):
        run(steps=29)


def test_a_run_that_a_callback_has_stopped_is_not_run_again(run):
    first, second = run(At(7, lambda: True)), run(At(8, crash))
    assert len(first.history) == len(second.history) == 7
    assert second.callbacks[1].steps == (0, 4, 7)


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-20])


def damage_arrays(folder):
    for path in (folder / "arrays").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)


@pytest.mark.parametrize("how", [damage, damage_arrays])
def test_falls_back_to_the_one_before(run, undisturbed, how):
    cut(run, 13)
    how(run.folder / "10")
    # What a process leaves that is killed while it writes.
    (run.folder / "15.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    with pytest.warns(UserWarning, match="runs/10 cannot be read"):
        result = run()
    check_same(result, undisturbed)
    assert kept(run) == [20, 25, 30]


def test_a_full_disk_is_a_warning(run, undisturbed):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    free = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    try:
        with (
            pytest.warns(UserWarning, match="runs/15 cannot be written"),
            pytest.raises(eqd.DistillationError),
        ):
            run(At(15, fill), At(16, free), At(18, crash))
    finally:
        free()
    assert kept(run) == [5, 10]
    check_same(run(), undisturbed)


def test_sigterm_saves_and_leaves(run, undisturbed):
    handler = signal.getsignal(signal.SIGTERM)
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as e:
        run(At(13, terminate))
    assert e.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert kept(run) == [5, 10, 13]
    check_same(run(), undisturbed)


def test_sigterm_is_handed_on(run):
    seen = []
    earlier = signal.signal(signal.SIGTERM, lambda *_: seen.append(kept(run)))
    try:
        with pytest.raises(SystemExit):
            run(At(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert seen == [[5, 7]]


def test_runs_in_another_thread(run, undisturbed):
    results = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    check_same(results[0], undisturbed)


def test_another_problem_is_refused(run, arguments):
    run(steps=5)
    (start, model, data), _ = arguments

    def refused(match, **args):
        with pytest.raises(ValueError, match=match):
            run(**args)

    other = optax.adam(optax.cosine_decay_schedule(0.04, STEPS))
    refused(r"init_value`: 0.05 in the checkpoint, 0.04 here", optimiser=other)
    refused(r"learn.0.labels`|learn.0.log_l2`", learn=(True, False))
    refused(r"`key`: .*data \[0, 1\] in the checkpoint, .*\[0, 2\] here", seed=2)
    few = eqd.DistilledSet(start.images[:9], start.labels[:9], l2=0.05)
    refused(
        r"start.images`: float32 of shape \(10, 8, 8\) .* of shape \(9, 8, 8\)",
        args=(few, model, data),
    )
    images = np.array(data.dataset.images)
    images[0, 0, 0] += 1
    changed = eqd.Batches(eqd.Dataset(images, data.dataset.labels), 70)
    refused(r"data.dataset.images`: .*digest", args=(start, model, changed))
    refused(
        r"data.size`: 70 in the checkpoint, 71 here",
        args=(start, model, eqd.Batches(data.dataset, 71)),
    )
    refused(r"inner.learning_rate`: 10 in", inner=OneStep(learning_rate=9.0))
    with pytest.raises(ValueError, match=r"`callbacks`.*got \['EarlyStopping', 'Kept'"):
        run(Kept())


class Kept(eqd.AbstractCallback):
    """Keeps what it is given in all the ways that a checkpoint has."""

    every: int = 4

    def init(self, problem, state, steps):
        return {"steps": [], "last": (0, None), "key": jr.key(3), "print": print}

    def __call__(self, problem, state, history, own):
        key, _ = jr.split(own["key"])
        step = int(state.step)
        last = (step, np.float64(history.loss[-1]))
        return own | {"steps": [*own["steps"], step], "last": last, "key": key}, False

    def close(self, own):
        pass


def test_states_of_callbacks_are_kept(run):
    whole = run(Kept(), steps=11).callbacks[2]
    for step in ("10", "11"):
        shutil.rmtree(run.folder / step)
    again = run(Kept(), steps=11).callbacks[2]
    assert again["steps"] == whole["steps"] == [4, 8, 11]
    assert again["last"] == whole["last"]
    assert isinstance(again["last"][1], np.float64)
    assert again["print"] is print
    assert (jr.key_data(again["key"]) == jr.key_data(whole["key"])).all()


class Sets(eqd.AbstractCallback):
    every: int = 4

    def init(self, problem, state, steps):
        return []

    def __call__(self, problem, state, history, own):
        return [*own, problem.distilled(state)], False

    def close(self, own):
        pass


def test_a_state_that_cannot_be_kept_is_a_warning(run):
    with pytest.warns(UserWarning, match="`Sets` cannot be in a checkpoint: it holds"):
        run(Sets(), steps=5)
    with pytest.warns(UserWarning, match="`Sets` cannot be in a checkpoint: it holds"):
        assert len(run(Sets(), steps=8).callbacks[2]) == 1


def test_refuses(run, arguments, monkeypatch, tmp_path):
    args, _ = arguments
    with pytest.raises(ValueError, match="`every` must be at least 1; got 0"):
        eqd.Checkpoints(tmp_path, every=0)
    with pytest.raises(ValueError, match="`keep` must be at least 1; got 0"):
        eqd.Checkpoints(tmp_path, keep=0)
    two = [eqd.Checkpoints(tmp_path), eqd.Checkpoints(tmp_path)]
    with pytest.raises(ValueError, match="at most one `Checkpoints`; got 2"):
        eqd.distill(*args, inner=INNER, callbacks=two, key=jr.key(0))
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'eqdistill\[checkpoints\]'"):
        run()


@pytest.mark.slow
def test_runs_on_mnist_that_are_killed():
    assert killed_runs.compare(3, 0, list(killed_runs.KINDS))
