from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import check_at_least
from .._conversions import as_float_or_none
from .._sharding import vary_like


_DIRECTIONS = optax.scale_by_lbfgs(memory_size=20)


class _State(eqx.Module):
    """The last accepted point, and the line search from there: a step of size `low` is
    known to be too short, and one of size `high` too long."""

    point: Float[Array, " p"]
    value: Scalar
    gradient: Float[Array, " p"]
    direction: Float[Array, " p"]
    size: Scalar
    low: Scalar
    high: Scalar
    lbfgs: optax.OptState


class LBFGS(optx.AbstractMinimiser):
    r"""Minimises by L-BFGS, and reaches a small gradient even in float32.

    The line search finds a step that satisfies the weak Wolfe conditions by bisection
    and doubling. If the loss changes only in its last digits, the slope along the line
    decides (the approximate Wolfe conditions). The gradient can therefore fall far
    below the square root of the machine precision, where a line search that only
    compares values stops.

    Each step evaluates the loss and its gradient once, so a compiled program contains
    one copy of the network. The solver stops when $\|g\| \le \mathrm{rtol} \cdot
    \lambda \|w\| + \mathrm{atol}$, with the ridge $\lambda$ that
    [`eqdistill.ArgminSolver`][] passes as `options["l2"]`, or when no step is
    acceptable.

    Source: Lewis and Overton, *Nonsmooth optimization via quasi-Newton methods*, 2013,
    Algorithm 2.6; Hager and Zhang 2005, equation (4.1).

    **Attributes:**

    - `rtol`, `atol`: the tolerances above. They default to 1e-3 and 1e-7 in float32,
        and to 1e-9 and 1e-14 in float64.
    - `norm`: the norm of the gradient and of the parameters.
    """

    rtol: float | None = eqx.field(default=None, converter=as_float_or_none)  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: float | None = eqx.field(default=None, converter=as_float_or_none)  # pyright: ignore[reportIncompatibleVariableOverride]
    norm: Callable[[PyTree], Scalar] = optx.two_norm

    def __check_init__(self):
        check_at_least(0, rtol=self.rtol, atol=self.atol)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        point, _ = ravel_pytree(y)
        zero, inf = jnp.zeros((), point.dtype), jnp.full((), jnp.inf, point.dtype)
        state = _State(
            point=point,
            value=inf,  # Accept the first point.
            gradient=jnp.full_like(point, jnp.inf),
            direction=jnp.zeros_like(point),
            size=zero,
            low=zero,
            high=inf,
            lbfgs=_DIRECTIONS.init(point),
        )
        return vary_like(state, point)

    def step(self, fn, y, args, options, state: _State, tags):
        (value, aux), gradient = eqx.filter_value_and_grad(fn, has_aux=True)(y, args)
        trial, unravel = ravel_pytree(y)
        gradient, _ = ravel_pytree(gradient)
        # The loss may have a wider dtype than the parameters.
        value = value.astype(trial.dtype)
        is_first = jnp.isinf(state.value)
        old_slope = jnp.where(is_first, 0, state.gradient) @ state.direction
        slope = gradient @ state.direction
        # Not relative to the loss alone: small losses are differences of numbers of
        # order one.
        rounding = 10 * jnp.finfo(value.dtype).eps * (1 + jnp.abs(state.value))
        decreases = value <= state.value + 1e-4 * state.size * old_slope
        is_flat = (value <= state.value + rounding) & (slope <= -0.8 * old_slope)
        is_too_long = ~(is_first | decreases | is_flat)
        is_too_short = ~is_first & ~is_too_long & (slope < 0.9 * old_slope)

        def continue_search():
            low = jnp.where(is_too_short, state.size, state.low)
            high = jnp.where(is_too_long, state.size, state.high)
            size = jnp.where(jnp.isinf(high), 2 * low, (low + high) / 2)
            return replace(state, size=size, low=low, high=high)

        def accept():
            update, lbfgs = _DIRECTIONS.update(gradient, state.lbfgs, trial)
            return replace(
                state,
                point=trial,
                value=value,
                gradient=gradient,
                direction=optax.tree.scale(-1.0, update),
                size=jnp.ones_like(value),
                low=jnp.zeros_like(value),
                high=jnp.full_like(value, jnp.inf),
                lbfgs=lbfgs,
            )

        state = jax.lax.cond(is_too_long | is_too_short, continue_search, accept)
        return unravel(state.point + state.size * state.direction), state, aux

    def terminate(self, fn, y, args, options, state: _State, tags):
        is_double = jnp.finfo(state.point.dtype).eps < 1e-10
        rtol = (1e-9 if is_double else 1e-3) if self.rtol is None else self.rtol
        atol = (1e-14 if is_double else 1e-7) if self.atol is None else self.atol
        scale = (options or {}).get("l2", 0.0) * self.norm(state.point)
        is_small = self.norm(state.gradient) <= rtol * scale + atol
        is_stuck = state.high - state.low < 1e-6 * state.high
        return is_small | is_stuck, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state: _State, tags, result):
        _, unravel = ravel_pytree(y)
        return unravel(state.point), aux, {}
