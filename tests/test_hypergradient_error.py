"""How accurate a hypergradient is: the measured error, and the bound on it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import eqdistill as eqd
from eqdistill.linear import hypergradient_error, LogisticRegression, SpanSolver

from .conftest import OneStep


C, P = 4, 9


def data(dtype=np.float64):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 3, 3)).astype(dtype)
    return eqd.Dataset(images, np.arange(40) % C, C)


def soft_start(seed=0, scale=0.3, l2=0.1, dtype=np.float64, loss=eqd.CrossEntropy()):
    rng = np.random.default_rng(seed)
    images = (scale * rng.normal(size=(7, 3, 3))).astype(dtype)
    labels = (3 * rng.normal(size=(7, C))).astype(dtype)
    return eqd.DistilledSet(images, labels, l2=l2, loss=loss)


class Perturbed(eqd.AbstractInnerSolver[None]):
    """Exact, except for an error of the solution and one of its derivative."""

    solution: jax.Array
    derivative: jax.Array

    def __init__(self, solution, derivative=0.0):
        self.solution, self.derivative = jnp.array(solution), jnp.array(derivative)

    def init(self, distilled, model, *, key):
        return None

    def __call__(self, distilled, model, state, *, key):
        wrong = lambda x: x + self.derivative * (x - jax.lax.stop_gradient(x))
        distilled = jax.tree.map(wrong, distilled)
        inner = SpanSolver()
        warm = inner.init(distilled, model, key=key)
        fitted, _ = inner(distilled, model, warm, key=key)
        where = lambda f: f.model.head.weight
        noise = self.solution * jr.normal(jr.key(7), where(fitted).shape)
        return eqx.tree_at(where, fitted, replace_fn=lambda w: w + noise), state


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    log_scale=st.floats(-2, 1),
    log_l2=st.floats(-4, 1),
    log_error=st.floats(-9, 0),
    derivative=st.sampled_from([0.0, 0.0, 1e-3]),
)
def test_is_a_bound(seed, log_scale, log_l2, log_error, derivative):
    with jax.enable_x64(True):
        start = soft_start(seed, 10**log_scale, 10**log_l2)
        args = start, LogisticRegression(P, C), data()
        inner = Perturbed(10**log_error, derivative)
        found = hypergradient_error(*args, inner, reference=SpanSolver())
        # The reference is exact to rounding.
        of_reference = hypergradient_error(*args, SpanSolver())
    assert of_reference.error == 0
    assert found.error <= found.bound + of_reference.bound
    assert derivative == 0 or found.error > 1e-4 * of_reference.norm


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_is_proportional_to_the_error_of_the_fit():
    args = soft_start(), LogisticRegression(P, C), data()
    exact = hypergradient_error(*args)
    assert exact.bound < 1e-8 * exact.norm
    assert exact.inner_residual < 1e-12
    small, large = (
        hypergradient_error(*args, Perturbed(e), reference=SpanSolver())
        for e in (1e-8, 1e-6)
    )
    np.testing.assert_allclose(large.error / small.error, 100, rtol=0.1)
    np.testing.assert_allclose(large.bound / small.bound, 100, rtol=0.1)


@pytest.mark.slow
def test_single_precision_is_measured_in_double():
    start, real = soft_start(dtype=np.float32), data(np.float32)
    found = hypergradient_error(start, LogisticRegression(P, C), real)
    assert 0 < found.error < 1e-4 * found.norm
    assert found.error <= found.bound
    assert jnp.result_type(float) == jnp.float32


@pytest.mark.parametrize("case", ["intercept", "squared error", "other features"])
def test_no_bound_is_known(case):
    model = LogisticRegression(P, C, use_intercept=case == "intercept")
    if case == "other features":
        model = eqd.linear.LinearClassifier(jnp.ravel, model.head)
    loss = eqd.SquaredError() if case == "squared error" else eqd.CrossEntropy()
    start = soft_start(dtype=np.float32, loss=loss)
    found = hypergradient_error(start, model, data(np.float32), OneStep())
    assert np.isinf(found.bound)
    assert 0 < found.error < 1e-4 * found.norm


def test_what_cannot_be_measured_is_refused():
    start, model, real = soft_start(dtype=np.float32), LogisticRegression(P, C), data()
    reference = SpanSolver(max_steps=1)
    with pytest.raises(ValueError, match="`reference` must fit the model"):
        hypergradient_error(start, model, real, OneStep(), reference=reference)
    source = eqd.Fresh(lambda *, key: model)
    with pytest.raises(TypeError, match="`model` must be one model; got a Fresh"):
        hypergradient_error(start, source, real)
