import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._checks import check_at_least
from .._conversions import as_float, as_int


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
