"""Callbacks: when they are called, what they may keep, and how they stop a run."""

import copy
import io
import logging
import pickle
import sys

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import ADAM, hypergradient, LBFGS, OneStep, subset


QUICK = {"inner": OneStep(), "optimiser": ADAM}


@pytest.fixture(scope="module")
def problem(digits):
    train = subset(digits[0], 300)
    start = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.02, key=jr.key(0))
    return start, eqd.LogisticRegression(64, 10), train


class Recorder(eqd.AbstractCallback[list]):
    """Keeps what it is given, and whether it is closed."""

    every: int = 1
    stop_at: int | None = None
    closed: list = eqx.field(default_factory=list)

    def init(self, problem, state, steps):
        return []

    def __call__(self, problem, state, history, own):
        step = int(state.step)
        seen = (step, len(history), problem.distilled(state))
        return [*own, seen], step == self.stop_at

    def close(self, own):
        self.closed.append(len(own))


def steps_seen(own):
    return [step for step, _, _ in own]


def test_are_called_when_due_and_at_the_end(problem):
    closed = []
    fine, coarse = Recorder(every=2, closed=closed), Recorder(every=5, closed=closed)
    result = eqd.distill(*problem, **QUICK, steps=12, callbacks=[fine, coarse])
    of_fine, of_coarse = result.callbacks
    assert steps_seen(of_fine) == [2, 4, 6, 8, 10, 12]
    assert steps_seen(of_coarse) == [5, 10, 12]
    assert [length for _, length, _ in of_coarse] == [5, 10, 12]
    assert closed == [3, 6]
    # What they have kept has not been deleted by the steps after.
    assert not jnp.array_equal(of_fine[0][2].images, of_fine[1][2].images)
    np.testing.assert_array_equal(of_fine[-1][2].images, result.distilled.images)


def test_one_stops_and_all_are_called_for_the_last_time(problem):
    stopper = Recorder(every=3, stop_at=6, closed=[])
    other = Recorder(every=10, closed=[])
    result = eqd.distill(*problem, **QUICK, steps=50, callbacks=[other, stopper])
    assert len(result.history) == 6
    assert not result.converged
    assert steps_seen(result.callbacks[0]) == [6]


def test_are_called_when_a_run_converges(problem):
    watch = Recorder(every=10, closed=[])
    result = eqd.distill(*problem, **QUICK, steps=50, tolerance=0.2, callbacks=[watch])
    assert result.converged
    assert steps_seen(result.callbacks[0])[-1] == len(result.history) < 50


def test_are_closed_after_an_error(problem):
    watch = Recorder(every=1, closed=[])
    with pytest.raises(eqd.DistillationError):
        eqd.distill(
            *problem,
            inner=OneStep(),
            optimiser=optax.sgd(float("inf")),
            callbacks=[watch],
        )
    assert watch.closed == [0]


class Unclosable(Recorder):
    def close(self, own):
        raise OSError("The disk is full.")


def test_all_are_closed_if_one_cannot_be(problem):
    closed = []
    watches = [Recorder(closed=closed), Unclosable(), Recorder(closed=closed)]
    with pytest.raises(OSError, match="The disk is full"):
        eqd.distill(*problem, **QUICK, steps=12, callbacks=watches)
    assert closed == [12, 12]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_in_a_terminal(problem, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    eqd.distill(*problem, **QUICK, steps=12, callbacks=[eqd.ProgressBar()])
    shown = sys.stderr.getvalue()
    assert "12/12" in shown
    assert "loss=" in shown
    # One line, written anew each time.
    assert shown.count("\n") == 1
    assert shown.count("\r") >= 2


@pytest.mark.parametrize(("every", "steps"), [(10, 12), (1, 37)])
def test_progress_bar_in_a_log_file(problem, capsys, every, steps):
    bar = eqd.ProgressBar(every=every)
    eqd.distill(*problem, **QUICK, steps=steps, callbacks=[bar])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == min(steps // every + (steps % every > 0), 10)
    assert f"{steps}/{steps}" in lines[-1]
    assert all("loss=" in line for line in lines)


@pytest.mark.parametrize(
    "copy",
    [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))],
)
def test_an_error_can_be_copied_and_sent_to_another_process(problem, copy):
    callbacks = [eqd.ProgressBar(), eqd.EarlyStopping(problem[2])]
    with pytest.raises(eqd.DistillationError) as e:
        eqd.distill(
            *problem,
            inner=OneStep(),
            optimiser=optax.sgd(float("inf")),
            callbacks=callbacks,
            key=jr.key(0),
        )
    again = copy(e.value)
    assert type(again) is eqd.DistillationError
    assert str(again) == str(e.value)
    np.testing.assert_array_equal(
        again.distillation.distilled.images, e.value.distillation.distilled.images
    )


def test_log(problem, caplog):
    logger = logging.getLogger("a run")
    caplog.set_level(logging.INFO)
    log = eqd.Log(logger.info, every=6)
    result = eqd.distill(*problem, **QUICK, steps=12, callbacks=[log])
    first, last = caplog.messages
    assert first.startswith("step 6: loss")
    assert f"step 12: loss {result.history.loss[-1]:.5g}" in last


def test_early_stopping(digits):
    # So few images are soon overfitted.
    few, held_out = subset(digits[0], 150).split(2 / 3, key=jr.key(0))
    start = eqd.DistilledSet.from_noise(few, l2=1e-3, scale=0.02, key=jr.key(0))
    model = eqd.LogisticRegression(64, 10)
    args = {"inner": OneStep(), "optimiser": LBFGS, "steps": 100}
    stopping = eqd.EarlyStopping(held_out, patience=2)
    result = eqd.distill(start, model, few, **args, callbacks=[stopping])
    (best,) = result.callbacks
    assert best.steps == (0, *range(10, len(result.history) + 1, 10))
    assert len(result.history) < 100
    place = int(np.argmin(best.losses))
    assert best.step == 10 * place
    assert len(best.losses) == place + 1 + 2
    loss, _ = hypergradient(best.distilled, model, held_out, OneStep())
    np.testing.assert_allclose(loss, best.losses.min(), rtol=1e-5)
    # It went on for two more checks: to less on what it saw, and to more on the rest.
    last, _ = hypergradient(result.distilled, model, held_out, OneStep())
    assert last > 1.01 * loss


def test_early_stopping_refuses_bad_data(problem):
    start, model, train = problem
    with pytest.raises(ValueError, match="`patience` must be at least 1; got 0"):
        eqd.EarlyStopping(train, patience=0)
    with pytest.raises(ValueError, match="`every` must be at least 1; got 0"):
        eqd.EarlyStopping(train, every=0)
    other = eqd.Dataset(np.ones((3, 4, 4), np.float32), np.arange(3))
    with pytest.raises(ValueError, match=r"`data` and `distilled`.*\(4, 4\)"):
        eqd.distill(start, model, train, callbacks=[eqd.EarlyStopping(other)])
    # Losses that are infinite from the start never are the best.
    huge = eqd.Dataset(3e38 * np.ones((3, 8, 8), np.float32), np.arange(3))
    with pytest.raises(ValueError, match="must be finite at the start; it is"):
        eqd.distill(start, model, train, callbacks=[eqd.EarlyStopping(huge)])
    with pytest.raises(ValueError, match=r"`every` must be.* at least 1; got 0"):
        eqd.distill(start, model, train, callbacks=[eqd.Log(every=0)])
