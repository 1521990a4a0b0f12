"""Distillation from several starts at once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import MLP, subset


LBFGS = optax.lbfgs(learning_rate=1.0, linesearch=None)


@pytest.fixture(scope="module")
def train(digits):
    return subset(digits[0], 300)


def starts(train, n=3):
    return [
        eqd.DistilledSet.from_noise(train, l2=0.05 * (i + 1), key=jr.key(i))
        for i in range(n)
    ]


def test_is_as_one_by_one(train):
    classifier = eqd.LogisticRegression(64, 10)
    optimiser = eqd.whitened(LBFGS, train)
    args = {"optimiser": optimiser, "steps": 12, "tolerance": 0.01}
    together = eqd.distill_each(starts(train), classifier, train, **args)
    for start, result in zip(starts(train), together, strict=True):
        alone = eqd.distill(start, classifier, train, **args)
        assert result.converged == alone.converged
        assert len(result.history) == len(alone.history)
        np.testing.assert_allclose(result.history.loss, alone.history.loss, rtol=1e-4)
        assert result.distilled.l2 == start.l2
    # Those that have converged wait for those that have not.
    assert len({len(result.history) for result in together}) > 1


def test_any_classifier(train):
    classifier = MLP(64, 4, jax.nn.softplus, key=jr.key(1))
    for result in eqd.distill_each(starts(train, 2), classifier, train, steps=3):
        assert result.history.loss[-1] < result.history.loss[0]


def test_says_which_start_fails(train):
    classifier = eqd.LogisticRegression(64, 10)
    good, _, bad = starts(train)
    bad = eqx.tree_at(lambda d: d.images, bad, jnp.full_like(bad.images, jnp.nan))
    match = "the start of index 1 stopped at step 0: the outer loss is not finite"
    with pytest.raises(eqd.DistillationError, match=match) as info:
        eqd.distill_each([good, bad], classifier, train, optimiser=LBFGS, steps=5)
    assert len(info.value.distillation.history) == 0


def test_bad_input(train):
    classifier = eqd.LogisticRegression(64, 10)
    with pytest.raises(ValueError, match="`starts` must hold at least one"):
        eqd.distill_each([], classifier, train)
    other = eqd.DistilledSet.from_noise(train, 5, key=jr.key(0))
    with pytest.raises(ValueError, match=r"of one shape; .*\(10, 8, 8\).*\(5, 8, 8\)"):
        eqd.distill_each([*starts(train), other], classifier, train)
    labels = eqx.tree_at(lambda d: d.labels, starts(train)[0], jnp.arange(10) + 1)
    with pytest.raises(ValueError, match=r"`distilled.labels` must be in \[0, 10\)"):
        eqd.distill_each([*starts(train), labels], classifier, train)
    with pytest.raises(ValueError, match="`steps` must be at least 1; got 0"):
        eqd.distill_each(starts(train), classifier, train, steps=0)


class Raising(eqd.AbstractInnerSolver):
    def __call__(self, classifier, distilled, tilt=None):
        fitted = eqd.SpanSolver()(classifier, distilled, tilt)
        is_negative = distilled.images.mean() < 0
        return eqx.error_if(fitted, is_negative, "Useless.")


def test_inner_solver_that_raises(train):
    good, bad, _ = starts(train)
    bad = eqx.tree_at(lambda d: d.images, bad, -bad.images)
    classifier = eqd.LogisticRegression(64, 10)
    with pytest.raises(eqd.DistillationError, match="the inner solver raised") as info:
        eqd.distill_each([good, bad], classifier, train, inner=Raising(), steps=3)
    assert "Useless" in str(info.value.__cause__)
    assert len(info.value.distillation.history) == 0
