import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree


class AbstractLayout(eqx.Module):
    """Real images, laid out once for many passes over them."""

    @abc.abstractmethod
    def value(self, model: PyTree) -> Float[Array, ""]:
        """The mean cross-entropy of a model on all images."""

    @abc.abstractmethod
    def value_and_grad(
        self, moving: PyTree, fixed: PyTree
    ) -> tuple[Float[Array, ""], PyTree]:
        """The same of a model in two parts, and its gradient in the first."""


@eqx.filter_custom_jvp
def mean_loss(model: PyTree, layout: AbstractLayout) -> Float[Array, ""]:
    """The mean cross-entropy of a model on all images, differentiable in the
    model, forward and backward."""
    return layout.value(model)


@mean_loss.def_jvp
def _(primals, tangents):
    # The gradient is taken with the value, while the images are in the cache.
    model, layout = primals
    classifier_dot, layout_dot = tangents
    if jax.tree.leaves(layout_dot):
        raise NotImplementedError(
            "The outer loss cannot be differentiated in the data."
        )
    # Arrays that are frozen have no tangent, and no gradient is taken in them.
    is_moving = jax.tree.map(
        lambda dot: dot is not None, classifier_dot, is_leaf=lambda x: x is None
    )
    moving, fixed = eqx.partition(model, is_moving)
    loss, gradient = layout.value_and_grad(moving, fixed)
    dot = optax.tree.cast_like(classifier_dot, gradient)
    return loss, jnp.asarray(optax.tree.vdot(gradient, dot), loss.dtype)
