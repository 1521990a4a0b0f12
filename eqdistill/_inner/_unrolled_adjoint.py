import abc
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .._checks import check_at_least
from .._conversions import as_int_or_none


Carry = TypeVar("Carry", bound=PyTree)
Step = Callable[[Carry, PyTree, Int[Array, ""]], Carry]


class AbstractUnrolledAdjoint(eqx.Module):
    """Differentiates the steps of a finite training run."""

    @abc.abstractmethod
    def loop(
        self, step: Step, carry: Carry, args: PyTree, first: Int[Array, ""], length: int
    ) -> Carry:
        """**Arguments:**

        - `step`: one step, a pure function of the carry, `args` and the index of the
            step. It must not close over differentiated arrays.
        - `carry`: the arrays that a step updates.
        - `args`: all other arrays that are differentiated.
        - `first`: the index of the first step.
        - `length`: the number of steps.

        **Returns:**

        The carry after the last step.
        """


class DirectAdjoint(AbstractUnrolledAdjoint):
    """Backpropagates through the steps. Forward mode works too.

    The parameters and the state of the optimiser are stored for each step. Activations
    are recomputed in the backward pass, which is faster than storing them
    (`python examples/papers/hypergradients.py`).
    """

    def loop(self, step, carry, args, first, length):
        @jax.checkpoint
        def body(carry, i):
            return step(carry, args, i), None

        return jax.lax.scan(body, carry, first + jnp.arange(length))[0]


class RecursiveCheckpointAdjoint(AbstractUnrolledAdjoint):
    """Backpropagates through the steps while storing only a few of them. The steps in
    between are recomputed from the last stored one.

    Forward mode is not supported.

    Source: Griewank, *Achieving logarithmic growth of temporal and spatial complexity
    in reverse automatic differentiation*, 1992; Stumm and Walther, *New algorithms for
    optimal online checkpointing*, 2010, in the implementation of Equinox.

    **Attributes:**

    - `checkpoints`: the number of stored steps, or `None` for a number proportional to
        the square root of the number of steps.
    """

    checkpoints: int | None = eqx.field(default=None, converter=as_int_or_none)

    def __check_init__(self):
        check_at_least(1, checkpoints=self.checkpoints)

    def loop(self, step, carry, args, first, length):
        return eqxi.scan(
            lambda carry, i: (step(carry, args, i), None),
            carry,
            first + jnp.arange(length),
            kind="checkpointed",
            checkpoints=self.checkpoints,
        )[0]
