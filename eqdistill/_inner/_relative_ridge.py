from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._classifier import LinearClassifier
from .._data._distilled_set import DistilledSet
from .._losses import AbstractLoss
from ._inner_solver import AbstractInnerSolver
from ._linear import check_linear, with_head
from ._ridge_solver import RidgeSolver


class RelativeRidge(AbstractInnerSolver[PyTree]):
    r"""Fits a [`eqdistill.LinearClassifier`][] with a ridge that is relative to its
    features: before the fit, the features $\phi$ are multiplied by

    $$s = n \Big/ \sqrt{\textstyle \sum_{i=1}^n \|\phi(\theta_i)\|^2},$$

    such that the mean squared norm of the features of $n$ images is $n$. The features
    of two networks differ in size, and one ridge serves both.

    The fitted model takes the features as they are. `gradient_norm` is that of the
    problem with scaled features.

    Source: Zhou et al., *Dataset distillation using neural feature regression* (FRePo),
    2022, whose ridge is relative to the trace of the kernel.
    """

    inner: AbstractInnerSolver

    def __init__(self, inner: AbstractInnerSolver = RidgeSolver()):
        """**Arguments:**

        - `inner`: fits the model with the scaled features, and returns another
            [`eqdistill.LinearClassifier`][].
        """
        self.inner = inner

    def init(self, distilled, model, *, key):
        """As [`eqdistill.AbstractInnerSolver`][]; raises as a call does."""
        scaled, _ = _scale(distilled, model)
        return self.inner.init(distilled, scaled, key=key)

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `TypeError` if the model is not a [`eqdistill.LinearClassifier`][], or as
        `inner` says.
        """
        scaled, factor = _scale(distilled, model)
        fitted, state = self.inner(distilled, scaled, state, key=key)
        if not isinstance(fitted.model, LinearClassifier):
            raise TypeError(
                "`inner` of `RelativeRidge` must return a `LinearClassifier`; "
                f"`{type(self.inner).__name__}` returned a "
                f"{type(fitted.model).__name__}."
            )
        head = fitted.model.head
        found = with_head(model, factor * head.weight, head.bias)
        return eqx.tree_at(lambda f: f.model, fitted, found), state


def _scale(
    distilled: DistilledSet, model: PyTree
) -> tuple[LinearClassifier, Float[Array, ""]]:
    model = check_linear("RelativeRidge", distilled, model, AbstractLoss)
    rows = jax.vmap(model.features)(distilled.images)
    # A network may have died: all of its features are zero, and stay so.
    positive = lambda x: jnp.where(x > 0, x, 1)
    # The squares of large and of small features are no numbers of their precision.
    largest = positive(jnp.max(jnp.abs(jax.lax.stop_gradient(rows))))
    total = positive(jnp.sum((rows / largest) ** 2))
    factor = len(rows) / largest * jax.lax.rsqrt(total)
    scaled = LinearClassifier(_Scaled(model.features, factor), model.head)
    return with_head(
        scaled, model.head.weight / factor, model.head.bias
    ), factor


class _Scaled(eqx.Module):
    features: Callable
    factor: Float[Array, ""]

    def __call__(self, image: Array) -> Array:
        return self.factor * self.features(image)
