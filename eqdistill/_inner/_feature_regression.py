from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from .._classifier import last_layer
from .._data._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver, State
from ._linear import with_head
from ._relative_ridge import RelativeRidge


class FeatureRegression(AbstractInnerSolver[State]):
    """Trains a network without a ridge, then refits its last layer to the learned
    features with [`eqdistill.linear.RelativeRidge`][], with the ridge of the distilled
    set and no intercept.

    Source: Zhou, Nezhadarya and Ba, *Dataset distillation using neural feature
    regression* (FRePo), 2022.

    **Attributes:**

    - `training`: the solver that trains the network.
    """

    training: AbstractInnerSolver[State]

    def init(self, distilled: DistilledSet, model: PyTree, *, key):
        return self.training.init(distilled, model, key=key)

    def __call__(self, distilled: DistilledSet, model: PyTree, state, *, key):
        """**Raises:** a `TypeError` if the model has no last linear layer
        ([`eqdistill.linear.last_layer`][])."""
        no_ridge = jnp.full_like(distilled.log_l2, -jnp.inf)
        free = eqx.tree_at(lambda d: d.log_l2, distilled, no_ridge)
        trained, state = self.training(free, model, state, key=key)
        last = last_layer(trained.model)
        last = with_head(last, last.head.weight, None)
        fitted, _ = RelativeRidge()(distilled, last, None, key=key)
        return replace(fitted, converged=trained.converged & fitted.converged), state
