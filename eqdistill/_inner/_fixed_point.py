"""Gradient descent with momentum in fixed point, forwards and backwards to the bit."""

import fractions
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt


# The bits before the point of parameters and of velocities: of them one is for the
# sign, and one is to spare.
_PARAMETER_BITS = 8
_VELOCITY_BITS = 4


class FixedPoint(eqx.Module):
    """The state of a run, with a tree for each that has the structure of the
    parameters.

    **Attributes:**

    - `params`, `velocity`: integers, which are the parameters and the velocities times
        powers of two.
    - `dropped`: the bits that the products with the momentum have dropped.
    - `fits`: whether all numbers have been in their ranges so far.
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
    found = FixedPoint(
        fixed,
        optax.tree.zeros_like(fixed),
        jax.tree.map(lambda x: jnp.zeros(x.shape, unsigned), fixed),
        jnp.array(True),
    )
    limit = 2.0 ** (_PARAMETER_BITS - 2)
    small = [(abs(x) < limit).all() for x in jax.tree.leaves(params)]
    return eqx.tree_at(lambda x: x.fits, found, jnp.array(small).all())


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
    params = jax.tree.map(lambda w, v: w + _shift(v), exact.params, velocity)
    found = FixedPoint(params, velocity, dropped, exact.fits)
    fits = exact.fits & _fit_in(found) & jnp.isfinite(optax.tree.norm(gradient))
    return eqx.tree_at(lambda x: x.fits, found, fits)


def retreat(
    exact: FixedPoint,
    gradient_of: Callable[[PyTree], PyTree],
    rate: Float[Array, ""],
    momentum: fractions.Fraction,
) -> FixedPoint:
    """The state before a step. `gradient_of` gives the gradient at parameters in fixed
    point."""
    n, d = momentum.numerator, momentum.denominator
    params = jax.tree.map(lambda w, v: w - _shift(v), exact.params, exact.velocity)
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
    """The first step of each block, and the one after its last. After a block, half
    of a word is put aside, so that no word overflows in the next."""
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
    long for that gives the greatest number, with which the velocity leaves its
    range."""
    bits = bits_of(like)
    scale = 2.0 ** (bits - _VELOCITY_BITS)
    most = 2.0 ** (bits - 2)
    return jnp.clip(jnp.round(rate * gradient * scale), -most, most).astype(like.dtype)


def _shift(velocity):
    """A velocity in the fixed point of parameters."""
    return velocity >> (_PARAMETER_BITS - _VELOCITY_BITS)


def _fit_in(exact: FixedPoint) -> Bool[Array, ""]:
    """Whether all numbers are well within their ranges, so that none has left its
    range in this step."""
    bits = bits_of(exact.params)
    limit = 2 ** (bits - 2)
    leaves = jax.tree.leaves((exact.params, exact.velocity))
    return jnp.array([((x < limit) & (x > -limit)).all() for x in leaves]).all()


def _unzip(pairs: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
    return jax.tree.transpose(
        jax.tree.structure(like), jax.tree.structure((0, 0)), pairs
    )
