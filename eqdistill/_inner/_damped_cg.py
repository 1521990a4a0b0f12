from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from .._checks import check_at_least
from .._conversions import as_float, as_float_or_none, as_int


class DampedCG(lx.AbstractLinearSolver):
    r"""Conjugate gradients for Hessians that may be nearly singular or slightly
    indefinite, as they often are at a local minimum of a network.

    Solves $(H + \delta I) u = v$ with $\delta = 0$. If the relative residual
    $r = \|H u - v\| / \|v\|$ is above `accept`, the solver tries $\delta$ = 1e-4, 1e-3,
    ..., 1 times the scale $\|H v\| / \|v\|$ of the Hessian until $r$ is below `accept`.
    It returns the $u$ with the smallest $r$, with $r$ and $\delta$ in
    `stats["residual"]` and `stats["damping"]`.

    No matrix is formed: a step costs one Hessian-vector product.

    !!! info

        A Lineax solver called from a backward pass raises an error if it misses its
        tolerance. An error of a few percent in the adjoint hardly matters for a
        hypergradient, so this solver raises an error only if $r$ is above
        `max_residual`.

    Source: Pedregosa, *Hyperparameter optimization with approximate gradient*, 2016,
    Algorithm 1, for solving the adjoint inexactly; Levenberg 1944 for the damping.

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

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        if not lx.is_symmetric(operator):
            raise ValueError("`DampedCG` may only be used for symmetric operators.")
        return lx.linearise(operator)

    def compute(self, state, vector: PyTree[Array], options: dict[str, Any]):
        del options
        norm = optax.tree.norm
        scale = norm(vector)
        is_double = jnp.finfo(scale.dtype).eps < 1e-10
        rtol = (1e-11 if is_double else 1e-5) if self.rtol is None else self.rtol
        # The adjoint of a zero cotangent is zero.
        safe_scale = jnp.where(scale > 0, scale, 1)
        hessian_scale = norm(state.mv(vector)) / safe_scale

        def solve(damping):
            def damped(u):
                return optax.tree.add_scale(state.mv(u), damping, u)

            u, _ = jax.scipy.sparse.linalg.cg(
                damped, vector, tol=rtol, maxiter=self.max_steps
            )
            residual = norm(optax.tree.sub(state.mv(u), vector)) / safe_scale
            return u, jnp.where(jnp.isfinite(residual), residual, jnp.inf)

        def keep_going(carry):
            attempt, _, residual, _ = carry
            return (residual > self.accept) & (attempt < 6)

        def body(carry):
            attempt, u, residual, damping = carry
            relative = jnp.where(attempt == 0, 0, 10.0 ** (attempt - 5))
            new_damping = (relative * hessian_scale).astype(scale.dtype)
            new_u, new_residual = solve(new_damping)
            better = new_residual < residual
            u, residual, damping = optax.tree.where(
                better, (new_u, new_residual, new_damping), (u, residual, damping)
            )
            return attempt + 1, u, residual, damping

        init = (
            jnp.array(0),
            optax.tree.zeros_like(vector),
            jnp.full_like(scale, jnp.inf),
            jnp.zeros_like(scale),
        )
        _, u, residual, damping = jax.lax.while_loop(keep_going, body, init)
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
        stats = {"residual": residual, "damping": damping}
        return u, lx.RESULTS.successful, stats

    def transpose(self, state, options: dict[str, Any]):
        return state, options

    def conj(self, state, options: dict[str, Any]):
        return state, options

    def assume_full_rank(self):
        return True
