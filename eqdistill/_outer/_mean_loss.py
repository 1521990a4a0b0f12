import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class AbstractLayout(eqx.Module):
    """Real images, laid out once for many passes over them."""

    @abc.abstractmethod
    def value(self, classifier: PyTree) -> Float[Array, ""]:
        """The mean cross-entropy of a classifier on all images."""

    @abc.abstractmethod
    def value_and_grad(self, classifier: PyTree) -> tuple[Float[Array, ""], PyTree]:
        """The same, and its gradient in the floating-point arrays of the classifier."""


@eqx.filter_custom_jvp
def mean_loss(classifier: PyTree, layout: AbstractLayout) -> Float[Array, ""]:
    """The mean cross-entropy of a classifier on all images, differentiable in the
    classifier, forward and backward."""
    return layout.value(classifier)


@mean_loss.def_jvp
def _(primals, tangents):
    # The gradient is taken with the value, while the images are in the cache.
    classifier, layout = primals
    classifier_dot, layout_dot = tangents
    if jax.tree.leaves(layout_dot):
        raise NotImplementedError(
            "The outer loss cannot be differentiated in the data."
        )
    loss, gradient = layout.value_and_grad(classifier)
    gradient = eqx.filter(gradient, jax.tree.map(lambda _: True, classifier_dot))
    terms = jax.tree.map(
        lambda g, dot: jnp.sum(g.astype(loss.dtype) * dot.astype(loss.dtype)),
        gradient,
        classifier_dot,
    )
    return loss, sum(jax.tree.leaves(terms), start=jnp.zeros_like(loss))
