"""`DampedCG` against a dense solve."""

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from eqdistill.adjoints import DampedCG


def operator(matrix):
    return lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)


def random_matrix(eigenvalues, key):
    n = len(eigenvalues)
    basis, _ = jnp.linalg.qr(jr.normal(key, (n, n)))
    return (basis * jnp.array(eigenvalues)) @ basis.T


solve = jax.jit(
    lambda matrix, vector: lx.linear_solve(
        operator(matrix), vector, DampedCG(max_residual=10.0)
    )
)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    # Also for singular and slightly indefinite matrices.
    small=st.lists(st.floats(-1e-3, 1e-3), min_size=4, max_size=4),
)
def test_reports_its_residual(seed, small):
    matrix_key, vector_key = jr.split(jr.key(seed))
    matrix = random_matrix([*small, 0.1, 0.3, 1.0, 2.0], matrix_key)
    vector = jr.normal(vector_key, (8,))
    solution = solve(matrix, vector)
    residual = jnp.linalg.norm(matrix @ solution.value - vector)
    relative = residual / jnp.linalg.norm(vector)
    np.testing.assert_allclose(solution.stats["residual"], relative, atol=1e-3)
    # Never worse than returning zero.
    assert solution.stats["residual"] <= 1
    assert solution.stats["damping"] >= 0


def test_well_conditioned_systems_are_not_damped():
    matrix = random_matrix(np.geomspace(1e-2, 1, 30), jr.key(0))
    vector = jr.normal(jr.key(1), (30,))
    solution = solve(matrix, vector)
    wanted = jnp.linalg.solve(matrix, vector)
    np.testing.assert_allclose(solution.value, wanted, rtol=0, atol=1e-3)
    assert solution.stats["damping"] == 0


def test_singular_systems_are_damped():
    # No solution can reach the part of the vector in the null space.
    solution = solve(jnp.diag(jnp.array([0.0, 1.0, 2.0])), jnp.array([0.1, 1.0, 1.0]))
    np.testing.assert_allclose(solution.value[1:], [1.0, 0.5], rtol=0.15)
    wanted = 0.1 / np.sqrt(2.01)
    np.testing.assert_allclose(solution.stats["residual"], wanted, rtol=0.2)


def test_zero_and_unusable():
    matrix = jnp.diag(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(solve(matrix, jnp.zeros(2)).value, 0)
    with pytest.raises(RuntimeError, match="hypergradient is useless"):
        lx.linear_solve(operator(matrix), jnp.array([1.0, 0.0]), DampedCG())
    with pytest.raises(ValueError, match="symmetric"):
        lx.linear_solve(lx.MatrixLinearOperator(matrix), jnp.ones(2), DampedCG())
