from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ._error_bound import ErrorBound
from ._hypergradient import Hypergradient
from ._inner_solver import AbstractInnerSolver, Fitted
from ._span_solver import SpanSolver


class Tolerances(eqx.Module):
    """How well the inner problem and the adjoint's linear system are to be solved: the
    first to this norm of the inner loss's gradient, the second to this residual,
    relative to its right-hand side.

    The residual of the adjoint is `excess` times as large, up to some hundred, as that
    of the smaller system which is solved for it.
    """

    inner: Float[Array, ""]
    adjoint: Float[Array, ""]
    excess: Float[Array, ""]
    accuracy: float = eqx.field(static=True)

    @staticmethod
    def of(accuracy: float, learned: PyTree) -> "Tolerances":
        """To begin with: as well as can be."""
        zero = jax.device_put(np.zeros((), jnp.result_type(*jax.tree.leaves(learned))))
        return Tolerances(zero, zero, zero, accuracy)

    def apply(self, solver: AbstractInnerSolver) -> SpanSolver:
        assert isinstance(solver, SpanSolver)
        where = lambda s: (s.gtol, s.adjoint_rtol)
        return eqx.tree_at(where, solver, (self.inner, self.adjoint))

    def steer(self, bound: ErrorBound, gradient_norm: Float[Array, ""]) -> "Tolerances":
        """For what comes next: such that the two contribute as much to the bound, and
        together an eighth of what it may be, if they contribute as now."""
        each = self.accuracy * gradient_norm / 16
        finest = jnp.finfo(each.dtype).eps ** 0.75
        excess = bound.adjoint_residual / jnp.maximum(self.adjoint, finest)
        excess = jnp.maximum(jnp.maximum(excess, 0.8 * self.excess), 10)
        adjoint = each / (bound.per_adjoint_residual * excess)
        steered = Tolerances(
            inner=each / bound.per_inner_residual,
            # Of a residual that is not small, the error is not in proportion to it.
            adjoint=jnp.minimum(adjoint, 0.1),
            excess=excess,
            accuracy=self.accuracy,
        )
        # The bound may be in a wider precision than what is learned.
        steered = jax.tree.map(lambda x, old: x.astype(old.dtype), steered, self)
        return optax.tree.where(jnp.isfinite(bound.value), steered, self)


def steered(
    solve: Callable[[Tolerances], tuple[Hypergradient, Fitted]], tolerances: Tolerances
) -> tuple[Hypergradient, Fitted, Tolerances]:
    """A hypergradient within its bound, and the tolerances to begin with at the next.

    They are taken from one to the next. Where that was not enough, as the gradient has
    become far less, it is solved for again: unless rounding keeps the inner problem
    from being solved as it was to be, and what is left of it is too much by itself.
    """

    def cond_fun(carry):
        return carry[-1] & (carry[-2] < 3)

    def body_fun(carry):
        tolerances, *_, attempt, _ = carry
        here, fitted = solve(tolerances)
        norm = optax.tree.norm(here.gradient)
        bound, allowed = here.error_bound, tolerances.accuracy * norm
        of_inner = bound.per_inner_residual * fitted.gradient_norm
        is_curable = (fitted.gradient_norm <= tolerances.inner) | (of_inner <= allowed)
        is_missed = bound.value > allowed
        tolerances = tolerances.steer(bound, norm)
        return tolerances, here, fitted, attempt + 1, is_missed & is_curable

    here, fitted = optax.tree.zeros_like(jax.eval_shape(solve, tolerances))
    init = tolerances, here, fitted, jnp.array(0), jnp.array(True)
    tolerances, here, fitted, *_ = jax.lax.while_loop(cond_fun, body_fun, init)
    return here, fitted, tolerances
