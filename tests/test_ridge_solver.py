"""`RidgeSolver` and `RelativeRidge` against scikit-learn and central differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import eqdistill as eqd
from eqdistill.linear import (
    LinearClassifier,
    LogisticRegression,
    RelativeRidge,
    RidgeSolver,
    SpanSolver,
)

from .conftest import check_gradient


P, C = 6, 3
KEY = jr.key(0)


def real(dtype=np.float64):
    images = np.random.default_rng(1).normal(size=(20, P)).astype(dtype)
    return eqd.Dataset(images, np.arange(20) % C, C)


def start(n=4, soft=True, dtype=np.float64, **kwargs):
    rng = np.random.default_rng(0)
    images, targets = rng.normal(size=(n, P)), rng.normal(size=(n, C))
    labels = targets.astype(dtype) if soft else np.arange(n) % C
    args = {"l2": 0.05, "loss": eqd.SquaredError()} | kwargs
    return eqd.DistilledSet(images.astype(dtype), labels, **args)


class Wrapped(eqx.Module):
    """A linear model that is not a `LinearClassifier`."""

    model: LinearClassifier

    def __call__(self, image):
        return self.model(image)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [4, 15], ids=["fewer than pixels", "more than pixels"])
@pytest.mark.parametrize("use_intercept", [False, True])
def test_agrees_with_scikit_learn(n, use_intercept):
    model = LogisticRegression(P, C, use_intercept=use_intercept)
    for soft in (True, False):
        for l2 in (1.0, 1e-6):
            distilled = start(n, soft, l2=l2)
            # A class index stands for its centred one-hot vector.
            targets = distilled.labels if soft else np.eye(C)[distilled.labels] - 1 / C
            fitted = eqd.fit(distilled, model)
            reference = Ridge(n * l2, fit_intercept=use_intercept, solver="svd")
            reference.fit(np.asarray(distilled.images), np.asarray(targets))
            head = fitted.model.head
            np.testing.assert_allclose(
                head.weight, reference.coef_, rtol=1e-8, atol=1e-8
            )
            if use_intercept:
                np.testing.assert_allclose(head.bias, reference.intercept_, atol=1e-8)
            assert fitted.converged
            assert fitted.gradient_norm < 1e-10


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [4, 15], ids=["fewer than pixels", "more than pixels"])
def test_derivative_agrees_with_central_differences(n):
    # In the images, the targets and the ridge.
    model = LogisticRegression(P, C, use_intercept=n == 15)
    check_gradient(start(n), eqd.Bilevel(model, RidgeSolver()), real())


@pytest.mark.usefixtures("x64")
def test_second_derivative_agrees_with_central_differences():
    model, fixed = LogisticRegression(P, C), start()

    def size(log_l2):
        at = eqx.tree_at(lambda d: d.log_l2, fixed, log_l2)
        fitted, _ = RidgeSolver()(at, model, None, key=KEY)
        return jnp.sum(fitted.model.head.weight**2)

    slope, curvature = map(jax.jit, (jax.grad(size), jax.grad(jax.grad(size))))
    steps = (fixed.log_l2 + 1e-5, fixed.log_l2 - 1e-5)
    wanted = (slope(steps[0]) - slope(steps[1])) / 2e-5
    np.testing.assert_allclose(curvature(fixed.log_l2), wanted, rtol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_relative_ridge_does_not_depend_on_the_scale_of_features(scale):
    distilled = start()
    features = lambda image: scale * image
    head = LogisticRegression(P, C).head
    model = LinearClassifier(eqx.nn.Lambda(features), head)
    fitted = eqd.fit(distilled, model, RelativeRidge()).model
    images = np.asarray(distilled.images)
    # The mean squared norm of the scaled features is the number of images.
    scaled = images * len(images) / np.linalg.norm(images)
    reference = Ridge(len(images) * 0.05, fit_intercept=False, solver="svd")
    reference.fit(scaled, np.asarray(distilled.labels))
    got = jax.vmap(fitted)(distilled.images)
    np.testing.assert_allclose(got, reference.predict(scaled), rtol=1e-8, atol=1e-8)
    if scale == 1:
        check_gradient(distilled, eqd.Bilevel(model, RelativeRidge()), real())


@pytest.mark.parametrize(
    ("model", "loss", "solver"),
    [
        (LogisticRegression(P, C), eqd.CrossEntropy(), SpanSolver()),
        (LogisticRegression(P, C), eqd.SquaredError(), RidgeSolver()),
        (Wrapped(LogisticRegression(P, C)), eqd.CrossEntropy(), eqd.ArgminSolver()),
    ],
    ids=["span", "ridge", "argmin"],
)
def test_auto_solver(model, loss, solver):
    distilled = start(soft=False, dtype=np.float32, loss=loss)
    got, wanted = (
        eqd.fit(distilled, model, inner) for inner in (eqd.AutoSolver(), solver)
    )
    assert eqx.tree_equal(got, wanted, rtol=1e-5, atol=1e-6)
