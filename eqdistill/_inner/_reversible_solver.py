import fractions

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .._checks import check_at_least
from .._classifier import parameters
from .._conversions import ArrayOrList, as_int
from .._data._distilled_set import DistilledSet
from ._fixed_point import (
    advance,
    bits_of,
    blocks,
    retreat,
    to_fixed_point,
    to_floats,
)
from ._inner_solver import AbstractInnerSolver, Fitted, inner_loss, stop_gradient
from ._unrolled_adjoint import AbstractUnrolledAdjoint, with_zeros
from ._unrolled_solver import log_positive


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
    hypergradient is NaN.

    !!! example

        ```python
        inner = eqd.adjoints.ReversibleSolver(0.1, momentum=0.98, steps=1000)
        ```

    Source: Maclaurin, Duvenaud and Adams, *Gradient-based hyperparameter optimization
    through reversible learning*, 2015, Algorithms 2 and 3.

    **Attributes:**

    - `log_learning_rate`: the logarithm of the step size $\alpha$, or one logarithm for
        each step.
    - `momentum`: the momentum $\gamma$, as a fraction.
    - `steps`: the number of steps $T$.
    - `adjoint`: how the steps are differentiated, or `None` for exact reversal.
    """

    log_learning_rate: Float[Array, ""] | Float[Array, " steps"]
    momentum: fractions.Fraction = eqx.field(static=True)
    steps: int = eqx.field(static=True, converter=as_int)
    adjoint: AbstractUnrolledAdjoint | None

    def __init__(
        self,
        learning_rate: ArrayOrList,
        *,
        momentum: float = 0.98,
        steps: int,
        adjoint: AbstractUnrolledAdjoint | None = None,
    ):
        r"""**Arguments:**

        - `learning_rate`: the step size $\alpha > 0$, or one for each step.

        All other arguments are keyword only.

        - `momentum`: the momentum $\gamma$, from 0.01 to 0.99, rounded to a fraction
            with a denominator of at most 100.
        - `steps`: the number of steps, at least 1.
        - `adjoint`: an [`eqdistill.adjoints.AbstractUnrolledAdjoint`][] that
            differentiates the same run instead. Defaults to exact reversal.

        **Raises:**

        A `ValueError` for an argument out of range or of the wrong shape.
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
        self.adjoint = adjoint

    def init(self, distilled, model, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `TypeError` if the parameters are not all float32 or all float64.
        """
        del distilled, key
        params = eqx.filter(model, parameters(model))
        dtypes = {x.dtype.name for x in jax.tree.leaves(params)}
        if len(dtypes) > 1 or not dtypes <= {"float32", "float64"}:
            raise TypeError(
                "`model` must have parameters that are all float32 or all float64 for "
                f"`ReversibleSolver`; got {sorted(dtypes)}."
            )
        return None

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][]."""
        del key
        model = eqx.nn.inference_mode(model)
        params, static = eqx.partition(model, parameters(model))
        args = (distilled, self.log_learning_rate, static)
        # Everything that is differentiated is an argument of a step.
        fixed = stop_gradient(self)
        if self.adjoint is None:
            params, fits, norm = _reversed_run((params, args), fixed)
            bits = bits_of(params)
            # Half a word after each block, and a whole word at the end.
            num_blocks = blocks(self.steps, self.momentum, bits).shape[1]
            kept_bits = (num_blocks * bits // 2 + bits) / self.steps
        else:
            floats = (params, optax.tree.zeros_like(params))
            carry = (
                to_fixed_point(params),
                floats,
                jnp.zeros_like(optax.tree.norm(params)),
            )
            exact, (params, _), norm = self.adjoint.loop(
                fixed._step, carry, args, jnp.array(0), self.steps
            )
            fits, kept_bits = exact.fits, 0.0
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]
        return Fitted(
            model=eqx.combine(params, static),
            converged=fits & jnp.array(finite).all(),
            gradient_norm=jax.lax.stop_gradient(norm),
            stats={
                "steps": jnp.array(self.steps),
                "kept_bits": jnp.array(kept_bits),
            },
        ), state

    def _rate(self, log_learning_rate, step):
        rate = jnp.exp(log_learning_rate)
        return rate[step] if rate.ndim else rate

    def _step(self, carry, args, step):
        """One step in fixed point, with the derivative of the step in floats."""
        exact, (params, velocity), _ = carry
        gradient = _gradient(params, args)
        rate = self._rate(args[1], step)
        moved = self._move(params, velocity, gradient, rate)
        exact = advance(exact, *jax.lax.stop_gradient((gradient, rate)), self.momentum)
        params = _with_derivative_of(to_floats(exact, params), moved)
        return exact, params, _norm(gradient)

    def _move(self, params, velocity, gradient, rate):
        """The parameters and velocities after a step, in floats."""
        gamma = float(self.momentum)
        velocity = jax.tree.map(lambda v, g: gamma * v - rate * g, velocity, gradient)
        return optax.tree.add(params, velocity), velocity


def _forward_run(operands: PyTree, solver: ReversibleSolver):
    """The final state, the norm of the last gradient, and the dropped bits."""
    params, args = operands
    half = bits_of(params) // 2

    def one(step, carry):
        exact, _ = carry
        gradient = _isolated_gradient(to_floats(exact, params)[0], args)
        rate = solver._rate(args[1], step)
        return advance(exact, gradient, rate, solver.momentum), _norm(gradient)

    def run_block(carry, block):
        first, last = block
        exact, norm = jax.lax.fori_loop(first, last, one, carry)
        stored = jax.tree.map(lambda i: i.astype(f"uint{half}"), exact.dropped)
        rest = jax.tree.map(lambda i: i >> half, exact.dropped)
        return (eqx.tree_at(lambda x: x.dropped, exact, rest), norm), stored

    carry = (to_fixed_point(params), jnp.zeros_like(optax.tree.norm(params)))
    (exact, norm), stored = jax.lax.scan(
        run_block, carry, tuple(blocks(solver.steps, solver.momentum, 2 * half))
    )
    return exact, norm, stored


@eqx.filter_custom_vjp
def _reversed_run(operands: PyTree, solver: ReversibleSolver):
    exact, norm, _ = _forward_run(operands, solver)
    return to_floats(exact, operands[0])[0], exact.fits, norm


@_reversed_run.def_fwd
def _(perturbed, operands, solver):
    del perturbed
    exact, norm, stored = _forward_run(operands, solver)
    out = (to_floats(exact, operands[0])[0], exact.fits, norm)
    return out, (exact, stored)


@_reversed_run.def_bwd
def _(residuals, cotangent, perturbed, operands, solver):
    del perturbed
    (exact, stored), (params, args) = residuals, operands
    half = bits_of(params) // 2
    diff_args, other_args = eqx.partition(args, eqx.is_inexact_array)

    def float_step(params, velocity, diff_args, step):
        args = eqx.combine(diff_args, other_args)
        rate = solver._rate(args[1], step)
        return solver._move(params, velocity, _gradient(params, args), rate)

    def one(i, carry, last):
        step = last - 1 - i
        exact, of_state, of_args = carry
        gradient_of = lambda w: _isolated_gradient(
            to_floats(eqx.tree_at(lambda x: x.params, exact, w), params)[0], args
        )
        exact = retreat(
            exact, gradient_of, solver._rate(args[1], step), solver.momentum
        )
        at = (*to_floats(exact, params), diff_args)
        _, pull_back = jax.vjp(lambda w, v, args: float_step(w, v, args, step), *at)
        *of_state, of_args_here = pull_back(tuple(of_state))
        return exact, tuple(of_state), optax.tree.add(of_args, of_args_here)

    def run_block(carry, block_and_stored):
        (first, last), stored = block_and_stored
        exact, *rest = carry
        dropped = jax.tree.map(
            lambda i, low: (i << half) | low.astype(i.dtype), exact.dropped, stored
        )
        exact = eqx.tree_at(lambda x: x.dropped, exact, dropped)
        carry = jax.lax.fori_loop(
            0, last - first, lambda i, carry: one(i, carry, last), (exact, *rest)
        )
        return carry, None

    zeros = optax.tree.zeros_like(params)
    of_params = with_zeros(cotangent[0], zeros)
    carry = (exact, (of_params, zeros), optax.tree.zeros_like(diff_args))
    in_blocks = tuple(blocks(solver.steps, solver.momentum, 2 * half))
    carry, _ = jax.lax.scan(run_block, carry, (in_blocks, stored), reverse=True)
    exact, (of_params, _), of_args = carry
    start = to_fixed_point(params)
    is_back = eqx.tree_equal(
        (exact.params, exact.velocity, exact.dropped),
        (start.params, start.velocity, start.dropped),
    )
    return jax.tree.map(lambda x: jnp.where(is_back, x, jnp.nan), (of_params, of_args))


def _gradient(params: PyTree, args: PyTree) -> PyTree:
    distilled, _, static = args
    loss = lambda params: inner_loss(distilled, eqx.combine(params, static))
    return jax.grad(loss)(params)


def _isolated_gradient(params: PyTree, args: PyTree) -> PyTree:
    """The gradient between optimisation barriers, so that it has the same bits in the
    forward and in the backward pass."""
    dynamic, static = eqx.partition((params, args), eqx.is_inexact_array)
    params, args = eqx.combine(jax.lax.optimization_barrier(dynamic), static)
    return jax.lax.optimization_barrier(_gradient(params, args))


def _norm(gradient: PyTree) -> Float[Array, ""]:
    return optax.tree.norm(jax.lax.stop_gradient(gradient))


@jax.custom_jvp
def _with_derivative_of(exact: PyTree, floats: PyTree) -> PyTree:
    """The values of the first argument with the derivative of the second."""
    del floats
    return exact


@_with_derivative_of.defjvp
def _(primals, tangents):
    return primals[0], tangents[1]
