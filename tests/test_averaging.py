"""The exponential moving average of what is learned."""

import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import ADAM, assert_same_bits, Recorder


DECAY = 0.7
OPTIMISER = eqd.averaged(ADAM, DECAY)


def test_average(logistic):
    args = {"learn": lambda s: s, "callbacks": [Recorder()]}
    run = lambda optimiser=OPTIMISER, **kwargs: eqd.distill(
        *logistic, optimiser=optimiser, **args, **kwargs
    )
    result = run(steps=5)
    average = result.average()
    weights = DECAY ** np.arange(4, -1, -1)
    for name in ("images", "log_l2"):
        kept = np.stack([getattr(x, name) for *_, x in result.callbacks[0]])
        wanted = np.tensordot(weights / weights.sum(), kept.astype(float), 1)
        found = getattr(average.distilled, name)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(average.distilled.labels, logistic[0].labels)
    assert_same_bits(average.start, average.distilled)
    # The average changes no update.
    plain = run(ADAM, steps=5)
    np.testing.assert_allclose(plain.history.loss, result.history.loss, rtol=1e-4)
    assert average.state is result.state
    # A run that continues also continues the average.
    half = run(steps=3)
    rest = run(steps=5, state=half.state)
    assert_same_bits(rest.average().distilled, average.distilled)
    with pytest.raises(ValueError, match=r"must be wrapped in `eqdistill.averaged`"):
        plain.average()


def test_an_update_that_is_not_made_is_not_averaged(logistic):
    start, objective, train = logistic
    optimiser = eqd.averaged(optax.sgd(float("inf")), DECAY)
    with pytest.raises(eqd.DistillationError) as error:
        eqd.distill(start, objective, train, optimiser=optimiser)
    assert_same_bits(error.value.distillation.average().distilled, start)
