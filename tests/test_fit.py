import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings, strategies as st
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


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**30), log10_l2=st.floats(-2, 1))
def test_is_a_stationary_point(seed, log10_l2):
    distilled = eqd.DistilledSet(
        jr.normal(jr.key(seed), (5, 3, 3)), jnp.arange(5) % 3, l2=10**log10_l2
    )
    fitted = eqd.fit(distilled, eqd.linear.LogisticRegression(9, 3))
    gradient = INNER_GRADIENT(fitted.model, distilled)
    norm = jnp.linalg.norm(gradient.head.weight)
    np.testing.assert_allclose(fitted.gradient_norm, norm, rtol=1e-3, atol=1e-6)
    assert norm < 1e-3
    # The representer theorem: the weights are combinations of the images.
    weights, basis = fitted.model.head.weight.T, distilled.images.reshape(5, 9).T
    residual = weights - basis @ np.linalg.lstsq(basis, weights)[0]
    assert np.abs(residual).max() < 1e-4


INNER_GRADIENT = eqx.filter_jit(
    eqx.filter_grad(lambda model, distilled: eqd.inner_loss(distilled, model))
)


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


def test_evaluate_measures_the_fitted_model(digits):
    train, test = digits
    distilled = eqd.DistilledSet.from_real(train, l2=0.1, key=jr.key(0))
    evaluation = eqd.evaluate(distilled, eqd.linear.LogisticRegression(64, 10), test)
    weight = np.asarray(evaluation.fitted.model.head.weight, np.float64)
    logits = np.asarray(test.floating()).reshape(-1, 64) @ weight.T
    labels = np.asarray(test.labels)
    want = np.mean(np.argmax(logits, axis=1) == labels)
    np.testing.assert_allclose(evaluation.accuracy, want, rtol=1e-6)
    assert 0.3 < evaluation.accuracy <= 1
    of_labels = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    losses = scipy.special.logsumexp(logits, axis=1) - of_labels
    np.testing.assert_allclose(evaluation.loss, losses.mean(), rtol=1e-5)
