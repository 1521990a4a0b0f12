"""Callbacks: when they are called, what they may keep, and how they stop a run."""

import io
import sys
import time

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd

from .conftest import ADAM, hypergradient, LBFGS, Recorder, subset


def run(logistic, *callbacks, steps=12, optimiser=ADAM):
    return eqd.distill(*logistic, optimiser=optimiser, steps=steps, callbacks=callbacks)


def test_are_called_when_due_and_at_the_end(logistic):
    closed = []
    fine, coarse = (Recorder(every=every, closed=closed) for every in (2, 5))
    result = run(logistic, fine, coarse)
    of_fine, of_coarse = result.callbacks
    assert [step for step, *_ in of_fine] == [2, 4, 6, 8, 10, 12]
    assert [step for step, *_ in of_coarse] == [5, 10, 12]
    assert [length for _, length, _ in of_coarse] == [5, 10, 12]
    assert sorted(closed) == [3, 6]
    # Later steps have not deleted what they kept.
    assert not jnp.array_equal(of_fine[0][2].images, of_fine[1][2].images)
    np.testing.assert_array_equal(of_fine[-1][2].images, result.distilled.images)


def test_if_one_stops_the_run_all_are_called_once_more(logistic):
    result = run(logistic, Recorder(every=10), Recorder(every=3, stop_at=6), steps=50)
    assert len(result.history) == 6
    assert [step for step, *_ in result.callbacks[0]] == [6]


class Unclosable(Recorder):
    def close(self, own):
        raise OSError("The disk is full.")


def test_all_are_closed_if_one_raises(logistic):
    closed = []
    watches = Recorder(closed=closed), Unclosable(), Recorder(closed=closed)
    with pytest.raises(OSError, match="The disk is full"):
        run(logistic, *watches)
    assert closed == [12, 12]


class Broken(Recorder):
    def __call__(self, problem, state, history, own):
        raise OSError("The disk is full.")


def test_an_error_of_a_callback_returns_the_result(logistic):
    closed = []
    with pytest.raises(eqd.DistillationError, match="step 5: a callback raised") as e:
        run(logistic, Broken(every=5, closed=closed))
    assert "The disk is full" in str(e.value.__cause__)
    assert len(e.value.distillation.history) == 5
    assert closed == [0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_in_a_terminal(logistic, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(logistic, eqd.ProgressBar())
    shown = sys.stderr.getvalue()
    assert "12/12" in shown
    assert "loss=" in shown
    # It is one line, which is written several times.
    assert shown.count("\n") == 1
    assert shown.count("\r") >= 2


def test_progress_bar_moves_with_each_step(logistic, monkeypatch):
    start, objective, train = logistic
    data = objective.layout(train)

    def slow(step):
        time.sleep(0.15)
        return data

    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = eqd.ProgressBar(every=100)
    eqd.distill(start, objective, slow, optimiser=ADAM, steps=6, callbacks=[bar])
    before, _, after = sys.stderr.getvalue().partition("| 1/6")
    assert "compiling the first step:   0%" in before
    assert [n for n in range(7) if f"| {n}/6" in after] == [2, 3, 4, 5, 6]
    assert "compiling" not in after


@pytest.mark.parametrize("every", [1, 10])
def test_progress_bar_in_a_log_file(logistic, capsys, every):
    run(logistic, eqd.ProgressBar(every=every), steps=37)
    shown = capsys.readouterr().err
    assert "compiling the first step" in shown
    assert "37/37" in shown
    assert "loss=" in shown
    # It does not fill the file.
    assert shown.count("\r") <= 4


def test_early_stopping(logistic, digits):
    # So few images are soon overfitted.
    few, held_out = subset(digits[0], 150).split(2 / 3, key=jr.key(0))
    start = eqd.DistilledSet.from_noise(digits[0], l2=1e-3, scale=0.02, key=jr.key(0))
    problem = start, logistic[1], few
    stopping = eqd.EarlyStopping(held_out, patience=2)
    watch = Recorder(every=10)
    result = run(problem, stopping, watch, steps=100, optimiser=LBFGS)
    best, seen = result.callbacks
    held_out_loss = lambda x: float(hypergradient(x, problem[1], held_out)[0])
    losses = {step: held_out_loss(distilled) for step, _, distilled in seen}
    losses[0] = held_out_loss(start)
    assert len(result.history) == int(best.step) + 2 * stopping.every < 100
    np.testing.assert_allclose(losses[int(best.step)], min(losses.values()), rtol=1e-5)
    np.testing.assert_allclose(best.loss, losses[int(best.step)], rtol=1e-5)
    np.testing.assert_allclose(held_out_loss(best.distilled), best.loss, rtol=1e-5)
    # The images got worse while it waited.
    assert losses[len(result.history)] > 1.01 * best.loss


def test_early_stopping_refuses_bad_data(logistic):
    start, objective, train = logistic
    other = eqd.Dataset(np.ones((3, 4, 4), np.float32), np.arange(3))
    with pytest.raises(ValueError, match=r"`data` must have images .*\(4, 4\)"):
        run(logistic, eqd.EarlyStopping(other))
    huge = eqd.Dataset(3e38 * np.ones((3, 8, 8), np.float32), np.arange(3))
    strong = eqx.tree_at(lambda s: s.images, start, 1e3 * start.images)
    with pytest.raises(ValueError, match="must be finite at the start; it is"):
        run((strong, objective, train), eqd.EarlyStopping(huge))
