import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

import eqdistill as eqd

from .conftest import exact, subset


@pytest.mark.usefixtures("x64")
def test_agrees_with_scikit_learn(digits):
    real = subset(digits[0], 40)
    x, y = np.asarray(real.images) / 255, np.asarray(real.labels)
    model = eqd.linear.LogisticRegression(64, 10, use_intercept=True)
    for l2 in (1.0, 0.01):
        fitted = eqd.fit(eqd.DistilledSet(x, y, l2=l2), model, exact())
        reference = SklearnLogisticRegression(
            C=1 / (40 * l2), solver="newton-cholesky", tol=1e-12
        ).fit(x.reshape(40, 64), y)
        head = fitted.model.head
        np.testing.assert_allclose(head.weight, reference.coef_, rtol=0, atol=1e-6)
        # A softmax does not change if all its logits are shifted.
        got = head.bias - head.bias.mean()
        np.testing.assert_allclose(got, reference.intercept_, rtol=0, atol=1e-6)
        assert fitted.converged
        assert not fitted.collapsed
        assert fitted.gradient_norm < 1e-10


@pytest.mark.usefixtures("x64")
def test_hard_labels_are_the_limit_of_soft_ones():
    images = jr.normal(jr.key(0), (4, 6))
    model = eqd.linear.LogisticRegression(6, 3)
    labels = jnp.array([0, 2, 1, 0])
    hard = eqd.fit(eqd.DistilledSet(images, labels, l2=0.1), model, exact())
    logits = 100 * jax.nn.one_hot(labels, 3)
    soft = eqd.fit(eqd.DistilledSet(images, logits, l2=0.1), model, exact())
    np.testing.assert_allclose(
        hard.model.head.weight, soft.model.head.weight, atol=1e-9
    )


def test_a_failure_is_raised_or_returned():
    distilled = eqd.DistilledSet(jr.normal(jr.key(0), (4, 6)), jnp.arange(4), l2=1e-3)
    model = eqd.linear.LogisticRegression(6, 4)
    real = eqd.Dataset(distilled.images, distilled.labels)
    inner = eqd.linear.SpanSolver(max_steps=2)
    fitted = eqd.fit(distilled, model, inner, throw=False)
    assert not fitted.converged
    assert fitted.stats["steps"] == 2
    match = "No fit: the inner solver did not converge"
    with pytest.raises(RuntimeError, match=match):
        eqd.fit(distilled, model, inner)
    with pytest.raises(RuntimeError, match=match):
        eqd.evaluate(distilled, model, real, inner=inner)
