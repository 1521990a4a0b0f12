"""Exactly reversible gradient descent with momentum, in fixed-point arithmetic."""

import fractions
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt


# Bits before the binary point, including one for the sign and one in reserve.
_PARAMETER_BITS = 8
_VELOCITY_BITS = 4


class FixedPoint(eqx.Module):
    """The state of a run.

    **Attributes:**

    - `params`, `velocity`: the parameters and velocities times powers of two, as
        integers.
    - `dropped`: the bits lost in the multiplications by the momentum.
    - `fits`: whether all numbers have stayed in range so far.
    """

    params: Int[Array, " p"]
    velocity: Int[Array, " p"]
    dropped: UInt[Array, " p"]
    fits: Bool[Array, ""]


def bits_of(params: Array) -> int:
    """The number of bits of a parameter."""
    return 8 * params.dtype.itemsize


def to_fixed_point(params: Float[Array, " p"]) -> FixedPoint:
    """The state before the first step."""
    bits = bits_of(params)
    params = jax.lax.stop_gradient(params)
    fixed = jnp.round(params * 2.0 ** (bits - _PARAMETER_BITS)).astype(f"int{bits}")
    fits = (abs(params) < 2.0 ** (_PARAMETER_BITS - 2)).all()
    dropped = jnp.zeros_like(fixed, f"uint{bits}")
    return FixedPoint(fixed, jnp.zeros_like(fixed), dropped, fits)


def to_floats(
    exact: FixedPoint, like: Float[Array, " p"]
) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    """The parameters and the velocities."""
    bits = bits_of(like)
    to_float = lambda x, point: x.astype(like.dtype) * 2.0 ** (point - bits)
    params = to_float(exact.params, _PARAMETER_BITS)
    return params, to_float(exact.velocity, _VELOCITY_BITS)


def advance(
    exact: FixedPoint,
    gradient: Float[Array, " p"],
    rate: Float[Array, ""],
    momentum: fractions.Fraction,
) -> FixedPoint:
    """The state after a step."""
    n, d = momentum.numerator, momentum.denominator
    v, i = exact.velocity, exact.dropped
    # No integer overflows: the size of `i` is bounded by `blocks`.
    i = i * d + (v % d).astype(i.dtype)
    v = v // d * n + (i % n).astype(v.dtype)
    v = v - _push(rate, gradient, v)
    w = exact.params + _to_parameter_scale(v)
    # Well within the ranges, so that no number overflowed in this step.
    limit = 2 ** (bits_of(w) - 2)
    in_range = jnp.array([((x < limit) & (x > -limit)).all() for x in (w, v)]).all()
    fits = exact.fits & in_range & jnp.isfinite(jnp.linalg.norm(gradient))
    return FixedPoint(w, v, i // n, fits)


def retreat(
    exact: FixedPoint,
    gradient_of: Callable[[Int[Array, " p"]], Float[Array, " p"]],
    rate: Float[Array, ""],
    momentum: fractions.Fraction,
) -> FixedPoint:
    """The state before a step. `gradient_of` returns the gradient at parameters in
    fixed point."""
    n, d = momentum.numerator, momentum.denominator
    v, i = exact.velocity, exact.dropped
    w = exact.params - _to_parameter_scale(v)
    v = v + _push(rate, gradient_of(w), v)
    i = i * n + (v % n).astype(i.dtype)
    v = v // n * d + (i % d).astype(v.dtype)
    return FixedPoint(w, v, i // d, exact.fits)


def blocks(
    steps: int, momentum: fractions.Fraction, bits: int
) -> Int[np.ndarray, "2 blocks"]:
    """The first step of each block, and the step after its last. Half a word of dropped
    bits is stored after each block, so that no word overflows in the next one."""
    n, d = momentum.numerator, momentum.denominator
    most, firsts = 0, [0]
    for step in range(steps):
        if most * d + d > 2**bits:
            firsts.append(step)
            most >>= bits // 2
        most = (most * d + d - 1) // n
    return np.array([firsts, [*firsts[1:], steps]])


def _push(rate, gradient, like):
    """The step along a gradient, in the fixed point of velocities. A step that is too
    long is clipped to a value that takes the velocity out of its range."""
    bits = bits_of(like)
    scale = 2.0 ** (bits - _VELOCITY_BITS)
    most = 2.0 ** (bits - 2)
    return jnp.clip(jnp.round(rate * gradient * scale), -most, most).astype(like.dtype)


def _to_parameter_scale(velocity):
    """A velocity in the fixed point of parameters."""
    return velocity >> (_PARAMETER_BITS - _VELOCITY_BITS)
