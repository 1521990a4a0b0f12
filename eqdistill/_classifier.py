from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


@runtime_checkable
class HasPenalised(Protocol):
    """A classifier that leaves some of its parameters out of the ridge penalty."""

    def penalised(self) -> PyTree[bool]:
        """A pytree of bools with the structure of the classifier: which of its leaves
        the ridge penalty is taken over."""
        ...


class LogisticRegression(eqx.Module):
    r"""Multiclass logistic regression: $x \mapsto W^\top \mathrm{vec}(x) + b$.

    The intercept $b$ is optional, and is not penalised by the ridge.
    """

    weights: Float[Array, "p c"]
    intercept: Float[Array, " c"] | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        use_intercept: bool = False,
        dtype=None,
    ):
        """**Arguments:**

        - `in_features`: the number of pixels $p$ of one image, of whatever shape.
        - `num_classes`: the number of classes $c$.
        - `use_intercept`: whether to add an unpenalised intercept.
        - `dtype`: the parameters' dtype. Defaults to JAX's default floating dtype.

        **Raises:**

        A `ValueError` if either size is not positive.

        All parameters start at zero: the inner problem is convex, so that its solution
        does not depend on where the solver starts.
        """
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1; got {value}.")
        dtype = jnp.result_type(float) if dtype is None else dtype
        self.weights = jnp.zeros((in_features, num_classes), dtype)
        self.intercept = jnp.zeros(num_classes, dtype) if use_intercept else None

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " c"]:
        """**Arguments:**

        - `image`: one image, with `in_features` pixels.

        **Returns:**

        The logits of the classes.

        **Raises:**

        A `ValueError` if the image does not have `in_features` pixels.
        """
        in_features, _ = self.weights.shape
        if image.size != in_features:
            raise ValueError(
                f"`image` must have {in_features} pixels, the `in_features` of this "
                f"`LogisticRegression`; got shape {image.shape}."
            )
        # For the weights' gradient over many images XLA then multiplies by the images
        # as they lie in memory, which on CPUs is twice as fast as by their transpose.
        weights = jax.lax.optimization_barrier(self.weights.T).T
        logits = image.reshape(-1) @ weights
        return logits if self.intercept is None else logits + self.intercept

    def penalised(self) -> "LogisticRegression":
        """Which parameters the ridge penalty is taken over: not the intercept."""
        return eqx.tree_at(
            lambda c: (c.weights, c.intercept),
            self,
            (True, None if self.intercept is None else False),
            is_leaf=lambda x: x is None,
        )


def squared_norm(classifier: PyTree) -> Float[Array, ""]:
    r"""The squared norm $\|w\|^2$ of a classifier's penalised parameters: of every
    floating-point array in it, or of those that its `penalised` method names."""
    if isinstance(classifier, HasPenalised):
        classifier = eqx.filter(classifier, classifier.penalised())
    leaves = jax.tree.leaves(eqx.filter(classifier, eqx.is_inexact_array))
    return sum((jnp.sum(leaf**2) for leaf in leaves), start=jnp.array(0.0))
