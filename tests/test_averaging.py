"""The exponential average of what is learned."""

import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import OneStep, subset
from .test_problem import assert_same_bits


DECAY = 0.7
OPTIMISER = eqd.averaged(optax.adam(0.05), DECAY)
QUICK = {"inner": OneStep(), "learn": (True, False)}


@pytest.fixture(scope="module")
def problem(digits):
    train = subset(digits[0], 200)
    start = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.02, key=jr.key(0))
    return start, eqd.LogisticRegression(64, 10), train


class Keep(eqd.AbstractCallback):
    """The distilled set after each step."""

    every: int = 1

    def init(self, problem, state, steps):
        return ()

    def __call__(self, problem, state, history, own):
        return (*own, problem.distilled(state)), False

    def close(self, own):
        pass


def test_average(problem):
    args = {**QUICK, "optimiser": OPTIMISER, "callbacks": [Keep()]}
    result = eqd.distill(*problem, **args, steps=5)
    average = eqd.average_of(result)
    weights = DECAY ** np.arange(4, -1, -1)
    for of in (lambda d: d.images, lambda d: d.log_l2):
        kept = np.stack([of(d) for d in result.callbacks[0]])
        wanted = np.tensordot(weights / weights.sum(), kept.astype(float), 1)
        np.testing.assert_allclose(of(average.distilled), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(average.distilled.labels, problem[0].labels)
    assert_same_bits(average.start, average.distilled)
    # The updates, and the state, are as without the average.
    plain = eqd.distill(*problem, **QUICK, optimiser=optax.adam(0.05), steps=5)
    np.testing.assert_allclose(plain.history.loss, result.history.loss, rtol=1e-4)
    assert average.state is result.state
    # A run that goes on averages on.
    half = eqd.distill(*problem, **args, steps=3)
    rest = eqd.distill(*problem, **args, steps=5, state=half.state)
    assert_same_bits(eqd.average_of(rest).distilled, average.distilled)


def test_an_update_that_is_not_made_is_not_in_the_average(problem):
    """The run converges in its first step, before the update."""
    args = {**QUICK, "optimiser": OPTIMISER, "tolerance": 1e9}
    result = eqd.distill(*problem, **args, steps=5)
    assert result.converged
    assert_same_bits(eqd.average_of(result).distilled, problem[0])


def test_bad_input(problem):
    for decay in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"`decay` must be between.*got {decay}"):
            eqd.averaged(optax.sgd(0.1), decay)
    with pytest.raises(ValueError, match="`averaged` must be given `params`"):
        OPTIMISER.update(np.ones(2), OPTIMISER.init(np.ones(2)))
    result = eqd.distill(*problem, **QUICK, optimiser=optax.adam(0.05), steps=5)
    with pytest.raises(ValueError, match="`result` must be of an optimiser that is"):
        eqd.average_of(result)
