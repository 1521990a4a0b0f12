"""Distillation from several starts at once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd

from .conftest import ADAM, LBFGS, MLP, OneStep, small_noise, subset


@pytest.fixture(scope="module")
def train(digits):
    return subset(digits[0], 300)


def starts(train, n=3):
    return [small_noise(train, l2=0.05 * (i + 1), seed=i) for i in range(n)]


def test_is_as_one_by_one(train):
    model = eqd.LogisticRegression(64, 10)
    optimiser = eqd.whitened(LBFGS, train)
    args = {
        "inner": OneStep(),
        "optimiser": optimiser,
        "steps": 12,
        "tolerance": 0.029,
    }
    together = eqd.distill_each(starts(train), model, train, **args)
    for start, result in zip(starts(train), together, strict=True):
        alone = eqd.distill(start, model, train, **args)
        assert result.converged == alone.converged
        assert len(result.history) == len(alone.history)
        np.testing.assert_allclose(result.history.loss, alone.history.loss, rtol=1e-4)
        assert result.distilled.l2 == start.l2
    # Those that have converged wait for those that have not.
    assert len({len(result.history) for result in together}) > 1


def strong_noise(train, l2):
    return eqd.DistilledSet.from_noise(train, l2=l2, scale=0.3, key=jr.key(0))


@pytest.mark.slow
def test_any_classifier_and_data(train):
    # Each start has its own key, and with it its own batches.
    model = MLP(64, 4, jax.nn.softplus, key=jr.key(1))
    args = {"inner": OneStep(0.1), "optimiser": ADAM, "steps": 3}
    first, second = eqd.distill_each(
        [strong_noise(train, 1e-3)] * 2,
        model,
        eqd.Batches(train, 20),
        key=jr.key(0),
        **args,
    )
    assert not np.allclose(first.history.loss, second.history.loss, rtol=1e-3)


@pytest.mark.slow
def test_networks(train):
    model = MLP(64, 4, jax.nn.softplus, key=jr.key(1))
    starts = [strong_noise(train, l2) for l2 in (1e-3, 2e-3)]
    args = {"optimiser": ADAM, "steps": 4}
    for result in eqd.distill_each(starts, model, train, **args):
        assert result.history.loss[-1] < 0.9 * result.history.loss[0]


def test_says_which_start_fails(train):
    model = eqd.LogisticRegression(64, 10)
    good, _, bad = starts(train)
    bad = eqx.tree_at(lambda d: d.images, bad, jnp.full_like(bad.images, jnp.nan))
    match = "the start of index 1 stopped at step 0: the inner solver did not converge"
    args = {"inner": OneStep(), "optimiser": ADAM, "steps": 3}
    with pytest.raises(eqd.DistillationError, match=match) as info:
        eqd.distill_each([good, bad], model, train, **args)
    assert len(info.value.distillation.history) == 0


def test_bad_input(train):
    model = eqd.LogisticRegression(64, 10)
    three = starts(train)
    with pytest.raises(ValueError, match="`starts` must hold at least one"):
        eqd.distill_each([], model, train)
    other = small_noise(train, 5)
    match = r"of one shape.*index 3 differs.*\(10, 8, 8\) wanted.*\(5, 8, 8\) got"
    with pytest.raises(ValueError, match=match):
        eqd.distill_each([*three, other], model, train)
    labels = eqx.tree_at(lambda d: d.labels, three[0], jnp.arange(10) + 1)
    with pytest.raises(ValueError, match=r"`distilled.labels` must be in \[0, 10\)"):
        eqd.distill_each([*three, labels], model, train)
    with pytest.raises(ValueError, match="`steps` must be at least 1; got 0"):
        eqd.distill_each(three, model, train, steps=0)


class Raising(eqd.AbstractInnerSolver[None]):
    def init(self, distilled, model, *, key):
        return None

    def __call__(self, distilled, model, state, *, key):
        fitted, state = OneStep()(distilled, model, state, key=key)
        is_negative = distilled.images.mean() < 0
        return eqx.error_if(fitted, is_negative, "Useless."), state


def test_inner_solver_that_raises(train):
    good, bad = (
        eqx.tree_at(lambda d: d.images, start, sign * abs(start.images))
        for start, sign in zip(starts(train, 2), (1, -1), strict=True)
    )
    model = eqd.LogisticRegression(64, 10)
    args = {"inner": Raising(), "optimiser": ADAM, "steps": 3}
    with pytest.raises(eqd.DistillationError, match="the inner solver raised") as info:
        eqd.distill_each([good, bad], model, train, **args)
    assert "Useless" in str(info.value.__cause__)
    assert len(info.value.distillation.history) == 0
