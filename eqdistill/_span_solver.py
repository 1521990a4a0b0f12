from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._classifier import LogisticRegression
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver, Fitted, inner_loss
from ._losses import label_residual


class _Dual(eqx.Module):
    """The unknowns of the inner problem in the span of the images."""

    residuals: Float[Array, "n c"]
    intercept: Float[Array, " c"] | None


class _Data(eqx.Module):
    """The inner problem in the span of the images: `gram` is $K / (n \\lambda)$."""

    gram: Float[Array, "n n"]
    labels: Int[Array, " n"] | Float[Array, "n c"]


def _logits(dual: _Dual, data: _Data) -> Float[Array, "n c"]:
    logits = data.gram @ dual.residuals
    return logits if dual.intercept is None else logits + dual.intercept


def _optimality(dual: _Dual, data: _Data) -> _Dual:
    r"""$A - (T - \mathrm{softmax}(K A / n \lambda + 1 b^\top))$ and, for an intercept,
    $A^\top 1 + \bar b$: the mean of the intercept, which has no effect, is set to zero.
    """
    residuals = dual.residuals - label_residual(_logits(dual, data), data.labels)
    if dual.intercept is None:
        return _Dual(residuals, None)
    total = jnp.sum(dual.residuals, axis=0) + jnp.mean(dual.intercept)
    return _Dual(residuals, total)


class _NewtonState(eqx.Module):
    logits_diff: Float[Array, ""]
    logits_size: Float[Array, ""]
    result: optx.RESULTS


class _DualNewton(optx.AbstractRootFinder):
    r"""Newton's method for `_optimality`, with a line search on the primal objective.

    `_optimality` is not the gradient of anything, but its Newton step is that of the
    inner loss in the parameters, which is convex. Along the step the inner loss's slope
    thus only grows, from a negative value. The search halves the step until that slope
    is no longer steeply positive: it cannot be fooled by the rounding of values.
    """

    rtol: float
    atol: float
    norm: Any = optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, f_struct, aux_struct, tags
        inf = jnp.full((), jnp.inf, y.residuals.dtype)
        return _NewtonState(inf, inf, optx.RESULTS.successful)

    def step(self, fn, y, args, options, state, tags):
        del options, state, tags
        value, aux = fn(y, args)
        operator = lx.JacobianLinearOperator(lambda y, args: fn(y, args)[0], y, args)
        solution = lx.linear_solve(operator, value, lx.LU(), throw=False)
        direction = optax.tree.scale(-1.0, solution.value)
        logits_direction = _logits(direction, args)

        def slope(step_size):
            at = optax.tree.add_scale(y, step_size, direction)
            change = at.residuals - label_residual(_logits(at, args), args.labels)
            # The inner loss's gradient in the logits is `change - residuals`.
            gram_part = logits_direction
            if direction.intercept is not None:
                gram_part = logits_direction - direction.intercept
            total = jnp.sum(gram_part * change)
            if direction.intercept is not None:
                gradient = jnp.sum(change - at.residuals, axis=0)
                total = total + jnp.sum(direction.intercept * gradient)
            return total

        limit = 0.9 * jnp.abs(slope(0.0))

        def too_far(step_size):
            return ~(slope(step_size) <= limit) & (step_size > 1e-6)

        step_size = jax.lax.while_loop(
            too_far, lambda s: 0.5 * s, jnp.ones((), value.residuals.dtype)
        )
        y = optax.tree.add_scale(y, step_size, direction)
        state = _NewtonState(
            jnp.max(jnp.abs(logits_direction)),
            jnp.max(jnp.abs(_logits(y, args))),
            solution.result if False else optx.RESULTS.successful,
        )
        return y, state, aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        small = state.logits_diff <= self.atol + self.rtol * state.logits_size
        return small, state.result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}
