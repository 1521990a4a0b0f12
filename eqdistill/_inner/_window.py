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
    """Which steps of a training run are differentiated. The run ends with the window.

    **Attributes:**

    - `size`: the number of steps that are differentiated.
    """

    size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def start(
        self,
        steps: int,
        norms: Callable[[], Float[Array, " steps"]],
        *,
        key: PRNGKeyArray | None,
    ) -> Int[Array, ""]:
        """Chooses the first step of the window.

        **Arguments:**

        - `steps`: the number of steps of the whole run.
        - `norms`: computes the norm of the gradient at each step of the whole run,
            which takes as long as the run without its derivative.
        - `key`: a `jax.random.key`, or `None` if there is none. (Keyword only
            argument.)

        **Returns:**

        The number of the first step, from 0 to `steps - size`.
        """


class LastSteps(AbstractWindow):
    """The last steps of the run: truncated back-propagation through time.

    Source: Williams and Peng, *An efficient gradient-based algorithm for on-line
    training of recurrent network trajectories*, 1990; Shaban et al., *Truncated
    back-propagation for bilevel optimization*, 2019.

    **Attributes:**

    - `size`: the number of steps that are differentiated.
    """

    size: int = eqx.field(converter=as_int)

    def __check_init__(self):
        check_at_least(1, size=self.size)

    def start(self, steps, norms, *, key):
        """As [`eqdistill.AbstractWindow`][]."""
        del norms, key
        return jnp.array(steps - self.size)


class RandomWindow(AbstractWindow):
    """A window that starts anywhere in the run, each start as likely as any other.

    Source: Feng, Vedantam and Kempe, *Embarrassingly simple dataset distillation*
    (RaT-BPTT), 2024: 200 steps, and a window of 60.

    **Attributes:**

    - `size`: the number of steps that are differentiated.
    """

    size: int = eqx.field(converter=as_int)

    def __check_init__(self):
        check_at_least(1, size=self.size)

    def start(self, steps, norms, *, key):
        """As [`eqdistill.AbstractWindow`][].

        **Raises:**

        A `ValueError` if there is no `key`.
        """
        del norms
        key = _check_key("RandomWindow", key)
        return jr.randint(key, (), 0, steps - self.size + 1, dtype=jnp.int32)


class GradientWindow(AbstractWindow):
    r"""A window that starts where the gradients are large: the start $s$ is drawn with
    probability

    $$p_s \propto \Big(\sum_{t=s}^{s+k-1} \|g_t\|\Big)^{a},$$

    from the norms of the gradients $g_t$ of the whole run, which is taken once more
    for that, without its derivative.

    It is in the spirit of Li et al., *Beyond random: automatic inner-loop optimization
    in dataset distillation* (AT-BPTT), 2025, who choose windows by the gradients' own
    behaviour too, in another way at each stage of the outer loop.

    **Attributes:**

    - `size`: the number of steps $k$ that are differentiated.
    - `power`: the power $a$: 1 prefers large gradients, -1 small ones, and with 0 it is
        an [`eqdistill.RandomWindow`][].
    """

    size: int = eqx.field(converter=as_int)
    power: float = eqx.field(default=1.0, converter=as_float)

    def __check_init__(self):
        check_at_least(1, size=self.size)
        check_at_least(-math.inf, power=self.power)

    def start(self, steps, norms, *, key):
        """As [`eqdistill.AbstractWindow`][].

        **Raises:**

        A `ValueError` if there is no `key`.
        """
        key = _check_key("GradientWindow", key)
        total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(norms())])
        sums = total[self.size :] - total[: -self.size]
        # A run that has diverged has a start, too.
        logits = jnp.nan_to_num(self.power * jnp.log(sums))
        return jr.categorical(key, logits).astype(jnp.int32)


def _check_key(name: str, key: PRNGKeyArray | None) -> PRNGKeyArray:
    if key is None:
        raise ValueError(
            f"`key` must be given with a `{name}`, which draws its start; got None."
        )
    return key
