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
    indefinite, as those of a network's local minimum are.

    Solves $(H + \delta I) u = v$ with $\delta = 0$. If that leaves a relative residual
    $r = \|H u - v\| / \|v\|$ above `accept`, then $\delta$ is set to 1e-4, 1e-3, ...,
    1e-1 of the scale $\|H v\| / \|v\|$ of the Hessian, until $r$ is below `accept`.
    The $u$ with the smallest $r$ is returned, with $r$ and $\delta$ in
    `stats["residual"]` and `stats["damping"]`.

    No matrix is formed: a step costs one product of the Hessian and a vector. `rtol`
    defaults to 1e-5 in single precision, and to 1e-11 in double precision.

    !!! info

        A solver of Lineax that is called from a backward pass raises an error if it
        does not reach its tolerance. An adjoint that is good to a few percent is good
        enough for a hypergradient, so this solver raises an error only if $r$ is above
        `max_residual`.

    Source: Pedregosa, *Hyperparameter optimization with approximate gradient*, 2016,
    Algorithm 1, for solving the adjoint inexactly; Levenberg 1944 for the damping.
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
        # A cotangent that is not finite is an error of the caller, and is passed on.
        finite = jnp.isfinite(scale)
        u = jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), u)
        u = eqx.error_if(
            u,
            finite & ~(residual <= self.max_residual),
            "The hypergradient is useless: the adjoint linear solve of the inner "
            "problem stopped at a relative residual above `DampedCG.max_residual`. "
            "The inner problem is likely singular: raise its ridge `l2`, or solve it "
            "more exactly.",
        )
        stats = {"residual": residual, "damping": damping}
        return u, lx.RESULTS.successful, stats

    def transpose(self, state, options: dict[str, Any]):
        return state, options

    def conj(self, state, options: dict[str, Any]):
        return state, options

    def assume_full_rank(self):
        return True
