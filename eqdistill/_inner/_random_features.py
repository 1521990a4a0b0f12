from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from .._checks import check_at_least
from .._classifier import last_layer, LinearClassifier, LogisticRegression
from .._conversions import as_int
from .._data._distilled_set import DistilledSet
from .._nn._network import Network
from ._drawn_network import Template
from ._inner_solver import AbstractDrawingSolver, AbstractInnerSolver
from ._relative_ridge import RelativeRidge


class RandomFeatures(AbstractDrawingSolver[None]):
    r"""Fits one linear head on the features of several fresh random networks side by
    side, $\phi(x) = (\phi_1(x), \dots, \phi_K(x))$, which are drawn anew in each fit.
    As $K$ grows, the kernel of the features becomes the mean of that of such networks.

    `model` must be `None` where this is the inner solver, and a `key` must be
    given.

    Source: Loo et al., *Efficient Dataset Distillation Using Random Feature
    Approximation* (RFAD), 2022.
    """

    network: Callable = eqx.field(static=True)
    num_classes: int = eqx.field(static=True, converter=as_int)
    num_networks: int = eqx.field(static=True, converter=as_int)
    inner: AbstractInnerSolver

    def __init__(
        self,
        network: Callable,
        *,
        num_classes: int,
        num_networks: int = 8,
        inner: AbstractInnerSolver = RelativeRidge(),
    ):
        """**Arguments:**

        - `network`: makes a network, as for [`eqdistill.Pool`][].

        All other arguments are keyword only.

        - `num_classes`: the number of classes $c$.
        - `num_networks`: the number of networks $K$.
        - `inner`: fits the head: with [`eqdistill.SquaredError`][] by default, and with
            [`eqdistill.CrossEntropy`][] by `RelativeRidge(SpanSolver())`.

        **Raises:**

        A `ValueError` if there is no class or no network.
        """
        check_at_least(1, num_classes=num_classes, num_networks=num_networks)
        self.network = network
        self.num_classes = num_classes
        self.num_networks = num_networks
        self.inner = inner

    def init(self, distilled, model, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `ValueError` if there is no `key`. A `TypeError` for a network that cannot be
        drawn.
        """
        del model
        if key is None:
            raise ValueError(
                "`key` must be given with `RandomFeatures`, which draws networks; got "
                "None."
            )
        self._template(distilled)
        return None

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][]."""
        del model
        assert key is not None  # As `init` has checked.
        template = self._template(distilled)
        weights = jax.vmap(template.draw)(jr.split(key, self.num_networks))
        networks = eqx.filter_vmap(template.network)(weights)
        in_features = self.num_networks * template.in_features
        head = LogisticRegression(
            in_features, self.num_classes, dtype=weights.dtype
        ).head
        drawn = LinearClassifier(_SideBySide(networks), head)
        inner_state = self.inner.init(distilled, drawn, key=None)
        fitted, _ = self.inner(distilled, drawn, inner_state, key=None)
        return fitted, state

    def _template(self, distilled: DistilledSet) -> Template:
        shape = distilled.images.shape[1:]
        return Template("network", self.network, shape, self.num_classes)


class _SideBySide(eqx.Module):
    """The features of several networks, whose arrays are stacked."""

    networks: Network

    def __call__(self, image: Array) -> Array:
        features = lambda network: last_layer(network).features(image)
        return jnp.ravel(eqx.filter_vmap(features)(self.networks))
