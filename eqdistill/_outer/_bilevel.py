import functools as ft
from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._classifier import takes_pixels
from .._data._distilled_set import DistilledSet
from .._inner._auto_solver import AutoSolver
from .._inner._fit import check_fit, COLLAPSED, NOT_CONVERGED, solve
from .._inner._inner_solver import AbstractInnerSolver, stop_gradient
from .._losses import AbstractLoss, DefaultOuterLoss
from .._models._models import AbstractModels, as_models, Fixed
from .._sharding import vary_like
from ._data import AbstractData, example_loss, FullBatch
from ._objective import AbstractObjective, Outcome
from ._sorted_pixels import SortedPixels


class Bilevel(AbstractObjective[PyTree]):
    r"""The loss on real data of a model that is fitted to the distilled set,

    $$F(\theta) = \frac{1}{N} \sum_{i=1}^N \ell(w^\star(\theta)(x_i), y_i), \qquad
    w^\star(\theta) = \arg\min_w f(w; \theta) + \frac{\lambda}{2} \|w\|^2.$$

    Its gradient in $\theta$ is the hypergradient.

    !!! Example

        ```python
        objective = eqd.Bilevel(eqd.Pool(make), loss=eqd.CrossEntropy(0.2))
        result = eqd.distill(start, objective, eqd.Batches(train, 128))
        ```

    Source: the bilevel problem is that of JAXopt's dataset-distillation notebook; its
    gradient by implicit differentiation is from Pedregosa 2016, equation (2).
    """

    models: AbstractModels
    inner: AbstractInnerSolver
    loss: AbstractLoss | None
    failures: tuple[str, ...] = eqx.field(
        default=(NOT_CONVERGED, COLLAPSED), static=True
    )

    def __init__(
        self,
        model: PyTree,
        inner: AbstractInnerSolver = AutoSolver(),
        loss: AbstractLoss | None = None,
    ):
        """**Arguments:**

        - `model`: the model that is fitted, an `equinox.Module` that maps one example
            to its outputs, of shape `(c,)`. Or an [`eqdistill.AbstractModels`][], such
            as [`eqdistill.Pool`][], which provides a model in each step.
        - `inner`: how the model is fitted.
        - `loss`: the outer loss $\\ell$, applied to the unscaled outputs. Defaults to
            the loss of the distilled set, unless that is the squared error and the real
            data have class indices. The default is then the cross-entropy of five times
            the outputs, because targets differ by one between classes.

        **Raises:**

        A `TypeError` if `model` is a class or a function. Write `Fresh(make)` or
        `Pool(make)` for a function that builds networks.
        """
        self.models = as_models(model)
        self.inner = inner
        self.loss = loss

    def init(self, distilled, *, key):
        """**Raises:** a `TypeError` or `ValueError` as for [`eqdistill.fit`][]."""
        models_key, draw_key, inner_key = jr.split(key, 3)
        models = self.models.init(distilled, key=models_key)
        model = self.models.draw(models, key=draw_key)
        check_fit(distilled, model)
        return models, self.inner.init(distilled, model, key=inner_key)

    def __call__(self, distilled, data, state, *, step, key):
        """**Raises:** a `ValueError` if the data have images of a different shape from
        the distilled set, or more classes than the model has outputs."""
        data_key, models_key, inner_key = jr.split(key, 3)
        models_key, inner_key = (
            jr.fold_in(own_key, step) for own_key in (models_key, inner_key)
        )
        models, inner_state = state
        model = vary_like(self.models.draw(models, key=models_key), distilled)
        mean = ft.partial(data.mean, step=step, key=data_key)
        value, outcome = self.of_model(
            distilled, data, model, mean, inner_state, key=inner_key
        )
        models = self.models.update(models, stop_gradient(distilled), key=models_key)
        return value, replace(outcome, state=(models, outcome.state))

    def of_model(
        self,
        distilled: DistilledSet,
        data: AbstractData,
        model: PyTree,
        mean: Callable,
        inner_state: PyTree,
        *,
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, ""], Outcome[PyTree]]:
        """The loss of a model that was drawn, and the outcome with the new state of the
        inner solver. `mean(fn, model)` is a mean over real examples of `data`."""
        _check_data(data, distilled, check_fit(distilled, model))
        fitted, inner_state = solve(distilled, model, self.inner, inner_state, key)
        loss = DefaultOuterLoss(distilled.loss) if self.loss is None else self.loss
        network = eqx.nn.inference_mode(fitted.model)
        value = mean(example_loss, (loss, network))
        failure = jnp.where(fitted.collapsed, 2, jnp.where(fitted.converged, 0, 1))
        metrics = {"inner_residual": fitted.gradient_norm}
        return value, Outcome(inner_state, failure, metrics)

    def layout(self, dataset):
        """Like [`eqdistill.AbstractObjective`][]. For logistic regression the pixels
        are sorted, so that pixels that are mostly background cost little."""
        is_linear = isinstance(self.models, Fixed) and takes_pixels(self.models.model)
        is_plain = dataset.sharding is None and not dataset.has_targets
        is_plain &= dataset.weights is None
        return SortedPixels(dataset) if is_linear and is_plain else FullBatch(dataset)


def _check_data(data: AbstractData, distilled: DistilledSet, num_outputs: int) -> None:
    shape = distilled.images.shape[1:]
    found = getattr(data, "shape", shape)
    if found != shape:
        raise ValueError(
            f"`data` must have images of the shape of the distilled images, {shape}; "
            f"got {found}."
        )
    num_classes = getattr(data, "num_classes", 0)
    if num_outputs < num_classes:
        raise ValueError(
            f"`model` must have an output for each of the {num_classes} classes or "
            f"targets of `data`; it has {num_outputs}."
        )
