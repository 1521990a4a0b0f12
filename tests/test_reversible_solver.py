"""Exact reversal of a training run in fixed point."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import hypergradient


@pytest.fixture
def problem(small_perceptron):
    return small_perceptron


def with_momentum(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def leaves(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))


# In single precision half a word is put aside every 105 steps.
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "steps"), [("single", 400), ("double", 20)])
def test_the_derivative_is_that_of_floats(problem, precision, steps):
    with jax.enable_x64(precision == "double"):
        tree = jax.tree.map(
            lambda x: (
                x.astype(jnp.result_type(float)) if eqx.is_inexact_array(x) else x
            ),
            problem,
        )
        rate = 0.1 if precision == "double" else 0.02
        exact = eqd.ReversibleSolver(rate, momentum=0.9, steps=steps)
        plain = eqd.UnrolledSolver(with_momentum, {"learning_rate": rate}, steps)
        (loss, gradient), (wanted_loss, wanted) = (
            hypergradient(*tree, inner) for inner in (exact, plain)
        )
        rtol = 1e-10 if precision == "double" else 1e-3
        np.testing.assert_allclose(loss, wanted_loss, rtol=rtol)
        for x, y in zip(leaves(gradient), leaves(wanted), strict=True):
            assert np.linalg.norm(x - y) < rtol * np.linalg.norm(y)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_agrees_with_checkpoints_of_the_same_run(problem):
    args = {"momentum": 0.9, "steps": 20}
    rates = jnp.linspace(0.05, 0.1, 20)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(learned, solver):
        start, log_rates = learned
        inner = eqx.tree_at(lambda s: s.log_learning_rate, solver, log_rates)
        return eqd.outer_loss(start, *problem[1:], inner)[0]

    solvers = [
        eqd.ReversibleSolver(rates, adjoint=adjoint, **args)
        for adjoint in (None, eqd.RecursiveCheckpointAdjoint())
    ]
    found = [gradient((problem[0], jnp.log(rates)), solver) for solver in solvers]
    for x, y in zip(*map(leaves, found), strict=True):
        assert np.linalg.norm(x - y) < 1e-10 * np.linalg.norm(y)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.98])
def test_keeps_the_bits_that_momentum_drops(problem, momentum):
    start, network, _ = problem
    solver = eqd.ReversibleSolver(0.01, momentum=momentum, steps=4000)
    kept = float(eqd.fit(start, network, solver).stats["kept_bits"])
    least = math.log2(1 / momentum)
    assert least < kept < 1.03 * least + 48 / 4000


@pytest.mark.slow
def test_a_run_that_leaves_its_range_is_told(problem):
    start, network, _ = problem
    for rate in (100.0, 1e30):
        solver = eqd.ReversibleSolver(rate, momentum=0.9, steps=20)
        assert not eqd.fit(start, network, solver, throw=False).converged
    big = jax.tree.map(lambda x: 1e3 * x if eqx.is_inexact_array(x) else x, network)
    solver = eqd.ReversibleSolver(0.01, momentum=0.9, steps=2)
    assert not eqd.fit(start, big, solver, throw=False).converged


def test_bad_input(problem):
    start, network, _ = problem
    for args, match in (
        ({"steps": 0}, "`steps` must be at least 1; got 0"),
        ({"steps": 2, "momentum": 1.0}, "`momentum` must be from 0.01 to 0.99; got 1"),
        (
            {"steps": 2, "learning_rate": -1.0},
            r"`learning_rate` must be positive .*; got -1",
        ),
        ({"steps": 2, "learning_rate": jnp.ones(3)}, r"2 steps; got shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            eqd.ReversibleSolver(**{"learning_rate": 0.1, **args})
    # By NumPy: XLA cannot convert to half precision on all processors.
    to_half = lambda x: jnp.asarray(np.asarray(x, np.float16))
    half = jax.tree.map(lambda x: to_half(x) if eqx.is_inexact_array(x) else x, network)
    with pytest.raises(TypeError, match=r"`model` must .*; got \['float16'\]"):
        eqd.fit(start, half, eqd.ReversibleSolver(0.1, steps=2))
