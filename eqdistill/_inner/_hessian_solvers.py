"""Lineax solvers for the adjoint systems of implicit differentiation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import lineax as lx
import optax

from .._checks import check_at_least, check_positive
from .._conversions import as_float, as_float_or_none, as_int


class _AbstractHessianSolver(lx.AbstractLinearSolver):
    """Solves with Hessian-vector products only: no matrix is formed."""

    def init(self, operator, options):
        if not lx.is_symmetric(operator):
            name = type(self).__name__
            raise ValueError(f"`{name}` may only be used for symmetric operators.")
        return lx.linearise(operator)

    def transpose(self, state, options):
        return state, options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True


class DampedCG(_AbstractHessianSolver):
    r"""Conjugate gradients for Hessians that may be nearly singular or slightly
    indefinite, as they often are at a local minimum of a network.

    Solves $(H + \delta I) u = v$ with $\delta = 0$. If the relative residual
    $r = \|H u - v\| / \|v\|$ is above `accept`, the solver tries $\delta$ = 1e-4, 1e-3,
    ..., 1 times the scale $\|H v\| / \|v\|$ of the Hessian until $r$ is below `accept`.
    It returns the $u$ with the smallest $r$, and reports $r$ and $\delta$ in
    `stats["residual"]` and `stats["damping"]`. A step costs one Hessian-vector product.

    A Lineax solver called from a backward pass raises an error if it misses its
    tolerance. An error of a few percent in the adjoint hardly matters for a
    hypergradient, so this solver raises an error only if $r$ is above `max_residual`.

    Source: Pedregosa, *Hyperparameter optimization with approximate gradient*, 2016,
    Algorithm 1, for inexact adjoint solves; Levenberg 1944 for the damping.

    **Attributes:**

    - `rtol`: the relative tolerance of conjugate gradients. Defaults to 1e-5 in float32
        and 1e-11 in float64.
    - `accept`: the relative residual below which no more damping is tried.
    - `max_residual`: the relative residual above which an error is raised.
    - `max_steps`: the maximum number of steps for each damping.
    """

    rtol: float | None = eqx.field(default=None, converter=as_float_or_none)
    accept: float = eqx.field(default=1e-2, converter=as_float)
    max_residual: float = eqx.field(default=0.9, converter=as_float)
    max_steps: int = eqx.field(default=500, converter=as_int)

    def __check_init__(self):
        check_at_least(0, rtol=self.rtol, accept=self.accept)
        check_at_least(0, max_residual=self.max_residual)
        check_at_least(1, max_steps=self.max_steps)

    def compute(self, state, vector, options):
        norm = optax.tree.norm
        scale = norm(vector)
        is_double = jnp.finfo(scale.dtype).eps < 1e-10
        rtol = (1e-11 if is_double else 1e-5) if self.rtol is None else self.rtol
        # The adjoint of a zero cotangent is zero.
        safe_scale = jnp.where(scale > 0, scale, 1)
        hessian_scale = norm(state.mv(vector)) / safe_scale

        def keep_going(carry):
            attempt, (_, residual, _) = carry
            return (residual > self.accept) & (attempt < 6)

        def body(carry):
            attempt, best = carry
            relative = jnp.where(attempt == 0, 0, 10.0 ** (attempt - 5))
            damping = (relative * hessian_scale).astype(scale.dtype)
            u, _ = jax.scipy.sparse.linalg.cg(
                lambda u: optax.tree.add_scale(state.mv(u), damping, u),
                vector,
                tol=rtol,
                maxiter=self.max_steps,
            )
            residual = norm(optax.tree.sub(state.mv(u), vector)) / safe_scale
            # NaN is never better.
            best = optax.tree.where(residual < best[1], (u, residual, damping), best)
            return attempt + 1, best

        zero = optax.tree.zeros_like(vector)
        worst = (zero, jnp.full_like(scale, jnp.inf), jnp.zeros_like(scale))
        _, best = jax.lax.while_loop(keep_going, body, (jnp.array(0), worst))
        u, residual, damping = best
        # A non-finite cotangent is not this solver's error: return NaN.
        finite = jnp.isfinite(scale)
        u = jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), u)
        u = eqx.error_if(
            u,
            finite & ~(residual <= self.max_residual),
            "The hypergradient is useless: the adjoint solve ended with a relative "
            "residual above `DampedCG.max_residual`. The inner problem is probably "
            "singular. Raise the ridge `l2`, or solve the inner problem "
            "more accurately.",
        )
        return u, lx.RESULTS.successful, {"residual": residual, "damping": damping}


class NeumannSeries(_AbstractHessianSolver):
    r"""Approximates the solution of a linear system by the first terms of the Neumann
    series. Used as the adjoint of [`eqdistill.ArgminSolver`][]:
    `ArgminSolver(adjoint=optimistix.ImplicitAdjoint(NeumannSeries(10)))`. For
    $H u = v$ it returns

    $$u = \alpha \sum_{k=0}^{K-1} (I - \alpha H)^k v.$$

    One term replaces the inverse Hessian with a multiple of the identity. Each further
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

    def compute(self, state, vector, options):
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


def _largest_eigenvalue(mv, vector):
    """A lower bound on the largest absolute eigenvalue, by ten steps of the power
    method. A value within a factor of two is enough."""

    def body(_, carry):
        vector, norm = carry
        # The adjoint of a zero cotangent is zero.
        vector = mv(optax.tree.scale(1 / jnp.where(norm > 0, norm, 1), vector))
        return vector, optax.tree.norm(vector)

    _, norm = jax.lax.fori_loop(0, 10, body, (vector, optax.tree.norm(vector)))
    return jnp.where(norm > 0, norm, 1)
