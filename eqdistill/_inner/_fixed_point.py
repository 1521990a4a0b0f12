"""Exactly reversible gradient descent with momentum, in fixed-point arithmetic."""

import fractions
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt


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

    params: PyTree[Int[Array, "..."]]
    velocity: PyTree[Int[Array, "..."]]
    dropped: PyTree[UInt[Array, "..."]]
    fits: Bool[Array, ""]


def bits_of(params: PyTree) -> int:
    """The number of bits of a parameter."""
    return 8 * jax.tree.leaves(params)[0].dtype.itemsize


def to_fixed_point(params: PyTree) -> FixedPoint:
    """The state before the first step."""
    bits = bits_of(params)
    integer = jnp.int32 if bits == 32 else jnp.int64
    unsigned = jnp.uint32 if bits == 32 else jnp.uint64
    scale = 2.0 ** (bits - _PARAMETER_BITS)
    params = jax.lax.stop_gradient(params)
    fixed = jax.tree.map(lambda x: jnp.round(x * scale).astype(integer), params)
    state = FixedPoint(
        fixed,
        optax.tree.zeros_like(fixed),
        jax.tree.map(lambda x: jnp.zeros(x.shape, unsigned), fixed),
        jnp.array(True),
    )
    limit = 2.0 ** (_PARAMETER_BITS - 2)
    small = [(abs(x) < limit).all() for x in jax.tree.leaves(params)]
    return eqx.tree_at(lambda x: x.fits, state, jnp.array(small).all())


def to_floats(exact: FixedPoint, like: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters and the velocities."""
    bits = bits_of(like)
    of = lambda tree, point: jax.tree.map(
        lambda x, y: x.astype(y.dtype) * 2.0 ** (point - bits), tree, like
    )
    return of(exact.params, _PARAMETER_BITS), of(exact.velocity, _VELOCITY_BITS)


def advance(
    exact: FixedPoint,
    gradient: PyTree,
    rate: Float[Array, ""],
    momentum: fractions.Fraction,
) -> FixedPoint:
    """The state after a step."""
    n, d = momentum.numerator, momentum.denominator

    def multiply(v, i):
        # No integer overflows: the size of `i` is bounded by `blocks`.
        i = i * d + (v % d).astype(i.dtype)
        v = v // d * n + (i % n).astype(v.dtype)
        return v, i // n

    multiplied = jax.tree.map(multiply, exact.velocity, exact.dropped)
    velocity, dropped = _unzip(multiplied, exact.velocity)
    pushes = jax.tree.map(lambda g, v: _push(rate, g, v), gradient, velocity)
    velocity = optax.tree.sub(velocity, pushes)
    params = jax.tree.map(
        lambda w, v: w + _to_parameter_scale(v), exact.params, velocity
    )
    state = FixedPoint(params, velocity, dropped, exact.fits)
    fits = exact.fits & _is_in_range(state) & jnp.isfinite(optax.tree.norm(gradient))
    return eqx.tree_at(lambda x: x.fits, state, fits)


def retreat(
    exact: FixedPoint,
    gradient_of: Callable[[PyTree], PyTree],
    rate: Float[Array, ""],
    momentum: fractions.Fraction,
) -> FixedPoint:
    """The state before a step. `gradient_of` returns the gradient at parameters in
    fixed point."""
    n, d = momentum.numerator, momentum.denominator
    params = jax.tree.map(
        lambda w, v: w - _to_parameter_scale(v), exact.params, exact.velocity
    )
    gradient = gradient_of(params)
    pushes = jax.tree.map(lambda g, v: _push(rate, g, v), gradient, exact.velocity)
    velocity = optax.tree.add(exact.velocity, pushes)

    def divide(v, i):
        i = i * n + (v % n).astype(i.dtype)
        v = v // n * d + (i % d).astype(v.dtype)
        return v, i // d

    divided = jax.tree.map(divide, velocity, exact.dropped)
    velocity, dropped = _unzip(divided, velocity)
    return FixedPoint(params, velocity, dropped, exact.fits)


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


def _is_in_range(exact: FixedPoint) -> Bool[Array, ""]:
    """Whether all numbers are well within their ranges, so that none overflowed in the
    last step."""
    bits = bits_of(exact.params)
    limit = 2 ** (bits - 2)
    leaves = jax.tree.leaves((exact.params, exact.velocity))
    return jnp.array([((x < limit) & (x > -limit)).all() for x in leaves]).all()


def _unzip(pairs: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
    return jax.tree.transpose(
        jax.tree.structure(like), jax.tree.structure((0, 0)), pairs
    )
