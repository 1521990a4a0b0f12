import fractions
import functools as ft
from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from .._checks import check_at_least
from .._classifier import parameters
from .._conversions import ArrayOrList, as_int
from .._data._distilled_set import DistilledSet
from .._sharding import vary_like
from ._inner_solver import AbstractInnerSolver, Fitted, inner_loss, stop_gradient
from ._unrolled_solver import log_positive


# Bits before the binary point, including one for the sign and one in reserve.
_PARAMETER_BITS = 8
_VELOCITY_BITS = 4


class ReversibleSolver(AbstractInnerSolver[None]):
    r"""Trains the model by gradient descent with momentum in fixed-point arithmetic, so
    that the run can be reversed exactly:

    $$v_{t+1} = \gamma v_t - \alpha_t \nabla_w g(w_t; \theta), \qquad
    w_{t+1} = w_t + v_{t+1}, \qquad w^\star(\theta) = w_T,$$

    where $g$ is [`eqdistill.inner_loss`][]. The backward pass recomputes $w_t$ and
    $v_t$ from $w_{t+1}$ and $v_{t+1}$. It needs only the bits lost in the
    multiplication by the momentum $\gamma$: $\log_2 (1 / \gamma)$ bits for each
    parameter and step, which is 0.029 bits for $\gamma = 0.98$, instead of 32 bits to
    store the parameter.

    Parameters must stay between -64 and 64, and velocities between -4 and 4. They have
    as many bits as the model's floating-point numbers. A run that leaves these ranges
    has `converged=False`. The derivative of rounding is taken to be one. Dropout is
    off.

    If the backward pass does not end exactly at the initial parameters, the
    hypergradient is NaN. The result reports the number of bits kept for each parameter
    and step in `stats["kept_bits"]`.

    Source: Maclaurin, Duvenaud and Adams, *Gradient-based hyperparameter optimization
    through reversible learning*, 2015, Algorithms 2 and 3.
    """

    log_learning_rate: Float[Array, ""] | Float[Array, " steps"]
    momentum: fractions.Fraction = eqx.field(static=True)
    steps: int = eqx.field(static=True, converter=as_int)

    def __init__(
        self, learning_rate: ArrayOrList, *, momentum: float = 0.98, steps: int
    ):
        r"""**Arguments:**

        - `learning_rate`: the step size $\alpha > 0$, or one for each step. Its
            logarithm is stored.

        All other arguments are keyword only.

        - `momentum`: the momentum $\gamma$, from 0.01 to 0.99, rounded to a fraction
            with a denominator of at most 100.
        - `steps`: the number of steps $T$, at least 1.
        """
        check_at_least(1, steps=steps)
        if not 0.01 <= momentum <= 0.99:
            raise ValueError(f"`momentum` must be from 0.01 to 0.99; got {momentum}.")
        self.log_learning_rate = log_positive("learning_rate", learning_rate)
        if self.log_learning_rate.shape not in ((), (steps,)):
            raise ValueError(
                f"`learning_rate` must be a number, or one for each of {steps} steps; "
                f"got shape {self.log_learning_rate.shape}."
            )
        self.momentum = fractions.Fraction(float(momentum)).limit_denominator(100)
        self.steps = steps

    def init(self, distilled, model, *, key):
        """**Raises:** a `TypeError` if the parameters are not all float32 or all
        float64."""
        params = eqx.filter(model, parameters(model))
        dtypes = {x.dtype.name for x in jax.tree.leaves(params)}
        if len(dtypes) > 1 or not dtypes <= {"float32", "float64"}:
            raise TypeError(
                "`model` must have parameters that are all float32 or all float64 for "
                f"`ReversibleSolver`; got {sorted(dtypes)}."
            )

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        model = eqx.nn.inference_mode(model)
        params, static = eqx.partition(model, parameters(model))
        params, unravel = ravel_pytree(params)
        args = (distilled, self.log_learning_rate, static, unravel)
        # Everything that is differentiated is in the first argument.
        solver = stop_gradient(self)
        params, fits, norm = _reversed_run((params, args), solver)
        bits = _bits_of(params)
        # Half a word after each block, and a whole word at the end.
        num_blocks = _blocks(self.steps, self.momentum, bits).shape[1]
        kept_bits = (num_blocks * bits // 2 + bits) / self.steps
        return Fitted(
            model=eqx.combine(unravel(params), static),
            converged=fits & jnp.isfinite(params).all(),
            gradient_norm=jax.lax.stop_gradient(norm),
            stats={"steps": jnp.array(self.steps), "kept_bits": jnp.array(kept_bits)},
        ), state


def _forward_run(operands: PyTree, solver: ReversibleSolver):
    """The final state, the norm of the last gradient, and the dropped bits."""
    params, args = operands
    half = _bits_of(params) // 2

    def one(step, carry):
        exact, _ = carry
        gradient = _isolated_gradient(exact, params, args)
        exact = _advance(exact, gradient, _rate(args, step), solver.momentum)
        return exact, jnp.linalg.norm(gradient)

    def run_block(carry, block):
        first, last = block
        exact, norm = jax.lax.fori_loop(first, last, one, carry)
        stored = exact.dropped.astype(f"uint{half}")
        return (replace(exact, dropped=exact.dropped >> half), norm), stored

    carry = (_to_fixed_point(params), vary_like(jnp.zeros((), params.dtype), params))
    in_blocks = tuple(_blocks(solver.steps, solver.momentum, 2 * half))
    (exact, norm), stored = jax.lax.scan(run_block, carry, in_blocks)
    return (_to_floats(exact, params)[0], exact.fits, norm), (exact, stored)


@eqx.filter_custom_vjp
def _reversed_run(operands: PyTree, solver: ReversibleSolver):
    return _forward_run(operands, solver)[0]


@_reversed_run.def_fwd
def _(perturbed, operands, solver):
    return _forward_run(operands, solver)


@_reversed_run.def_bwd
def _(residuals, cotangent, perturbed, operands, solver):
    (exact, stored), (params, args) = residuals, operands
    half = _bits_of(params) // 2
    diff_args, other_args = eqx.partition(args, eqx.is_inexact_array)

    def one(i, carry, last):
        step = last - 1 - i
        exact, of_state, of_args = carry

        def float_step(params, velocity, diff_args):
            args = eqx.combine(diff_args, other_args)
            push = _rate(args, step) * _gradient(params, args)
            velocity = float(solver.momentum) * velocity - push
            return params + velocity, velocity

        gradient_of = lambda w: _isolated_gradient(
            replace(exact, params=w), params, args
        )
        exact = _retreat(exact, gradient_of, _rate(args, step), solver.momentum)
        _, pull_back = jax.vjp(float_step, *_to_floats(exact, params), diff_args)
        *of_state, of_args_here = pull_back(of_state)
        return exact, tuple(of_state), optax.tree.add(of_args, of_args_here)

    def run_block(carry, block_and_stored):
        (first, last), stored = block_and_stored
        exact, *rest = carry
        dropped = (exact.dropped << half) | stored.astype(exact.dropped.dtype)
        body = ft.partial(one, last=last)
        carry = (replace(exact, dropped=dropped), *rest)
        return jax.lax.fori_loop(0, last - first, body, carry), None

    zeros = jnp.zeros_like(params)
    of_params = zeros if cotangent[0] is None else cotangent[0]
    carry = (exact, (of_params, zeros), optax.tree.zeros_like(diff_args))
    in_blocks = tuple(_blocks(solver.steps, solver.momentum, 2 * half))
    carry, _ = jax.lax.scan(run_block, carry, (in_blocks, stored), reverse=True)
    exact, (of_params, _), of_args = carry
    start = replace(_to_fixed_point(params), fits=exact.fits)
    is_back = eqx.tree_equal(exact, start)
    return jax.tree.map(lambda x: jnp.where(is_back, x, jnp.nan), (of_params, of_args))


def _rate(args: PyTree, step: Int[Array, ""]) -> Float[Array, ""]:
    rate = jnp.exp(args[1])
    return rate[step] if rate.ndim else rate


def _gradient(params: Float[Array, " p"], args: PyTree) -> Float[Array, " p"]:
    distilled, _, static, unravel = args
    loss = lambda params: inner_loss(distilled, eqx.combine(unravel(params), static))
    return jax.grad(loss)(params)


def _isolated_gradient(exact, like, args):
    """The gradient between optimisation barriers, so that it has the same bits in the
    forward and in the backward pass."""
    params, _ = _to_floats(exact, like)
    dynamic, static = eqx.partition((params, args), eqx.is_inexact_array)
    params, args = eqx.combine(jax.lax.optimization_barrier(dynamic), static)
    return jax.lax.optimization_barrier(_gradient(params, args))


class _FixedPoint(eqx.Module):
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


def _bits_of(params: Array) -> int:
    """The number of bits of a parameter."""
    return 8 * params.dtype.itemsize


def _to_fixed_point(params: Float[Array, " p"]) -> _FixedPoint:
    """The state before the first step."""
    bits = _bits_of(params)
    fixed = jnp.round(params * 2.0 ** (bits - _PARAMETER_BITS)).astype(f"int{bits}")
    fits = (abs(params) < 2.0 ** (_PARAMETER_BITS - 2)).all()
    dropped = jnp.zeros_like(fixed, f"uint{bits}")
    return _FixedPoint(fixed, jnp.zeros_like(fixed), dropped, fits)


def _to_floats(
    exact: _FixedPoint, like: Float[Array, " p"]
) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    """The parameters and the velocities."""
    bits = _bits_of(like)
    to_float = lambda x, point: x.astype(like.dtype) * 2.0 ** (point - bits)
    params = to_float(exact.params, _PARAMETER_BITS)
    return params, to_float(exact.velocity, _VELOCITY_BITS)


def _advance(
    exact: _FixedPoint,
    gradient: Float[Array, " p"],
    rate: Float[Array, ""],
    momentum: fractions.Fraction,
) -> _FixedPoint:
    """The state after a step."""
    n, d = momentum.numerator, momentum.denominator
    v, i = exact.velocity, exact.dropped
    # No integer overflows: the size of `i` is bounded by `_blocks`.
    i = i * d + (v % d).astype(i.dtype)
    v = v // d * n + (i % n).astype(v.dtype)
    v = v - _push(rate, gradient, v)
    w = exact.params + _to_parameter_scale(v)
    # Well within the ranges, so that no number overflowed in this step.
    limit = 2 ** (_bits_of(w) - 2)
    in_range = jnp.array([((x < limit) & (x > -limit)).all() for x in (w, v)]).all()
    fits = exact.fits & in_range & jnp.isfinite(jnp.linalg.norm(gradient))
    return _FixedPoint(w, v, i // n, fits)


def _retreat(
    exact: _FixedPoint,
    gradient_of: Callable[[Int[Array, " p"]], Float[Array, " p"]],
    rate: Float[Array, ""],
    momentum: fractions.Fraction,
) -> _FixedPoint:
    """The state before a step. `gradient_of` returns the gradient at parameters in
    fixed point."""
    n, d = momentum.numerator, momentum.denominator
    v, i = exact.velocity, exact.dropped
    w = exact.params - _to_parameter_scale(v)
    v = v + _push(rate, gradient_of(w), v)
    i = i * n + (v % n).astype(i.dtype)
    v = v // n * d + (i % d).astype(v.dtype)
    return _FixedPoint(w, v, i // d, exact.fits)


def _blocks(
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
    """The step along a gradient, in the fixed-point format of velocities. A step that
    is too long is clipped to a value that takes the velocity out of its range."""
    bits = _bits_of(like)
    scale = 2.0 ** (bits - _VELOCITY_BITS)
    most = 2.0 ** (bits - 2)
    return jnp.clip(jnp.round(rate * gradient * scale), -most, most).astype(like.dtype)


def _to_parameter_scale(velocity):
    """A velocity in the fixed-point format of parameters."""
    return velocity >> (_PARAMETER_BITS - _VELOCITY_BITS)
