"""Which steps of a training run are differentiated, and how."""

import abc
import math
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_at_least
from .._conversions import as_float, as_int, as_int_or_none


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
    optimal online checkpointing*, 2010, as implemented in Equinox.

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


class AbstractWindow(eqx.Module):
    """Chooses the steps of a training run that are differentiated. The run ends with
    the last step of the window.

    **Attributes:**

    - `size`: the number of steps that are differentiated.
    """

    size: eqx.AbstractVar[int]

    def __check_init__(self):
        check_at_least(1, size=self.size)

    @abc.abstractmethod
    def start(
        self,
        steps: int,
        norms: Callable[[], Float[Array, " steps"]],
        *,
        key: PRNGKeyArray,
    ) -> Int[Array, ""]:
        """**Arguments:**

        - `steps`: the number of steps of the whole run.
        - `norms`: computes the norm of the gradient at each step of the whole run. A
            call costs one run without its derivative.
        - `key`: a `jax.random.key`. (Keyword only argument.)

        **Returns:**

        The index of the first step, from 0 to `steps - size`.
        """


class LastSteps(AbstractWindow):
    """The last steps of the run: truncated backpropagation through time.

    Source: Williams and Peng, *An efficient gradient-based algorithm for on-line
    training of recurrent network trajectories*, 1990; Shaban et al., *Truncated
    back-propagation for bilevel optimization*, 2019.
    """

    size: int = eqx.field(converter=as_int)

    def start(self, steps, norms, *, key):
        return jnp.array(steps - self.size)


class RandomWindow(AbstractWindow):
    """A window whose start is drawn uniformly.

    Source: Feng, Vedantam and Kempe, *Embarrassingly simple dataset distillation*
    (RaT-BPTT), 2024, with 200 steps and a window of 60.
    """

    size: int = eqx.field(converter=as_int)

    def start(self, steps, norms, *, key):
        return jr.randint(key, (), 0, steps - self.size + 1, dtype=jnp.int32)


class GradientWindow(AbstractWindow):
    r"""A window that prefers steps with large gradients. Its start $s$ is drawn with
    probability

    $$p_s \propto \Big(\sum_{t=s}^{s+k-1} \|g_t\|\Big)^{a},$$

    where $g_t$ are the gradients of the whole run. This costs one more run, without its
    derivative.

    Source: a simplification of Li et al., *Beyond random: automatic inner-loop
    optimization in dataset distillation* (AT-BPTT), 2025, who also choose windows by
    the gradients, with a different rule at each stage of the outer loop.

    **Attributes:**

    - `size`: the number of steps $k$ that are differentiated.
    - `power`: the power $a$. A positive power prefers large gradients, a negative one
        small gradients, and 0 gives [`eqdistill.adjoints.RandomWindow`][].
    """

    size: int = eqx.field(converter=as_int)
    power: float = eqx.field(default=1.0, converter=as_float)

    def __check_init__(self):
        check_at_least(-math.inf, power=self.power)

    def start(self, steps, norms, *, key):
        total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(norms())])
        sums = total[self.size :] - total[: -self.size]
        # A diverged run needs a valid start as well.
        logits = jnp.nan_to_num(self.power * jnp.log(sums))
        return jr.categorical(key, logits).astype(jnp.int32)
