import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import check_between, check_make
from .._conversions import ArrayOrList, as_array
from .._data._augmentation import Affine, Crop, Flip, OneOf
from .._data._distilled_set import DistilledSet
from .._inner._auto_solver import AutoSolver
from .._inner._feature_regression import FeatureRegression
from .._inner._inner_solver import AbstractInnerSolver
from .._inner._unrolled_solver import UnrolledSolver
from .._losses import CrossEntropy, SquaredError
from .._models._models import AbstractModels, as_models, Fresh
from .._typechecking import describe
from ..nn import initialise, lecun, zero_head


_MOST_UPDATES = 100_000


def _unchanged(distilled: DistilledSet, _: int) -> DistilledSet:
    return distilled


class Recipe(eqx.Module):
    """Everything that determines the accuracy of a distilled set: which models are
    trained on it, and how. The functions in `eqdistill.recipes` return published
    recipes.

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
        the recipe. By default, returns the same set.
    - `name`, `settings`: the function that returned the recipe, and its arguments after
        `make`, as pairs: `recipes.dc(make, **dict(settings))` returns it again.
    """

    models: AbstractModels = eqx.field(converter=as_models)
    inner: AbstractInnerSolver = AutoSolver()
    prepare: Callable[..., DistilledSet] = eqx.field(static=True, default=_unchanged)
    name: str = eqx.field(static=True, default="custom")
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())


def dc(make: Callable, *, updates: int = 300, augment: bool = False) -> Recipe:
    """The recipe of dataset condensation: cross-entropy on hard labels, by gradient
    descent on all distilled images. The learning rate is 0.01, and 0.001 in the second
    half of the steps. The momentum is 0.9 and the weight decay 5e-4.

    **Arguments:**

    - `make`: a function `make(*, key)` that builds a model. The paper's network is
        `functools.partial(eqdistill.nn.ConvNet, shape, num_classes)`, with `size=32`
        for greyscale images of 28 x 28.
    - `updates`: the number of steps, from 2 to 100,000.
    - `augment`: whether to crop, scale or rotate each image at random in each step. The
        paper's code does so for MNIST, with 1,000 updates.

    An evaluation raises a `ValueError` if the labels are not class indices.

    Source: Zhao, Mopuri and Bilen, *Dataset condensation with gradient matching*, 2021.
    """
    one_of = OneOf(Crop(4), Affine(scale=1.2), Affine(rotation=45))
    inner = _training(_sgd, 0.01, updates, augmentation=one_of if augment else None)
    relabel = ft.partial(_relabel, True, 5e-4)
    return _recipe("dc", make, inner, relabel, updates=updates, augment=augment)


def frepo(make: Callable, *, updates: int = 1000, augment: bool = False) -> Recipe:
    """The recipe of neural feature regression: squared error on centred targets, from
    LeCun's initial weights, by Adam on all distilled images. The learning rate rises to
    3e-4 over 500 steps, or half of the steps if that is less. It then decays along a
    cosine to a hundredth of that.

    Learned targets are used as they are. Soft labels become their probabilities minus
    $1/c$.

    **Arguments:** as for [`eqdistill.recipes.dc`][], except

    - `make`: the weights are redrawn by [`eqdistill.nn.initialise`][], which raises an
        error if it can't. The paper's network is an [`eqdistill.nn.ConvNet`][] with
        `widths=(128, 256, 512)` and `norm=None`.
    - `augment`: whether to flip each image from left to right at random in each step.

    Source: Zhou, Nezhadarya and Ba, *Dataset distillation using neural feature
    regression*, 2022.
    """
    optimiser, flip = ft.partial(_adam, min(500, updates // 2)), Flip()
    inner = _training(optimiser, 3e-4, updates, augmentation=flip if augment else None)
    settings = {"updates": updates, "augment": augment}
    return _recipe("frepo", make, inner, _TO_TARGETS, redraw=True, **settings)


def zero_start(make: Callable, *, updates: int = 500) -> Recipe:
    """This package's recipe for training all layers: squared error on centred targets,
    as in [`eqdistill.recipes.frepo`][], with a last layer that starts at zero. A few
    images cannot undo the effect of a random last layer. Training uses Adam, with a
    learning rate that decays along a cosine from 1e-3 to a hundredth of that.

    **Arguments:** as for [`eqdistill.recipes.dc`][]. The last layer of the models is
    found and set to zero by [`eqdistill.nn.zero_head`][].
    """
    inner = _training(_adam, 1e-3, updates)
    return _recipe("zero_start", make, inner, _TO_TARGETS, zero=True, updates=updates)


def feature_regression(make: Callable, *, updates: int = 100) -> Recipe:
    """This package's recipe for images that were distilled with an
    [`eqdistill.Pool`][]: a short training run with squared error on centred targets,
    after which the last layer is fitted as in the distillation. The training is as in
    [`eqdistill.recipes.zero_start`][], but from LeCun's initial weights and with a
    learning rate of 3e-4. Then ridge regression on the features replaces the last
    layer, without an intercept. Its ridge is 1e-3, relative to the features as in
    [`eqdistill.linear.RelativeRidge`][].

    **Arguments:** as for [`eqdistill.recipes.dc`][]. The weights of the models are
    changed by [`eqdistill.nn.initialise`][] and [`eqdistill.nn.zero_head`][].
    """
    inner = FeatureRegression(_training(_adam, 3e-4, updates))
    prepare, name = ft.partial(_relabel, False, 1e-3), "feature_regression"
    return _recipe(name, make, inner, prepare, redraw=True, zero=True, updates=updates)


def supervised(make: Callable, *, updates: int = 1000, batch_size: int = 128) -> Recipe:
    """Ordinary training on real data, for comparison: cross-entropy on hard labels, by
    Adam on batches. The learning rate decays along a cosine from 1e-3 to a hundredth of
    that. Pass all real images as the distilled set.

    **Arguments:** as for [`eqdistill.recipes.dc`][], and

    - `batch_size`: the number of images in a step, from 1 to their total number.
    """
    inner = _training(_adam, 1e-3, updates, batch_size=batch_size)
    relabel = ft.partial(_relabel, True, 0.0)
    settings: dict[str, Any] = {"updates": updates, "batch_size": batch_size}
    return _recipe("supervised", make, inner, relabel, **settings)


def learned_rates(
    make: Callable,
    *,
    learning_rates: ArrayOrList,
    batch_size: int,
    momentum: float = 0.0,
    adam: bool = False,
    seed: int | None = None,
) -> Recipe:
    r"""The recipe for a training run whose step sizes were distilled with the images:
    gradient descent or Adam, with one step size for each step, on batches of the
    distilled images in order. The loss, labels and ridge are those of the distilled
    set.

    **Arguments:** as for [`eqdistill.recipes.dc`][], except

    - `learning_rates`: the step size of each step: 1 to 100,000 positive numbers, such
        as `jnp.exp(result.objective.inner.log_hyperparameters["learning_rate"])`.
    - `batch_size`: the number of distilled images in a step, at least 1.
    - `momentum`: the momentum, in [0, 1); $\beta_1$ for Adam.
    - `adam`: whether to use Adam. Its `eps_root` is 1e-8, so that the steps have a
        derivative where a gradient is zero.
    - `seed`: the seed of the known initial weights that the set was distilled for: each
        model is `make(key=jax.random.key(seed))`. Defaults to fresh models.

    You can also distil with the `inner` of this recipe, and learn the step sizes.

    Source: Wang et al., *Dataset distillation*, 2018, Algorithm 1.
    """
    rates = np.asarray(as_array("learning_rates", learning_rates), np.float64)
    is_positive = ((rates > 0) & (rates < np.inf)).all()
    if rates.ndim != 1 or not 1 <= len(rates) <= _MOST_UPDATES or not is_positive:
        raise ValueError(
            f"`learning_rates` must be 1 to {_MOST_UPDATES:,} positive and finite step "
            f"sizes; got {describe(learning_rates)}."
        )
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1); got {momentum}.")
    optimiser = _one_rate_per_step(float(momentum), adam)
    options = {"batch_size": batch_size, "shuffle": False}
    inner = UnrolledSolver(optimiser, {"learning_rate": rates}, len(rates), **options)
    settings = {"batch_size": batch_size, "momentum": momentum, "adam": adam}
    settings |= {"learning_rates": tuple(rates.tolist()), "seed": seed}
    return _recipe("learned_rates", make, inner, _unchanged, **settings)


def _recipe(
    name: str,
    make: Callable,
    inner: AbstractInnerSolver,
    prepare: Callable,
    *,
    redraw: bool = False,
    zero: bool = False,
    **settings: Any,
) -> Recipe:
    check_make("make", make)
    for key, value in settings.items():
        settings[key] = value.item() if isinstance(value, np.generic) else value
    models = Fresh(ft.partial(_make, make, redraw, zero, settings.get("seed")))
    return Recipe(models, inner, prepare, name, tuple(settings.items()))


def _make(
    make: Callable, redraw: bool, zero: bool, seed: int | None, *, key: PRNGKeyArray
) -> PyTree:
    make_key, redraw_key = jr.split(key)
    model = make(key=make_key if seed is None else jr.key(seed))
    if redraw:
        model = initialise(model, lecun, key=redraw_key)
    return zero_head(model) if zero else model


def _relabel(
    hard: bool, weight_decay: float, distilled: DistilledSet, num_classes: int
) -> DistilledSet:
    """Replaces the loss with cross-entropy on hard labels, or with squared error on
    targets. Soft labels become targets."""
    labels, loss = distilled.labels, CrossEntropy() if hard else SquaredError()
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
    where = lambda d: (d.labels, d.loss, d.log_l2)
    return eqx.tree_at(where, distilled, (labels, loss, log_l2))


_TO_TARGETS = ft.partial(_relabel, False, 0.0)


def _training(
    optimiser: Callable, rate: float, updates: int, **kwargs: Any
) -> UnrolledSolver:
    check_between(2, _MOST_UPDATES, updates=updates)
    make = optimiser(updates=int(updates))
    return UnrolledSolver(make, {"learning_rate": rate}, updates, **kwargs)


# The optimisers are cached because a new function would trigger recompilation.
@ft.cache
def _sgd(updates: int) -> Callable:
    def make(learning_rate):
        schedule = optax.piecewise_constant_schedule(learning_rate, {updates // 2: 0.1})
        return optax.sgd(schedule, momentum=0.9)

    return make


@ft.cache
def _adam(warm_up: int = 0, *, updates: int) -> Callable:
    # Optax needs concrete numbers, so the learning rate multiplies the schedule.
    first = 0.0 if warm_up > 0 else 1.0
    factor = optax.warmup_cosine_decay_schedule(first, 1.0, warm_up, updates, 0.01)
    return lambda learning_rate: optax.adam(lambda step: learning_rate * factor(step))


@ft.cache
def _one_rate_per_step(momentum: float, adam: bool) -> Callable:
    def make(learning_rate):
        schedule = lambda step: learning_rate[step]
        if adam:
            return optax.adam(schedule, b1=momentum, eps_root=1e-8)
        # `None`, so that without momentum the optimiser has no state.
        return optax.sgd(schedule, momentum=momentum or None)

    return make
