"""The inner problem, solved only as well as the bound on the hypergradient's error
asks for."""

import jax
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import MLP, subset


# More unknowns than are solved for by their matrix.
N = 50


@pytest.fixture(scope="module")
def train(digits):
    with jax.enable_x64(True):
        images = np.asarray(digits[0].images[:300]) / 255.0
        yield eqd.Dataset(images, digits[0].labels[:300], 10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["noise", "real"])
@pytest.mark.parametrize("accuracy", [0.5, 0.01])
def test_keeps_the_bound(train, kind, accuracy):
    # Steps that make the gradient small at once, and steps that do so little by little.
    lbfgs = optax.lbfgs(learning_rate=1.0, linesearch=None)
    if kind == "noise":
        make, optimiser = eqd.DistilledSet.from_noise, eqd.whitened(lbfgs, train)
    else:
        make, optimiser = eqd.DistilledSet.from_real, optax.adam(0.02)
    classifier = eqd.LogisticRegression(64, 10)
    for l2 in (0.1, 0.001):
        start = make(train, N, l2=l2, key=jr.key(0))
        steered, exact = (
            eqd.distill(
                start, classifier, train, optimiser=optimiser, steps=20, accuracy=a
            ).history
            for a in (accuracy, None)
        )
        assert (steered.error_bound <= accuracy * steered.gradient_norm).all()
        # It is not for being exact that it does.
        for name in ("inner_residual", "adjoint_residual", "error_bound"):
            assert (getattr(steered, name) / getattr(exact, name)).max() > 10
        np.testing.assert_allclose(steered.loss[:5], exact.loss[:5], rtol=0.01)


@pytest.mark.usefixtures("x64")
def test_several_starts(train):
    keys = jr.split(jr.key(0), 2)
    starts = [eqd.DistilledSet.from_noise(train, N, key=key) for key in keys]
    classifier = eqd.LogisticRegression(64, 10)
    args = {"inner": eqd.SpanSolver(), "steps": 6, "accuracy": 0.1}
    each = eqd.distill_each(starts, classifier, train, **args)
    for start, result in zip(starts, each, strict=True):
        want = eqd.distill(start, classifier, train, **args).history
        got = result.history
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-4)
        assert (got.error_bound <= 0.1 * got.gradient_norm).all()


@pytest.mark.usefixtures("x64")
def test_line_search(train):
    # It keeps the gradient where it ended, but not the adjoint.
    start = eqd.DistilledSet.from_noise(train, N, key=jr.key(0))
    classifier = eqd.LogisticRegression(64, 10)
    args = {"optimiser": optax.lbfgs(), "steps": 15}
    steered = eqd.distill(start, classifier, train, **args, accuracy=0.1).history
    assert (steered.error_bound <= 0.1 * steered.gradient_norm).all()
    exact = eqd.distill(start, classifier, train, **args).history
    np.testing.assert_allclose(steered.loss, exact.loss, rtol=1e-3)


@pytest.mark.usefixtures("x64")
def test_mixed_precision(train):
    single = jax.tree.map(
        lambda x: x.astype(np.float32) if x.dtype == np.float64 else x,
        eqd.DistilledSet.from_noise(train, N, key=jr.key(0)),
    )
    for dtype in (np.float32, np.float64):
        classifier = eqd.LogisticRegression(64, 10, dtype=dtype)
        history = eqd.distill(single, classifier, train, steps=3, accuracy=0.1).history
        assert (history.error_bound <= 0.1 * history.gradient_norm).all()


def test_bad_input(digits):
    train = subset(digits[0], 50)
    start = eqd.DistilledSet.from_noise(train, key=jr.key(0))
    linear = eqd.LogisticRegression(64, 10)
    for accuracy in (0.0, 1.0, float("nan")):
        match = f"`accuracy` must be between 0 and 1; got {accuracy}"
        with pytest.raises(ValueError, match=match):
            eqd.distill(start, linear, train, accuracy=accuracy)
    with_intercept = eqd.LogisticRegression(64, 10, use_intercept=True)
    for classifier, inner, got in (
        (MLP(64, 4, jax.nn.softplus, key=jr.key(1)), eqd.AutoSolver(), "a MLP"),
        (with_intercept, eqd.AutoSolver(), "one with an intercept"),
        (linear, eqd.ArgminSolver(), "`inner` of type ArgminSolver"),
    ):
        with pytest.raises(ValueError, match=f"`accuracy` needs a bound.*got {got}"):
            eqd.distill(start, classifier, train, inner=inner, accuracy=0.1)
