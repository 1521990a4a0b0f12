"""Exact distillation: a fit to the result gives the model back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import Ridge

import eqdistill as eqd


def linear(weight, bias=None):
    c, p = weight.shape
    model = eqd.linear.LogisticRegression(p, c, use_intercept=bias is not None)
    return eqx.tree_at(
        lambda k: (k.head.weight, k.head.bias),
        model,
        (jnp.asarray(weight), None if bias is None else jnp.asarray(bias)),
        is_leaf=lambda x: x is None,
    )


def centred(x):
    """Subtracts the mean over the classes."""
    return np.asarray(x) - np.mean(x, axis=0)


def error_of_fit(distilled, model):
    """The relative error of the weights, or the error of the intercept if larger."""
    got, head = eqd.fit(distilled, model).model.head, model.head
    want = centred(head.weight)
    error = np.linalg.norm(got.weight - want) / np.linalg.norm(want)
    if head.bias is None:
        return float(error)
    return max(float(error), np.abs(got.bias - centred(head.bias)).max())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@given(
    # Smaller weights beside such intercepts have fewer correct digits.
    log_scale=st.floats(-1, 3),
    intercept_scale=st.floats(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=10, deadline=None)
def test_random_weights(log_scale, intercept_scale, seed):
    c, p = 5, 8
    rng = np.random.default_rng(seed)
    weights = 10**log_scale * rng.normal(size=(c, p))
    model = linear(weights, intercept_scale * rng.normal(size=c))
    start = eqd.DistilledSet(1e-3 * rng.normal(size=(c, p)), np.arange(c), l2=0.1)
    exact = eqd.linear.distill_exactly(start, model)
    assert jnp.array_equal(exact.labels, start.labels)
    assert error_of_fit(exact, model) <= 1e-6


@pytest.fixture(scope="module")
def mnist_weights(mnist):
    """The weights and the intercept of a quick fit of squared errors, enlarged."""
    x, y = np.asarray(mnist[0].images[:600]) / 255, np.asarray(mnist[0].labels[:600])
    fitted = Ridge(60.0).fit(x.reshape(600, 784), 5 * np.eye(10)[y])
    return fitted.coef_, fitted.intercept_


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("n", "soft"), [(9, False), (25, True)])
def test_mnist(mnist, mnist_weights, n, soft):
    start = eqd.DistilledSet.from_real(mnist[0], n, l2=0.1, key=jr.key(0))
    if soft:
        logits = 4 * jax.nn.one_hot(start.labels, 10)
        start = eqd.DistilledSet(start.images, logits, l2=0.1)
    weights, intercept = mnist_weights
    model = linear(weights, intercept if soft else None)
    exact = eqd.linear.distill_exactly(start, model)
    assert exact.images.shape == (n, 28, 28)
    assert error_of_fit(exact, model) <= 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_largest_ridge():
    # For weights that are equal in all directions, here two classes and one pixel, a
    # solution exists up to the bound.
    model = linear(np.array([[1.0], [-1.0]]))
    start = eqd.DistilledSet(np.zeros((2, 1)), np.arange(2), l2=0.1)
    bound = 0.2784645427610738 / 2  # W(1 / e) / |W|^2
    exact = eqd.linear.distill_exactly(start, model, l2=0.999 * bound)
    assert error_of_fit(exact, model) <= 1e-6
    with pytest.raises(ValueError, match=r"`l2` must be positive and at most 0\.1392"):
        eqd.linear.distill_exactly(start, model, l2=1.001 * bound)


@pytest.mark.slow
def test_reasons_for_no_solution():
    rng = np.random.default_rng(0)
    weights, intercept = rng.normal(size=(3, 5)), rng.normal(size=3)

    def check(match, n, bias=None, classes=3, **kwargs):
        images = 0.1 * rng.normal(size=(n, 5)).astype(np.float32)
        start = eqd.DistilledSet(images, np.arange(n) % classes, l2=0.1)
        with pytest.raises(ValueError, match=match):
            eqd.linear.distill_exactly(start, linear(weights, bias), **kwargs)

    check("at least 2 images.*got 1", 1)
    check("at least 3 images.*intercept; got 2", 2, intercept)
    check("an image of every class.*no image of class 2", 4, intercept, classes=2)
    # Two classes with equal weights have probabilities in a fixed ratio.
    weights[1] = weights[0]
    check("No images were found.*Try a smaller `l2`", 4, intercept, l2=1e-4)


def test_bad_models(digits):
    start = eqd.DistilledSet.from_noise(digits[0], l2=0.1, scale=1 / 64, key=jr.key(0))
    weights = np.random.default_rng(0).normal(size=(10, 64))
    for model, match in (
        (linear(weights[:, :30]), r"shape \(30,\)"),
        (linear(0 * weights), "`model` must have weights that differ"),
        (linear(np.nan * weights), "`model` must have finite weights"),
        (linear(weights[:5]), r"labels.*must be in"),
    ):
        with pytest.raises(ValueError, match=match):
            eqd.linear.distill_exactly(start, model)
