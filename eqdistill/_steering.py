import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ._error_bound import ErrorBound
from ._inner_solver import AbstractInnerSolver
from ._span_solver import SpanSolver


class Tolerances(eqx.Module):
    """How well the inner problem and the adjoint's linear system are to be solved: the
    first to this norm of the inner loss's gradient, the second to this residual,
    relative to its right-hand side."""

    inner: Float[Array, ""]
    adjoint: Float[Array, ""]
    accuracy: float = eqx.field(static=True)

    @staticmethod
    def of(accuracy: float, learned: PyTree) -> "Tolerances":
        """To begin with: as well as can be."""
        zero = jax.device_put(np.zeros((), jnp.result_type(*jax.tree.leaves(learned))))
        return Tolerances(zero, zero, accuracy)

    def apply(self, solver: AbstractInnerSolver) -> SpanSolver:
        assert isinstance(solver, SpanSolver)
        where = lambda s: (s.gtol, s.adjoint_rtol)
        return eqx.tree_at(where, solver, (self.inner, self.adjoint))

    def steer(self, bound: ErrorBound, gradient_norm: Float[Array, ""]) -> "Tolerances":
        """For the next step: such that the two contribute as much to the bound, and
        together a tenth of what it may be, as the gradient may be less by then.

        What an inner residual contributes is much the same from one step to the next,
        and so is by how much the residual of the adjoint differs from that of the
        smaller system which is solved for it.
        """
        each = self.accuracy * gradient_norm / 20
        finest = jnp.finfo(each.dtype).eps ** 0.75
        factor = each / (bound.per_adjoint_residual * bound.adjoint_residual)
        adjoint = jnp.maximum(self.adjoint, finest) * jnp.clip(factor, 0.01, 10)
        known = jnp.isfinite(bound.value)
        return Tolerances(
            inner=jnp.where(known, each / bound.per_inner_residual, self.inner),
            # Of a residual that is not small, the error is not in proportion to it.
            adjoint=jnp.where(known, jnp.minimum(adjoint, 0.1), self.adjoint),
            accuracy=self.accuracy,
        )
