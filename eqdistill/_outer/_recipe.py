from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._data._distilled_set import DistilledSet
from .._inner._auto_solver import AutoSolver
from .._inner._inner_solver import AbstractInnerSolver
from .._losses import AbstractLoss, CrossEntropy, SquaredError
from .._models._models import AbstractModels, as_models


def unchanged(distilled: DistilledSet, num_classes: int) -> DistilledSet:
    del num_classes
    return distilled


class Recipe(eqx.Module):
    """Everything that decides the accuracy of a distilled set: which models are trained
    on it, and how. The same images score very differently under two recipes.

    The functions in `eqdistill.recipes` return published recipes. This is your own:

    !!! Example

        ```python
        make = functools.partial(eqd.nn.ConvNet, test.shape, test.num_classes)
        training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, steps=100)
        recipe = eqd.recipes.Recipe(eqd.Fresh(make), training)
        ```

    **Attributes:**

    - `models`: an [`eqdistill.AbstractModels`][]; or a plain model, which is always
        trained from the parameters it has.
    - `inner`: the inner solver that trains each model.
    - `prepare`: called as `prepare(distilled, num_classes)`, with the number of classes
        of the real data. Returns the distilled set with the loss, labels and ridge of
        the recipe. By default, the same set.
    - `name`: the name of the function that returned the recipe, or any other name.
    - `settings`: the arguments of that function after `make`, as pairs of a name and a
        value: `recipes.dc(make, **dict(settings))` returns this recipe again.
    """

    models: AbstractModels = eqx.field(converter=as_models)
    inner: AbstractInnerSolver = AutoSolver()
    prepare: Callable[[DistilledSet, int], DistilledSet] = eqx.field(
        static=True, default=unchanged
    )
    name: str = eqx.field(static=True, default="custom")
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())


def with_hard_labels(
    weight_decay: float, distilled: DistilledSet, num_classes: int
) -> DistilledSet:
    del num_classes
    if distilled.labels.ndim != 1:
        raise ValueError(
            "`distilled` must have class indices as labels for this recipe; got "
            f"{distilled.labels.dtype} labels of shape {distilled.labels.shape}. For "
            "soft labels or targets, use a recipe such as `feature_regression`."
        )
    return _replace(distilled, CrossEntropy(), weight_decay)


def with_targets(
    weight_decay: float, distilled: DistilledSet, num_classes: int
) -> DistilledSet:
    is_soft = distilled.labels.ndim == 2
    if is_soft and isinstance(distilled.loss, CrossEntropy):
        targets = jax.nn.softmax(distilled.labels) - 1 / num_classes
        distilled = eqx.tree_at(lambda d: d.labels, distilled, targets)
    return _replace(distilled, SquaredError(), weight_decay)


def _replace(
    distilled: DistilledSet, loss: AbstractLoss, weight_decay: float
) -> DistilledSet:
    # Without weight decay, the logarithm of the ridge is minus infinity.
    log_l2 = jnp.log(jnp.asarray(weight_decay, distilled.images.dtype))
    return eqx.tree_at(lambda d: (d.loss, d.log_l2), distilled, (loss, log_l2))
