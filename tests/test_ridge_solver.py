"""Squared error: its targets and temperature, and ridge regression in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import eqdistill as eqd

from .conftest import ADAM, check_gradient, OneStep


P, C = 6, 3


def real(dtype=np.float64):
    rng = np.random.default_rng(1)
    images = rng.normal(size=(20, P)).astype(dtype)
    return eqd.Dataset(images, np.arange(20) % C, C)


def start(n=4, soft=True, dtype=np.float64, **kwargs):
    rng = np.random.default_rng(0)
    images, targets = rng.normal(size=(n, P)), rng.normal(size=(n, C))
    labels = targets.astype(dtype) if soft else np.arange(n) % C
    args = {"l2": 0.05, "loss": eqd.SquaredError()} | kwargs
    return eqd.DistilledSet(images.astype(dtype), labels, **args)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [4, 15], ids=["fewer than pixels", "more than pixels"])
@pytest.mark.parametrize("use_intercept", [False, True])
def test_agrees_with_scikit_learn(n, use_intercept):
    model = eqd.LogisticRegression(P, C, use_intercept=use_intercept)
    for soft in (True, False):
        distilled = start(n, soft)
        # A class index stands for its one-hot vector, centred.
        targets = distilled.labels if soft else np.eye(C)[distilled.labels] - 1 / C
        for l2 in (1.0, 1e-6):
            distilled = start(n, soft, l2=l2)
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
    # In the images, the targets, the ridge and the temperature.
    model = eqd.LogisticRegression(P, C, use_intercept=n == 15)
    check_gradient(start(n), model, real(), eqd.RidgeSolver())


@pytest.mark.usefixtures("x64")
def test_may_be_differentiated_twice():
    model = eqd.LogisticRegression(P, C)
    fixed = start()

    def size(log_l2):
        at = eqx.tree_at(lambda d: d.log_l2, fixed, log_l2)
        fitted, _ = eqd.RidgeSolver()(at, model, None, key=None)
        return jnp.sum(fitted.model.head.weight**2)

    slope, curvature = map(jax.jit, (jax.grad(size), jax.grad(jax.grad(size))))
    steps = (fixed.log_l2 + 1e-5, fixed.log_l2 - 1e-5)
    want = (slope(steps[0]) - slope(steps[1])) / 2e-5
    np.testing.assert_allclose(curvature(fixed.log_l2), want, rtol=1e-7)


def test_the_temperature_is_learned():
    # It is far too low to begin with: the fit is too sure of itself.
    cold = start(soft=False, dtype=np.float32, loss=eqd.SquaredError(0.01))
    model = eqd.LogisticRegression(P, C)
    args = {"optimiser": ADAM, "steps": 15, "learn": (True, False)}
    result = eqd.distill(cold, model, real(np.float32), **args)
    assert result.learned == ("images", "log_l2", "loss.log_temperature")
    loss = result.distilled.loss
    assert isinstance(loss, eqd.SquaredError)
    assert loss.temperature > 0.012
    assert result.history.loss[-1] < 0.9 * result.history.loss[0]


@pytest.mark.parametrize("kind", ["linear", "network"])
def test_outputs_are_read_as_logits_at_the_temperature(kind):
    distilled = start(dtype=np.float32, loss=eqd.SquaredError(0.5))
    model = eqd.LogisticRegression(P, C, use_intercept=True)
    inner = eqd.AutoSolver()
    if kind == "network":
        model, inner = Wrapped(model), OneStep(0.1)
    evaluation = eqd.evaluate(distilled, model, real(np.float32), inner)
    fitted = evaluation.fitted.model
    head = (fitted if kind == "linear" else fitted.model).head
    images, labels = (np.asarray(x) for x in (real().images, real().labels))
    logits = (images @ np.asarray(head.weight).T + np.asarray(head.bias)) / 0.5
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    want = -np.mean(log_p[np.arange(20), labels])
    np.testing.assert_allclose(evaluation.loss, want, rtol=1e-5)
    right = np.mean(np.argmax(logits, axis=1) == labels)
    np.testing.assert_allclose(evaluation.accuracy, right, rtol=1e-6)
    if kind == "network":
        return
    for data in (real(np.float32), eqd.FullBatch(real(np.float32), model)):
        loss, _ = eqx.filter_jit(eqd.outer_loss)(distilled, model, data)
        np.testing.assert_allclose(loss, want, rtol=1e-5)


class Wrapped(eqx.Module):
    """Hides that the model is linear."""

    model: eqd.LinearClassifier

    def __call__(self, image):
        return self.model(image)


def test_inner_loss():
    distilled = start(l2=0.3, dtype=np.float32)
    head = np.random.default_rng(2).normal(size=(C, P)).astype(np.float32)
    model = eqd.LogisticRegression(P, C)
    model = eqx.tree_at(lambda c: c.head.weight, model, jnp.asarray(head))
    errors = np.asarray(distilled.images) @ head.T - np.asarray(distilled.labels)
    want = np.sum(errors**2) / (2 * 4) + 0.3 / 2 * np.sum(head**2)
    got = eqx.filter_jit(eqd.inner_loss)(distilled, model)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_refuses_what_it_does_not_solve():
    linear = eqd.LogisticRegression(P, C)
    match = r"`distilled` must have `SquaredError` as its loss.*got `CrossEntropy`"
    with pytest.raises(TypeError, match=match):
        eqd.fit(start(loss=eqd.CrossEntropy()), linear, eqd.RidgeSolver())
    match = r"must be a `LinearClassifier`.*for `RidgeSolver`; got a Wrapped"
    with pytest.raises(TypeError, match=match):
        eqd.fit(start(), Wrapped(linear), eqd.RidgeSolver())


@pytest.mark.parametrize(
    ("model", "loss", "solver"),
    [
        (eqd.LogisticRegression(P, C), eqd.CrossEntropy(), eqd.SpanSolver()),
        (eqd.LogisticRegression(P, C), eqd.SquaredError(), eqd.RidgeSolver()),
        (Wrapped(eqd.LogisticRegression(P, C)), eqd.CrossEntropy(), eqd.ArgminSolver()),
    ],
    ids=["span", "ridge", "argmin"],
)
def test_the_solver_that_is_chosen(model, loss, solver):
    distilled = start(soft=False, dtype=np.float32, loss=loss)
    got, want = (
        eqd.fit(distilled, model, inner) for inner in (eqd.AutoSolver(), solver)
    )
    assert eqx.tree_equal(got, want, rtol=1e-5, atol=1e-6)
