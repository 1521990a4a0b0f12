"""The default adjoint solve, against a dense one."""

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import eqdistill as eqd


def operator(matrix):
    return lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)


def random_matrix(eigenvalues, key):
    n = len(eigenvalues)
    basis, _ = jnp.linalg.qr(jr.normal(key, (n, n)))
    return (basis * jnp.array(eigenvalues)) @ basis.T


solve = jax.jit(
    lambda matrix, vector: lx.linear_solve(
        operator(matrix), vector, eqd.DampedCG(max_residual=10.0)
    )
)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    # Among these are the singular and the slightly indefinite.
    small=st.lists(st.floats(-1e-3, 1e-3), min_size=4, max_size=4),
)
def test_says_how_well_it_solved(seed, small):
    matrix_key, vector_key = jr.split(jr.key(seed))
    matrix = random_matrix([*small, 0.1, 0.3, 1.0, 2.0], matrix_key)
    vector = jr.normal(vector_key, (8,))
    solution = solve(matrix, vector)
    residual = jnp.linalg.norm(matrix @ solution.value - vector)
    relative = residual / jnp.linalg.norm(vector)
    np.testing.assert_allclose(solution.stats["residual"], relative, atol=1e-3)
    # It is never worse than no solve at all.
    assert solution.stats["residual"] <= 1
    assert solution.stats["damping"] >= 0


def test_solves_the_well_posed():
    matrix = random_matrix(np.geomspace(1e-2, 1, 30), jr.key(0))
    vector = jr.normal(jr.key(1), (30,))
    solution = solve(matrix, vector)
    want = jnp.linalg.solve(matrix, vector)
    np.testing.assert_allclose(solution.value, want, rtol=0, atol=1e-3)
    assert solution.stats["damping"] == 0


def test_damps_the_singular():
    # The vector has a part in the null space, which no solve can reach.
    solution = solve(jnp.diag(jnp.array([0.0, 1.0, 2.0])), jnp.array([0.1, 1.0, 1.0]))
    np.testing.assert_allclose(solution.value[1:], [1.0, 0.5], rtol=0.15)
    np.testing.assert_allclose(
        solution.stats["residual"], 0.1 / np.sqrt(2.01), rtol=0.2
    )


def test_zero_and_unusable():
    matrix = jnp.diag(jnp.array([0.0, 1.0]))
    zero = solve(matrix, jnp.zeros(2))
    assert jnp.array_equal(zero.value, jnp.zeros(2))
    with pytest.raises(RuntimeError, match="hypergradient is useless"):
        lx.linear_solve(operator(matrix), jnp.array([1.0, 0.0]), eqd.DampedCG())
    with pytest.raises(ValueError, match="symmetric"):
        lx.linear_solve(lx.MatrixLinearOperator(matrix), jnp.ones(2), eqd.DampedCG())
