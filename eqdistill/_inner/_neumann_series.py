from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from .._checks import check_at_least, check_positive
from .._conversions import as_float_or_none, as_int


# Steps of the power method. An eigenvalue within a factor of two is enough.
_POWER_STEPS = 10


class NeumannSeries(lx.AbstractLinearSolver):
    r"""Approximates the solution of a linear system by the first terms of the Neumann
    series. Used as the adjoint of [`eqdistill.ArgminSolver`][]:
    `ArgminSolver(adjoint=optimistix.ImplicitAdjoint(NeumannSeries(10)))`. For
    $H u = v$ it returns

    $$u = \alpha \sum_{k=0}^{K-1} (I - \alpha H)^k v.$$

    One term replaces the inverse Hessian by a multiple of the identity. Each further
    term costs one Hessian-vector product. For a positive definite $H$ the series
    converges if $\alpha$ is less than two over the largest eigenvalue. With the
    smallest eigenvalue $\mu$ its error decreases as $(1 - \alpha \mu)^K$, which equals
    the error of backpropagating only through the last $K$ steps of gradient descent
    with step size $\alpha$.

    Source: Lorraine, Vicol and Duvenaud, *Optimizing millions of hyperparameters by
    implicit differentiation*, 2020, Algorithm 3; Luketina et al., *Scalable
    gradient-based tuning of continuous regularization hyperparameters*, 2016, for one
    term.

    **Attributes:**

    - `terms`: the number of terms $K$.
    - `step_size`: the factor $\alpha$, or `None` for one over the largest eigenvalue,
        estimated by ten steps of the power method.
    """

    terms: int = eqx.field(converter=as_int)
    step_size: float | None = eqx.field(default=None, converter=as_float_or_none)

    def __check_init__(self):
        check_at_least(1, terms=self.terms)
        check_positive(step_size=self.step_size)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        if not lx.is_symmetric(operator):
            raise ValueError(
                "`NeumannSeries` may only be used for symmetric operators."
            )
        return lx.linearise(operator)

    def compute(self, state, vector: PyTree[Array], options: dict[str, Any]):
        del options
        alpha = self.step_size
        if alpha is None:
            alpha = 1 / _largest_eigenvalue(state.mv, vector)

        def body(_, carry):
            term, total = carry
            term = optax.tree.add_scale(term, -alpha, state.mv(term))
            return term, optax.tree.add(total, term)

        first = optax.tree.scale(alpha, vector)
        _, total = jax.lax.fori_loop(1, self.terms, body, (first, first))
        return total, lx.RESULTS.successful, {}

    def transpose(self, state, options: dict[str, Any]):
        return state, options

    def conj(self, state, options: dict[str, Any]):
        return state, options

    def assume_full_rank(self):
        return True


def _largest_eigenvalue(mv, vector):
    """A lower bound on the largest absolute eigenvalue, by the power method."""

    def body(_, carry):
        vector, _ = carry
        norm = optax.tree.norm(vector)
        # The adjoint of a zero cotangent is zero.
        vector = optax.tree.scale(1 / jnp.where(norm > 0, norm, 1), vector)
        product = mv(vector)
        return product, optax.tree.norm(product)

    one = jnp.ones_like(optax.tree.norm(vector))
    _, norm = jax.lax.fori_loop(0, _POWER_STEPS, body, (vector, one))
    return jnp.where(norm > 0, norm, 1)
