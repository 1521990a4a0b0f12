"""Exact distillation: what it finds is refitted from scratch, by two programs."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression, Ridge

import eqdistill as eqd

from .conftest import small_noise


def linear(weight, bias=None) -> eqd.LinearClassifier:
    c, p = weight.shape
    model = eqd.LogisticRegression(p, c, use_intercept=bias is not None)
    return eqx.tree_at(
        lambda k: (k.head.weight, k.head.bias),
        model,
        (jnp.asarray(weight), None if bias is None else jnp.asarray(bias)),
        is_leaf=lambda x: x is None,
    )


def centred(x):
    """Without the mean over the classes."""
    return np.asarray(x) - np.mean(x, axis=0)


def error_of_fit(distilled, model) -> float:
    """Of the weights, relative to their norm."""
    got, head = eqd.fit(distilled, model).model.head, model.head
    want = centred(head.weight)
    error = np.linalg.norm(got.weight - want) / np.linalg.norm(want)
    if head.bias is None:
        return float(error)
    return max(float(error), np.abs(got.bias - centred(head.bias)).max())


def error_of_scikit_learn(distilled, model) -> float:
    """The same, for a fit by scikit-learn. It knows no soft labels: each image goes in
    once for each class, weighted by its probability."""
    n, c = len(distilled), len(model.head.weight)
    images = np.asarray(distilled.images).reshape(n, -1)
    labels = distilled.labels
    hard = labels.ndim == 1
    weights = jax.nn.one_hot(labels, c) if hard else jax.nn.softmax(labels)
    reference = SklearnLogisticRegression(
        C=1 / (n * float(distilled.l2)),
        fit_intercept=model.head.bias is not None,
        solver="newton-cg",
        tol=1e-12,
        max_iter=1000,
    ).fit(
        np.repeat(images, c, axis=0),
        np.tile(np.arange(c), n),
        sample_weight=np.asarray(weights).ravel(),
    )
    want = centred(model.head.weight)
    return float(np.linalg.norm(reference.coef_ - want) / np.linalg.norm(want))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@given(
    # Of smaller weights beside such intercepts double precision keeps fewer digits.
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
    exact = eqd.distill_exactly(start, model)
    assert jnp.array_equal(exact.labels, start.labels)
    assert error_of_fit(exact, model) <= 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_hundred_classes():
    weights = np.random.default_rng(0).normal(size=(100, 784))
    start = eqd.DistilledSet(np.zeros((100, 784)), np.arange(100), l2=0.1)
    exact = eqd.distill_exactly(start, linear(weights))
    assert error_of_fit(exact, linear(weights)) <= 1e-6


@pytest.fixture(scope="module")
def mnist_weights(mnist):
    """The weights and the intercept of a quick fit to real images: of squared errors,
    by a factor larger."""
    x, y = np.asarray(mnist[0].images[:600]) / 255, np.asarray(mnist[0].labels[:600])
    fitted = Ridge(60.0).fit(x.reshape(600, 784), 5 * np.eye(10)[y])
    return fitted.coef_, fitted.intercept_


STARTS = {
    "noise": small_noise,
    "real": functools.partial(eqd.DistilledSet.from_real, l2=0.1, key=jr.key(0)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("start", "n", "soft", "use_intercept"),
    [("noise", 9, False, False), ("real", 25, True, True)],
)
def test_mnist(mnist, mnist_weights, start, n, soft, use_intercept):
    distilled = STARTS[start](mnist[0], n)
    if soft:
        logits = 4 * jax.nn.one_hot(distilled.labels, 10)
        distilled = eqd.DistilledSet(distilled.images, logits, l2=0.1)
    weights, intercept = mnist_weights
    model = linear(weights, intercept if use_intercept else None)
    exact = eqd.distill_exactly(distilled, model)
    assert exact.images.shape == (n, 28, 28)
    assert error_of_fit(exact, model) <= 1e-6
    assert error_of_scikit_learn(exact, model) <= 1e-4


@pytest.mark.slow
def test_in_single_precision(mnist, mnist_weights):
    model = linear(*(x.astype(np.float32) for x in mnist_weights))
    start = STARTS["noise"](mnist[0], 10)
    exact = eqd.distill_exactly(start, model)
    assert exact.images.dtype == jnp.float32
    assert error_of_fit(exact, model) <= 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_no_ridge_above_the_bound_has_a_solution():
    # At the bound each image is on the edge, here for weights that are alike in all
    # directions: two classes, one pixel.
    model = linear(np.array([[1.0], [-1.0]]))
    start = eqd.DistilledSet(np.zeros((2, 1)), np.arange(2), l2=0.1)
    bound = 0.2784645427610738 / 2  # W(1 / e) / |W|^2
    exact = eqd.distill_exactly(start, model, l2=0.999 * bound)
    assert error_of_fit(exact, model) <= 1e-6
    with pytest.raises(ValueError, match=r"`l2` must be positive and at most 0\.1392"):
        eqd.distill_exactly(start, model, l2=1.001 * bound)


@pytest.mark.slow
def test_says_why_there_is_no_solution():
    rng = np.random.default_rng(0)
    weights, intercept = rng.normal(size=(3, 5)), rng.normal(size=3)

    def start(n, classes=3):
        images = 0.1 * rng.normal(size=(n, 5)).astype(np.float32)
        return eqd.DistilledSet(images, np.arange(n) % classes, l2=0.1)

    with pytest.raises(ValueError, match=r"at least 2 images.*rank 2.*got 1"):
        eqd.distill_exactly(start(1), linear(weights))
    with pytest.raises(ValueError, match=r"at least 3 images.*intercept.*got 2"):
        eqd.distill_exactly(start(2), linear(weights, intercept))
    with pytest.raises(
        ValueError, match=r"an image of every class.*no image of class 2"
    ):
        eqd.distill_exactly(start(4, classes=2), linear(weights, intercept))
    # Two classes whose weights are equal have probabilities in a fixed ratio.
    weights[1] = weights[0]
    with pytest.raises(ValueError, match=r"No images were found.*Try a smaller `l2`"):
        eqd.distill_exactly(start(4), linear(weights, intercept), l2=1e-4)


def test_bad_input(digits):
    start = small_noise(digits[0])
    weights = np.random.default_rng(0).normal(size=(10, 64))
    with pytest.raises(ValueError, match=r"could not be applied.*shape \(30,\)"):
        eqd.distill_exactly(start, linear(weights[:, :30]))
    with pytest.raises(ValueError, match="`model` must have weights that differ"):
        eqd.distill_exactly(start, eqd.LogisticRegression(64, 10))
    with pytest.raises(ValueError, match="`model` must have finite weights"):
        eqd.distill_exactly(start, linear(np.full((10, 64), np.nan)))
    with pytest.raises(ValueError, match=r"labels.*must be in"):
        eqd.distill_exactly(start, linear(weights[:5]))
    with pytest.raises(ValueError, match=r"`l2` must be positive.*got -1"):
        eqd.distill_exactly(start, linear(weights), l2=-1.0)
    of_features = eqd.LinearClassifier(jnp.ravel, linear(weights).head)
    for other, name in (
        (eqx.nn.Identity(), "Identity"),
        (of_features, "LinearClassifier"),
    ):
        match = f"`model` must be a `LogisticRegression`.*got a {name}"
        with pytest.raises(TypeError, match=match):
            eqd.distill_exactly(start, other)
    squared = eqd.DistilledSet(
        start.images, start.labels, l2=0.1, loss=eqd.SquaredError()
    )
    with pytest.raises(TypeError, match="`start` must have `CrossEntropy` as its loss"):
        eqd.distill_exactly(squared, linear(weights))
