"""The bound on the error of a hypergradient, against the exact one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import pytest
from hypothesis import given, settings, strategies as st

import eqdistill as eqd

from .conftest import MLP, subset


ALL = optax.sgd(1.0)


@pytest.fixture(scope="module")
def train(digits):
    with jax.enable_x64(True):
        images = np.asarray(digits[0].images[:150]) / 255.0
        yield eqd.Dataset(images, digits[0].labels[:150], 10)


def soft_start(train, seed, scale, l2):
    images_key, labels_key = jr.split(jr.key(seed))
    hard = eqd.DistilledSet.from_noise(train, 7, scale=scale, key=images_key)
    return eqd.DistilledSet(hard.images, 3 * jr.normal(labels_key, (7, 10)), l2=l2)


class Perturbed(eqd.AbstractInnerSolver):
    """Exact, but for an error of the solution, and one of its derivative."""

    solution: jax.Array
    derivative: jax.Array

    def __call__(self, classifier, distilled, tilt=None):
        wrong = lambda x, by: x + by * (x - jax.lax.stop_gradient(x))
        distilled = jax.tree.map(lambda x: wrong(x, self.derivative), distilled)
        fitted = eqd.SpanSolver()(classifier, distilled, tilt)
        weights = fitted.classifier.weights
        noise = jr.normal(jr.key(7), weights.shape)
        return eqx.tree_at(
            lambda f: f.classifier.weights, fitted, weights + self.solution * noise
        )


def gradient_and_bound(start, train, inner):
    """By one step of gradient descent, of length one."""
    classifier = eqd.LogisticRegression(64, 10)
    learn = jax.tree.map(lambda _: True, start)
    result = eqd.distill(
        start, classifier, train, inner=inner, optimiser=ALL, learn=learn, steps=1
    )
    gradient = jax.tree.map(jnp.subtract, start, result.distilled)
    return gradient, result.history


@pytest.mark.usefixtures("x64")
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    log_scale=st.floats(-2, 1),
    log_l2=st.floats(-4, 1),
    log_error=st.floats(-9, 0),
    derivative=st.sampled_from([0.0, 0.0, 1e-3]),
)
def test_is_a_bound(train, seed, log_scale, log_l2, log_error, derivative):
    with jax.enable_x64(True):
        start = soft_start(train, seed, 10**log_scale, 10**log_l2)
        exact, history = gradient_and_bound(start, train, eqd.SpanSolver())
        inner = Perturbed(jnp.array(10**log_error), jnp.array(derivative))
        got, rough = gradient_and_bound(start, train, inner)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, got, exact))
    # The reference itself is exact but for rounding.
    assert error <= rough.error_bound[0] + history.error_bound[0]
    assert derivative == 0 or error > 1e-4 * optax.tree.norm(exact)


@pytest.mark.usefixtures("x64")
def test_is_small_where_all_is_solved_well(train):
    start = soft_start(train, 0, 0.3, 0.1)
    exact, history = gradient_and_bound(start, train, eqd.SpanSolver())
    assert history.adjoint_residual[0] < 1e-12
    assert history.error_bound[0] < 1e-8 * optax.tree.norm(exact)
    # In proportion to the error of the solution, as long as that is small.
    bounds = [
        gradient_and_bound(start, train, Perturbed(jnp.array(e), jnp.array(0.0)))[1]
        for e in (1e-8, 1e-6)
    ]
    ratio = bounds[1].error_bound[0] / bounds[0].error_bound[0]
    np.testing.assert_allclose(ratio, 100, rtol=0.1)


@pytest.mark.usefixtures("x64")
def test_measures_the_adjoint(train):
    start = soft_start(train, 0, 0.3, 0.1)
    for rtol in (1e-2, 1e-6):
        adjoint = optx.ImplicitAdjoint(eqd.DampedCG(rtol=rtol))
        inner = eqd.ArgminSolver(
            optx.LBFGS(rtol=1e-9, atol=1e-9), adjoint, max_steps=10_000
        )
        _, history = gradient_and_bound(start, train, inner)
        assert 0 < history.adjoint_residual[0] <= rtol


def test_is_in_the_history(digits):
    train = subset(digits[0], 300)
    start = eqd.DistilledSet.from_noise(train, key=jr.key(0))
    history = eqd.distill(start, eqd.LogisticRegression(64, 10), train, steps=5).history
    assert len(history.error_bound) == 5
    assert (history.error_bound < 0.01 * history.gradient_norm).all()
    # None is known for these.
    for classifier in (
        eqd.LogisticRegression(64, 10, use_intercept=True),
        MLP(64, 4, jax.nn.softplus, key=jr.key(1)),
    ):
        history = eqd.distill(start, classifier, train, steps=2).history
        assert np.isinf(history.error_bound).all()
        assert (history.adjoint_residual < 0.01).all()
