"""Exact distillation: what it finds is refitted from scratch, by two programs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

import eqdistill as eqd

from .conftest import MLP


def linear(weights, intercept=None) -> eqd.LogisticRegression:
    p, c = weights.shape
    classifier = eqd.LogisticRegression(p, c, use_intercept=intercept is not None)
    arrays = (
        jnp.asarray(weights),
        None if intercept is None else jnp.asarray(intercept),
    )
    return eqx.tree_at(
        lambda k: (k.weights, k.intercept),
        classifier,
        arrays,
        is_leaf=lambda x: x is None,
    )


def centred(x):
    return np.asarray(x) - np.mean(x, axis=-1, keepdims=True)


def error_of_fit(distilled, classifier) -> float:
    """Of the weights, relative to their norm."""
    fitted = eqd.fit(distilled, classifier, eqd.SpanSolver()).classifier
    want = centred(classifier.weights)
    error = np.linalg.norm(fitted.weights - want) / np.linalg.norm(want)
    if classifier.intercept is None:
        return float(error)
    return max(
        float(error), np.abs(fitted.intercept - centred(classifier.intercept)).max()
    )


def error_of_scikit_learn(distilled, classifier) -> float:
    """The same, for a fit by scikit-learn. It knows no soft labels: each image goes in
    once for each class, weighted by its probability."""
    n, c = len(distilled), classifier.weights.shape[1]
    images = np.asarray(distilled.images).reshape(n, -1)
    labels = distilled.labels
    hard = labels.ndim == 1
    weights = jax.nn.one_hot(labels, c) if hard else jax.nn.softmax(labels)
    reference = SklearnLogisticRegression(
        C=1 / (n * float(distilled.l2)),
        fit_intercept=classifier.intercept is not None,
        solver="newton-cg",
        tol=1e-12,
        max_iter=1000,
    ).fit(
        np.repeat(images, c, axis=0),
        np.tile(np.arange(c), n),
        sample_weight=np.asarray(weights).ravel(),
    )
    want = centred(classifier.weights)
    return float(np.linalg.norm(reference.coef_.T - want) / np.linalg.norm(want))


@pytest.mark.usefixtures("x64")
@given(
    # Few shapes, for each is compiled.
    shape=st.sampled_from([(3, 5, False), (20, 40, True)]),
    log_scale=st.floats(-3, 3),
    intercept_scale=st.floats(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=10, deadline=None)
def test_random_weights(shape, log_scale, intercept_scale, seed):
    c, p, use_intercept = shape
    rng = np.random.default_rng(seed)
    weights = 10**log_scale * rng.normal(size=(p, c))
    intercept = intercept_scale * rng.normal(size=c) if use_intercept else None
    classifier = linear(weights, intercept)
    start = eqd.DistilledSet(1e-3 * rng.normal(size=(c, p)), np.arange(c))
    exact = eqd.distill_exactly(start, classifier)
    assert jnp.array_equal(exact.labels, start.labels)
    assert error_of_fit(exact, classifier) <= 1e-6


@pytest.mark.usefixtures("x64")
def test_a_hundred_classes():
    weights = np.random.default_rng(0).normal(size=(784, 100))
    start = eqd.DistilledSet(np.zeros((100, 784)), np.arange(100))
    exact = eqd.distill_exactly(start, linear(weights))
    assert error_of_fit(exact, linear(weights)) <= 1e-6


@pytest.fixture(scope="module")
def mnist_weights(mnist):
    """The centred weights of a quick fit to real images."""
    with jax.enable_x64(True):
        x, y = mnist[0].images[:600], mnist[0].labels[:600]
        real = eqd.DistilledSet(x / 255.0, y, l2=1e-3)
        classifier = eqd.LogisticRegression(784, 10, use_intercept=True)
        inner = eqd.ArgminSolver(max_steps=200)
        return eqd.fit(real, classifier, inner, throw=False).classifier


STARTS = {
    "noise": lambda train, n: eqd.DistilledSet.from_noise(train, n, key=jr.key(0)),
    "real": lambda train, n: eqd.DistilledSet.from_real(train, n, key=jr.key(0)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("start", "n", "soft", "use_intercept"),
    [
        ("noise", 9, False, False),
        ("real", 10, False, True),
        ("real", 25, True, True),
    ],
)
def test_mnist(mnist, mnist_weights, start, n, soft, use_intercept):
    distilled = STARTS[start](mnist[0], n)
    if soft:
        logits = 4 * jax.nn.one_hot(distilled.labels, 10)
        distilled = eqd.DistilledSet(distilled.images, logits)
    intercept = mnist_weights.intercept if use_intercept else None
    classifier = linear(mnist_weights.weights, intercept)
    exact = eqd.distill_exactly(distilled, classifier)
    assert exact.images.shape == (n, 28, 28)
    assert error_of_fit(exact, classifier) <= 1e-6
    assert error_of_scikit_learn(exact, classifier) <= 1e-4


def test_in_single_precision(mnist, mnist_weights):
    classifier = linear(
        np.asarray(mnist_weights.weights, np.float32),
        np.asarray(mnist_weights.intercept, np.float32),
    )
    start = STARTS["noise"](mnist[0], 10)
    exact = eqd.distill_exactly(start, classifier)
    assert exact.images.dtype == jnp.float32
    assert error_of_fit(exact, classifier) <= 1e-4
    # It starts a distillation as any other set does.
    few = eqd.Dataset(mnist[0].images[:500], mnist[0].labels[:500], 10)
    result = eqd.distill(exact, classifier, few, optimiser=optax.sgd(0.0), steps=1)
    want = eqd.evaluate(exact, classifier, few).loss
    np.testing.assert_allclose(result.history.loss, want, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_no_ridge_above_the_bound_has_a_solution():
    # At the bound each image is on the edge, here for weights that are alike in all
    # directions: two classes, one pixel.
    classifier = linear(np.array([[1.0, -1.0]]))
    start = eqd.DistilledSet(np.zeros((2, 1)), np.arange(2))
    bound = 0.2784645427610738 / 2  # W(1 / e) / |W|^2
    exact = eqd.distill_exactly(start, classifier, l2=0.999 * bound)
    assert error_of_fit(exact, classifier) <= 1e-6
    with pytest.raises(ValueError, match=r"`l2` must be positive and at most 0\.1392"):
        eqd.distill_exactly(start, classifier, l2=1.001 * bound)


def test_says_why_there_is_no_solution(digits):
    rng = np.random.default_rng(0)
    weights, intercept = rng.normal(size=(64, 10)), rng.normal(size=10)
    start = lambda n: eqd.DistilledSet.from_noise(digits[0], n, key=jr.key(0))
    with pytest.raises(ValueError, match=r"at least 9 images.*rank 9.*got 8"):
        eqd.distill_exactly(start(8), linear(weights))
    with pytest.raises(ValueError, match=r"at least 10 images.*intercept.*got 9"):
        eqd.distill_exactly(start(9), linear(weights, intercept))
    missing = eqd.DistilledSet(start(12).images, np.arange(12) % 9)
    with pytest.raises(
        ValueError, match=r"an image of every class.*no image of class 9"
    ):
        eqd.distill_exactly(missing, linear(weights, intercept))
    # Two classes whose weights are equal have probabilities in a fixed ratio.
    weights[:, 1] = weights[:, 0]
    with pytest.raises(ValueError, match=r"No images were found.*Try"):
        eqd.distill_exactly(start(12), linear(weights, intercept), l2=1e-4)


def test_bad_input(digits):
    start = eqd.DistilledSet.from_noise(digits[0], key=jr.key(0))
    weights = np.random.default_rng(0).normal(size=(64, 10))
    with pytest.raises(ValueError, match=r"could not be applied.*must have 30 pixels"):
        eqd.distill_exactly(start, linear(weights[:30]))
    with pytest.raises(ValueError, match="`classifier` must have weights that differ"):
        eqd.distill_exactly(start, eqd.LogisticRegression(64, 10))
    with pytest.raises(ValueError, match="`classifier` must have finite weights"):
        eqd.distill_exactly(start, linear(np.full((64, 10), np.nan)))
    with pytest.raises(ValueError, match=r"labels.*must be in"):
        eqd.distill_exactly(start, linear(weights[:, :5]))
    with pytest.raises(ValueError, match=r"`l2` must be positive.*got -1"):
        eqd.distill_exactly(start, linear(weights), l2=-1.0)
    mlp = MLP(64, 8, jax.nn.softplus, key=jr.key(0))
    with pytest.raises(TypeError, match="`classifier` must be a `LogisticRegression`"):
        eqd.distill_exactly(start, mlp)
