from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._data._distilled_set import DistilledSet
from .._inner._auto_solver import AutoSolver
from .._inner._inner_solver import AbstractInnerSolver
from .._losses import CrossEntropy, SquaredError
from .._models._models import AbstractModels, as_models
from .._typechecking import describe


def unchanged(distilled: DistilledSet, num_classes: int) -> DistilledSet:
    del num_classes
    return distilled


class Recipe(eqx.Module):
    """Everything that decides the accuracy of a distilled set: which models are trained
    on it, and how. The functions in `eqdistill.recipes` return published recipes.

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
    - `name`, `settings`: the function that returned the recipe, and its arguments after
        `make`, in pairs: `recipes.dc(make, **dict(settings))` returns it again.
    """

    models: AbstractModels = eqx.field(converter=as_models)
    inner: AbstractInnerSolver = AutoSolver()
    prepare: Callable[..., DistilledSet] = eqx.field(static=True, default=unchanged)
    name: str = eqx.field(static=True, default="custom")
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())


def relabel(
    hard: bool, weight_decay: float, distilled: DistilledSet, num_classes: int
) -> DistilledSet:
    """Replaces the loss by cross-entropy on hard labels, or by squared error on
    targets. Soft labels become targets."""
    labels = distilled.labels
    if hard and labels.ndim != 1:
        raise ValueError(
            "`distilled` must have class indices as labels for this recipe; got "
            f"{describe(labels)}. For soft labels or targets, use a recipe such as "
            "`recipes.feature_regression`."
        )
    if labels.ndim == 2 and isinstance(distilled.loss, CrossEntropy):
        labels = jax.nn.softmax(labels) - 1 / num_classes
    # Without weight decay, the logarithm of the ridge is minus infinity.
    log_l2 = jnp.log(jnp.asarray(weight_decay, distilled.images.dtype))
    return eqx.tree_at(
        lambda d: (d.labels, d.loss, d.log_l2),
        distilled,
        (labels, CrossEntropy() if hard else SquaredError(), log_l2),
    )
