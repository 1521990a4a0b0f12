from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PyTree

from .._checks import check_at_least, check_make
from .._classifier import last_layer, LinearClassifier, LogisticRegression
from .._conversions import as_int
from ._flat_network import FlatNetworks
from ._models import AbstractModels
from ._pool import check_networks


class RandomFeatures(AbstractModels[None]):
    r"""One linear head on the concatenated features of several random networks,
    $\phi(x) = (\phi_1(x), \dots, \phi_K(x))$. The networks are drawn again in each
    step. As $K$ grows, the kernel of the features approaches the mean kernel of such
    networks.

    Source: Loo et al., *Efficient Dataset Distillation Using Random Feature
    Approximation* (RFAD), 2022.
    """

    networks: FlatNetworks = eqx.field(static=True)
    num_networks: int = eqx.field(static=True, converter=as_int)

    def __init__(
        self, make: Callable, *, num_networks: int = 8, where: Callable | None = None
    ):
        """**Arguments:**

        - `make`: a function `make(*, key)` that builds a network.
        - `num_networks`: the number of networks $K$. (Keyword only argument.)
        - `where`: as for [`eqdistill.Pool`][]. (Keyword only argument.)

        **Raises:**

        A `TypeError` as for [`eqdistill.Pool`][]; a `ValueError` if `num_networks` is
        less than 1.
        """
        check_make("make", make)
        check_at_least(1, num_networks=num_networks)
        self.networks = FlatNetworks(make, where)
        self.num_networks = num_networks

    def init(self, distilled, *, key):
        """Like [`eqdistill.AbstractModels`][]. Raises as [`eqdistill.Pool`][] does."""
        del key
        check_networks((self.networks,), distilled)
        return None

    def draw(self, state, *, key):
        del state
        flats = jax.lax.map(self.networks.draw, jr.split(key, self.num_networks))
        stacked = eqx.filter_vmap(self.networks.network)(flats)
        num_outputs, width = self.networks.head.weight.shape
        dtype = self.networks.head.weight.dtype
        width = self.num_networks * width
        head = LogisticRegression(width, num_outputs, dtype=dtype).head
        return LinearClassifier(_Concatenated(stacked, self.networks.where), head)

    def update(self, state, distilled, *, key):
        del distilled, key
        return state


class _Concatenated(eqx.Module):
    """The features of several networks, whose arrays are stacked."""

    networks: PyTree
    where: Callable | None = eqx.field(static=True)

    def __call__(self, image: Array) -> Float[Array, " p"]:
        features = lambda network: last_layer(network, self.where).features(image)
        return jnp.ravel(eqx.filter_vmap(features)(self.networks))
