from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jaxtyping import Array, Bool, PyTree, Scalar


class _NewtonState(eqx.Module):
    """The next step from `y`, the slope of the function along it, and the fraction of
    the step to try."""

    step: PyTree
    slope: Scalar
    fraction: Scalar
    terminate: Bool[Array, ""]


class ConvexNewton(optx.AbstractRootFinder):
    """Newton's method for the root of the gradient of a strictly convex function.

    A step is halved until the slope of the function along it is not much above zero.
    (The slope starts negative and increases along the step.) The last step is small and
    is taken whole. Function values are not compared, because rounding affects them long
    before it affects the gradient. `solve(y, v)` applies the inverse of the Hessian at
    `y` to `v`.

    Each iteration tries one fraction, so the compiled program contains the gradient
    once.
    """

    rtol: float
    atol: float
    norm: Callable[[PyTree], Scalar]
    solve: Callable[[PyTree, PyTree], PyTree]

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, f_struct, aux_struct, tags
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(y)))
        return _NewtonState(optax.tree.zeros_like(y), zero, zero, jnp.array(False))

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        tried = optax.tree.add_scale(y, state.fraction, state.step)
        gradient, aux = fn(tried, args)
        slope = optax.tree.vdot(gradient, state.step)
        is_short = (slope <= 0.5 * jnp.abs(state.slope)) | (state.fraction <= 1e-6)

        def accept():
            step = optax.tree.scale(-1.0, self.solve(tried, gradient))
            is_last = self.norm(step) <= self.atol + self.rtol * self.norm(tried)
            y = optax.tree.add_scale(tried, jnp.where(is_last, 1.0, 0.0), step)
            new_slope = jnp.asarray(optax.tree.vdot(gradient, step))
            return y, _NewtonState(step, new_slope, jnp.ones_like(new_slope), is_last)

        def halve():
            halved = eqx.tree_at(lambda s: s.fraction, state, state.fraction / 2)
            return y, halved

        y, state = jax.lax.cond(is_short, accept, halve)
        return y, state, aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.terminate, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}
