"""Classifiers that are drawn anew in each outer step."""

import functools

import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import ADAM, subset


mlp = functools.partial(eqd.nn.MLP, widths=(8,))
training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 3)
solver = eqd.RandomInitialisation(mlp, training, num_classes=10)


@pytest.mark.slow
def test_each_step_draws_another_start(digits):
    train = subset(digits[0], 30)
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0))
    losses = [
        float(eqd.outer_loss(start, None, train, solver, step=i, key=jr.key(0))[0])
        for i in (0, 1, 1)
    ]
    assert losses[1] == losses[2]
    assert abs(losses[0] - losses[1]) > 1e-3
    result = eqd.distill(
        start, None, train, inner=solver, optimiser=ADAM, steps=3, key=jr.key(0)
    )
    # The first loss is before any update.
    np.testing.assert_allclose(result.history.loss[0], losses[0], rtol=1e-4)


def test_bad_input(digits):
    train = subset(digits[0], 30)
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0))
    with pytest.raises(ValueError, match="`num_classes` must be at least 1; got 0"):
        eqd.RandomInitialisation(mlp, training, num_classes=0)
    with pytest.raises(ValueError, match="`key` must be given with a `RandomInit"):
        eqd.fit(start, None, solver)
    with pytest.raises(TypeError, match="`model` must be None with `RandomInit"):
        eqd.fit(start, eqd.LogisticRegression(64, 10), solver, key=jr.key(0))
    five = eqd.RandomInitialisation(
        lambda shape, num_classes, key: mlp(shape, 5, key=key), training, num_classes=10
    )
    with pytest.raises(ValueError, match=r"`network` must make .* 10 logits.*; got 5"):
        eqd.fit(start, None, five, key=jr.key(0))
