import abc
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PyTree

from .._checks import check_at_least
from .._conversions import as_int_or_none


Carry = TypeVar("Carry", bound=PyTree)
Step = Callable[[Carry, PyTree, Int[Array, ""]], Carry]

# More tangents than these take longer than a backward pass, however few the steps are.
_MOST_TANGENTS = 100


class AbstractUnrolledAdjoint(eqx.Module):
    """How the steps of a finite training run are differentiated."""

    @abc.abstractmethod
    def loop(
        self, step: Step, carry: Carry, args: PyTree, first: Int[Array, ""], length: int
    ) -> Carry:
        """Takes steps of a training run.

        **Arguments:**

        - `step`: one step: a pure function of the carry, of `args`, and of the number
            of the step.
        - `carry`: what a step changes: arrays only.
        - `args`: all else that is differentiated.
        - `first`: the number of the first step.
        - `length`: the number of steps.

        **Returns:**

        The carry after the last step.
        """


class DirectAdjoint(AbstractUnrolledAdjoint):
    """Back-propagates through the steps; forward mode works too. The carry of each step
    is kept, which takes memory for the parameters and the state of the optimiser, times
    the number of steps.

    A step is computed again in the backward pass: to write its activations to memory
    and to read them back takes longer, for every network that was tried
    (`python examples/hypergradients.py`).
    """

    def loop(self, step, carry, args, first, length):
        """As [`eqdistill.AbstractUnrolledAdjoint`][]."""

        @jax.checkpoint
        def body(carry, i):
            return step(carry, args, i), None

        return jax.lax.scan(body, carry, first + jnp.arange(length))[0]


class RecursiveCheckpointAdjoint(AbstractUnrolledAdjoint):
    """Back-propagates through the steps, and keeps few of them: those between are
    computed again from the last one that was kept.

    Forward mode does not work.

    Source: Griewank, *Achieving logarithmic growth of temporal and spatial complexity
    in reverse automatic differentiation*, 1992; Stumm and Walther, *New algorithms for
    optimal online checkpointing*, 2010, in the implementation of Equinox.

    **Attributes:**

    - `checkpoints`: the number of steps that are kept, or `None` for one in proportion
        to the square root of their number.
    """

    checkpoints: int | None = eqx.field(default=None, converter=as_int_or_none)

    def __check_init__(self):
        check_at_least(1, checkpoints=self.checkpoints)

    def loop(self, step, carry, args, first, length):
        """As [`eqdistill.AbstractUnrolledAdjoint`][]."""
        body = lambda carry, i: (step(carry, args, i), None)
        carry, _ = eqxi.scan(
            body,
            carry,
            first + jnp.arange(length),
            kind="checkpointed",
            checkpoints=self.checkpoints,
        )
        return carry


class ForwardAdjoint(AbstractUnrolledAdjoint):
    """Carries the derivative in each number that is learned along with the run: for few
    of them, such as a ridge and step sizes. Memory does not grow with the number of
    steps; time grows with the number of learned ones, of which at most 100 are allowed.

    Source: Franceschi et al., *Forward and reverse gradient-based hyperparameter
    optimization*, 2017, Algorithm 2.
    """

    def loop(self, step, carry, args, first, length):
        """As [`eqdistill.AbstractUnrolledAdjoint`][].

        **Raises:**

        A `ValueError` if more than 100 numbers are differentiated.
        """
        return _forward((carry, args, first), step, length)


def _plain_loop(operands: PyTree, step: Step, length: int) -> PyTree:
    carry, args, first = operands
    body = lambda i, carry: step(carry, args, first + i)
    return jax.lax.fori_loop(0, length, body, carry)


_forward = eqx.filter_custom_vjp(_plain_loop)


@_forward.def_fwd
def _(perturbed, operands, step, length):
    learned, rest = eqx.partition(operands, perturbed)
    learned = eqx.filter(learned, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(learned)
    if flat.size > _MOST_TANGENTS:
        raise ValueError(
            f"`ForwardAdjoint` takes at most {_MOST_TANGENTS} learned numbers; got "
            f"{flat.size}. Take `DirectAdjoint` for images."
        )

    def run(flat):
        carry = _plain_loop(eqx.combine(unravel(flat), rest), step, length)
        return eqx.partition(carry, eqx.is_inexact_array)

    push = lambda tangent: jax.jvp(run, (flat,), (tangent,), has_aux=True)
    out, tangents, others = jax.vmap(push, out_axes=(None, 0, None))(
        jnp.eye(flat.size, dtype=flat.dtype)
    )
    return eqx.combine(out, others), tangents


@_forward.def_bwd
def _(tangents, cotangent, perturbed, operands, step, length):
    del step, length
    learned = eqx.filter(eqx.filter(operands, perturbed), eqx.is_inexact_array)
    _, unravel = ravel_pytree(learned)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x[0]), tangents)
    cotangent = with_zeros(eqx.filter(cotangent, eqx.is_inexact_array), zeros)
    dot = lambda x: jnp.asarray(optax.tree.vdot(x, cotangent))
    return unravel(jax.vmap(dot)(tangents))


def with_zeros(cotangent: PyTree, zeros: PyTree) -> PyTree:
    """A cotangent with zeros in the place of what is not differentiated."""
    return jax.tree.map(
        lambda zero, x: zero if x is None else x,
        zeros,
        cotangent,
        is_leaf=lambda x: x is None,
    )
