"""`NeumannSeries` against its closed form."""

import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqdistill as eqd
from eqdistill.adjoints import NeumannSeries

from .conftest import exact, hypergradient, subset


def solve(matrix, vector, solver):
    operator = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
    return lx.linear_solve(operator, vector, solver).value


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("terms", [1, 7])
def test_is_the_sum_of_its_terms(terms):
    basis, _ = jnp.linalg.qr(jr.normal(jr.key(0), (6, 6)))
    eigenvalues = jnp.array([0.1, 0.2, 0.4, 0.7, 1.0, 2.0])
    matrix = (basis * eigenvalues) @ basis.T
    vector = jr.normal(jr.key(1), (6,))
    got = solve(matrix, vector, NeumannSeries(terms, 0.4))
    factors = (1 - (1 - 0.4 * eigenvalues) ** terms) / eigenvalues
    wanted = basis @ (factors * (basis.T @ vector))
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    # By default the step is about one over the largest eigenvalue.
    got = solve(matrix, vector, NeumannSeries(1))
    assert 0.5 <= (got / vector)[0] < 0.6
    np.testing.assert_array_equal(solve(matrix, 0 * vector, NeumannSeries(5)), 0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_hypergradient_converges_to_the_exact_one(digits):
    train = subset(digits[0], 60)
    start = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.3, key=jr.key(0))
    model = eqd.linear.LogisticRegression(64, 10)
    gradient = lambda inner: (
        hypergradient(start, eqd.Bilevel(model, inner), train)[1].images
    )
    wanted = gradient(exact())
    errors = []
    for terms in (1, 20, 400):
        adjoint = optx.ImplicitAdjoint(NeumannSeries(terms))
        inner = eqd.ArgminSolver(exact().solver, adjoint, max_steps=100_000)
        error = np.linalg.norm(gradient(inner) - wanted)
        errors.append(error / np.linalg.norm(wanted))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-3


def test_refuses_matrices_that_are_not_symmetric():
    matrix = lx.MatrixLinearOperator(jnp.eye(3))
    with pytest.raises(ValueError, match="symmetric"):
        lx.linear_solve(matrix, jnp.ones(3), NeumannSeries(1))
