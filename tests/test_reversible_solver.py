"""`ReversibleSolver` against the same run in floats."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd
from eqdistill.adjoints import ReversibleSolver

from .conftest import hypergradient


@pytest.fixture
def problem(small_perceptron):
    return small_perceptron


def with_momentum(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def assert_close(got, wanted, rtol):
    leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    for x, y in zip(leaves(got), leaves(wanted), strict=True):
        assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y)


# In float32, half a word is stored every 105 steps.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_double", "rate", "steps", "rtol"),
    [(False, 0.02, 400, 1e-3), (True, 0.1, 20, 1e-10)],
)
def test_derivative_agrees_with_floats(problem, is_double, rate, steps, rtol):
    with jax.enable_x64(is_double):
        dtype = jnp.result_type(float)
        start, network, train = jax.tree.map(
            lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, problem
        )
        exact = ReversibleSolver(rate, momentum=0.9, steps=steps)
        plain = eqd.UnrolledSolver(with_momentum, {"learning_rate": rate}, steps)
        got, wanted = (
            hypergradient(start, eqd.Bilevel(network, inner), train)
            for inner in (exact, plain)
        )
        assert_close(got, wanted, rtol)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivative_in_rates_agrees_with_floats(problem):
    start, network, _ = problem
    rates = jnp.linspace(0.05, 0.1, 20)
    # `optax.sgd` multiplies the velocity, not the gradient, by the step size.
    velocity_first = lambda rate: optax.chain(
        optax.scale_by_learning_rate(lambda step: rate[step]), optax.trace(0.9)
    )

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(learned, solver, where):
        distilled, log_rates = learned
        inner = eqx.tree_at(where, solver, log_rates)
        fitted, _ = inner(distilled, network, None, key=jr.key(0))
        return jnp.mean(jax.vmap(fitted.model)(start.images) ** 2)

    exact = ReversibleSolver(rates, momentum=0.9, steps=20)
    plain = eqd.UnrolledSolver(velocity_first, {"rate": rates}, 20)
    learned = start, jnp.log(rates)
    got = gradient(learned, exact, lambda s: s.log_learning_rate)
    wanted = gradient(learned, plain, lambda s: s.log_hyperparameters["rate"])
    assert_close(got, wanted, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.98])
def test_number_of_stored_bits(problem, momentum):
    start, network, _ = problem
    solver = ReversibleSolver(0.01, momentum=momentum, steps=4000)
    kept = float(eqd.fit(start, network, solver).stats["kept_bits"])
    least = math.log2(1 / momentum)
    assert least < kept < 1.03 * least + 48 / 4000


@pytest.mark.slow
def test_a_run_out_of_range_does_not_converge(problem):
    start, network, _ = problem
    for rate in (100.0, 1e30):
        solver = ReversibleSolver(rate, momentum=0.9, steps=20)
        assert not eqd.fit(start, network, solver, throw=False).converged
    big = jax.tree.map(lambda x: 1e3 * x if eqx.is_inexact_array(x) else x, network)
    solver = ReversibleSolver(0.01, momentum=0.9, steps=2)
    assert not eqd.fit(start, big, solver, throw=False).converged


def test_bad_input(problem):
    start, network, _ = problem
    with pytest.raises(ValueError, match=r"2 steps; got shape \(3,\)"):
        ReversibleSolver(jnp.ones(3), steps=2)
    # By NumPy: XLA cannot convert to half precision on all processors.
    to_half = lambda x: jnp.asarray(np.asarray(x, np.float16))
    half = jax.tree.map(lambda x: to_half(x) if eqx.is_inexact_array(x) else x, network)
    with pytest.raises(TypeError, match=r"`model` must .*; got \['float16'\]"):
        eqd.fit(start, half, ReversibleSolver(0.1, steps=2))
