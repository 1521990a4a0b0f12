from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._classifier import LinearClassifier
from .._data._distilled_set import DistilledSet
from .._losses import AbstractLoss
from .._typechecking import describe
from ._inner_solver import AbstractInnerSolver
from ._linear import check_linear, with_head
from ._ridge_solver import RidgeSolver


class RelativeRidge(AbstractInnerSolver[PyTree]):
    r"""Fits an [`eqdistill.linear.LinearClassifier`][] with a ridge relative to the
    size of its features. Before the fit, the features $\phi$ are multiplied by

    $$s = n \Big/ \sqrt{\textstyle \sum_{i=1}^n r_i \|\phi(\theta_i)\|^2},$$

    so that the mean squared norm of the features of $n$ images is $n$. The mean is
    weighted by the weights $r_i$ of the images, which are one by default. One ridge
    then suits networks whose features differ in size.

    The fitted model takes the unscaled features. `gradient_norm` is the norm for the
    problem with scaled features.

    Source: Zhou et al., *Dataset distillation using neural feature regression* (FRePo),
    2022, whose ridge is relative to the trace of the kernel.

    **Attributes:**

    - `inner`: the solver for the model with scaled features. Must return an
        [`eqdistill.linear.LinearClassifier`][].
    """

    inner: AbstractInnerSolver = RidgeSolver()

    def init(self, distilled, model, *, key):
        scaled, _ = _scale(distilled, model)
        return self.inner.init(distilled, scaled, key=key)

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """**Raises:** a `TypeError` if the model is not a `LinearClassifier`, or if
        `inner` raises one or returns another model."""
        scaled, factor = _scale(distilled, model)
        fitted, state = self.inner(distilled, scaled, state, key=key)
        if not isinstance(fitted.model, LinearClassifier):
            raise TypeError(
                "`inner` of `RelativeRidge` must return a `LinearClassifier`; "
                f"`{type(self.inner).__name__}` returned {describe(fitted.model)}."
            )
        head = fitted.model.head
        unscaled = with_head(model, factor * head.weight, head.bias)
        return replace(fitted, model=unscaled), state


def _scale_features(features, factor, image):
    return factor * features(image)


def _scale(
    distilled: DistilledSet, model: PyTree
) -> tuple[LinearClassifier, Float[Array, ""]]:
    model = check_linear("RelativeRidge", distilled, model, AbstractLoss)
    rows = jax.vmap(model.features)(distilled.images)
    # All features of a dead network are zero.
    positive = lambda x: jnp.where(x > 0, x, 1)
    # Divide by the largest entry, so that no square overflows or underflows.
    largest = positive(jnp.max(jnp.abs(jax.lax.stop_gradient(rows))))
    rows = distilled.weigh(rows / largest)
    total = positive(jnp.sum(rows**2))
    factor = len(rows) / largest * jax.lax.rsqrt(total)
    features = eqx.Partial(_scale_features, model.features, factor)
    scaled = LinearClassifier(features, model.head)
    return with_head(scaled, model.head.weight / factor, model.head.bias), factor
