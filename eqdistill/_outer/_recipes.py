import functools as ft
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float

from .._conversions import as_array, as_float, as_int, as_int_or_none
from .._data._augmentation import OneOf
from .._data._image_augmentations import Affine, Crop, Flip
from .._inner._feature_regression import FeatureRegression
from .._inner._unrolled_solver import UnrolledSolver
from .._nn._networks import ConvNet, LeNet
from ._recipe import Recipe
from ._recipe_parts import (
    as_by_lecun,
    as_distilled,
    as_it_is,
    by_step,
    check_updates,
    drops_at_half,
    from_zero,
    from_zero_by_lecun,
    MOST_UPDATES,
    warms_up,
    with_hard_labels,
    with_seed,
    with_targets,
)


def dc(
    network: Callable = ConvNet, *, updates: int = 300, augment: bool = False
) -> Recipe:
    """The recipe of dataset condensation: cross-entropy on hard labels, and stochastic
    gradient descent at a rate of 0.01, a tenth of that in the second half of the steps,
    with a momentum of 0.9 and a weight decay of 5e-4. All images are in each step.

    **Arguments:**

    - `network`: makes a network from the shape of an image, the number of classes and a
        `key`. The default is the paper's for colour images. The paper pads grey images
        of 28 x 28: `functools.partial(eqdistill.nn.ConvNet, size=32)`.
    - `updates`: the number of steps. (Keyword only argument.)
    - `augment`: whether each image is cropped, scaled or rotated at random in each
        step. The paper's code does so for MNIST, with 1,000 updates. (Keyword only
        argument.)

    **Returns:**

    An [`eqdistill.recipes.Recipe`][].

    **Raises:**

    A `ValueError` if `updates` is not from 2 to 100,000.

    Source: Zhao, Mopuri and Bilen, *Dataset condensation with gradient matching*, 2021.
    """
    updates = check_updates(updates)
    inner = UnrolledSolver(
        drops_at_half(updates),
        {"learning_rate": 0.01},
        updates,
        augmentation=OneOf(Crop(4), Affine(scale=1.2), Affine(rotation=45))
        if augment
        else None,
    )
    settings = (("updates", updates), ("augment", augment))
    prepare = ft.partial(with_hard_labels, "dc", 5e-4)
    return Recipe("dc", settings, network, as_it_is, prepare, inner)


def frepo(
    network: Callable = ft.partial(ConvNet, widths=(128, 256, 512), norm=None),
    *,
    updates: int = 1000,
    augment: bool = False,
) -> Recipe:
    """The recipe of neural feature regression: squared error on centred targets, and
    Adam at a rate of 3e-4, which warms up over 500 steps and then decays by a cosine to
    a hundredth. The weights are drawn as by LeCun et al. All images are in each step.

    Learned targets are taken as they are. Logits of soft labels become probabilities
    less $1/c$.

    **Arguments:** as for [`eqdistill.recipes.dc`][], but for

    - `network`: makes an [`eqdistill.nn.Network`][], whose weights are drawn anew.
    - `updates`: the number of steps, of which the first half warm up, or the first 500.
    - `augment`: whether each image is flipped from left to right at random in each
        step, as is fit for photographs. (Keyword only argument.)

    **Returns:**

    An [`eqdistill.recipes.Recipe`][].

    **Raises:**

    A `ValueError` as [`eqdistill.recipes.dc`][].

    Source: Zhou, Nezhadarya and Ba, *Dataset distillation using neural feature
    regression*, 2022.
    """
    updates = check_updates(updates)
    inner = UnrolledSolver(
        warms_up(min(500, updates // 2), updates),
        {"learning_rate": 3e-4},
        updates,
        augmentation=Flip() if augment else None,
    )
    settings = (("updates", updates), ("augment", augment))
    return Recipe("frepo", settings, network, as_by_lecun, with_targets, inner)


def zero_start(network: Callable = ConvNet, *, updates: int = 500) -> Recipe:
    """This package's recipe: squared error on centred targets, as in
    [`eqdistill.recipes.frepo`][], of a network whose last layer starts at zero; and
    Adam at a rate of 1e-3, which decays by a cosine to a hundredth.

    With few images, the function that a random last layer starts with is never
    unlearned.

    **Arguments:** as for [`eqdistill.recipes.dc`][], but `network` makes an
    [`eqdistill.nn.Network`][], whose last layer is set to zero.

    **Returns:**

    An [`eqdistill.recipes.Recipe`][].

    **Raises:**

    A `ValueError` as [`eqdistill.recipes.dc`][].
    """
    updates = check_updates(updates)
    inner = UnrolledSolver(warms_up(0, updates), {"learning_rate": 1e-3}, updates)
    settings = (("updates", updates),)
    return Recipe("zero_start", settings, network, from_zero, with_targets, inner)


def feature_regression(network: Callable = ConvNet, *, updates: int = 100) -> Recipe:
    """This package's recipe for images that were distilled with a
    [`eqdistill.Pool`][]: a short training by squared error on centred targets, as in
    [`eqdistill.recipes.frepo`][], after which the last layer is fitted anew, in closed
    form. Weights are drawn as by LeCun et al., and the last layer starts at zero. The
    training is by Adam at a rate of 3e-4, which decays by a cosine to a hundredth. The
    fit is ridge regression on the features before the last layer, without an intercept,
    at a ridge of 1e-3 that is relative to the features, as in
    [`eqdistill.RelativeRidge`][].

    The last layer is fitted as it was in the distillation.

    **Arguments:** as for [`eqdistill.recipes.dc`][], but `network` makes an
    [`eqdistill.nn.Network`][], whose weights are drawn anew.

    **Returns:**

    An [`eqdistill.recipes.Recipe`][].

    **Raises:**

    A `ValueError` as [`eqdistill.recipes.dc`][].
    """
    updates = check_updates(updates)
    training = UnrolledSolver(warms_up(0, updates), {"learning_rate": 3e-4}, updates)
    return Recipe(
        "feature_regression",
        (("updates", updates),),
        network,
        from_zero_by_lecun,
        ft.partial(with_targets, weight_decay=1e-3),
        FeatureRegression(training),
    )


def supervised(
    network: Callable = ConvNet, *, updates: int = 1000, batch_size: int = 128
) -> Recipe:
    """The ordinary training on real data, to compare with: cross-entropy on hard
    labels, and Adam at a rate of 1e-3, which decays by a cosine to a hundredth, in
    batches. The distilled set is to be all of the real images.

    **Arguments:** as for [`eqdistill.recipes.dc`][], but for

    - `batch_size`: the number of images in a step. (Keyword only argument.)

    **Returns:**

    An [`eqdistill.recipes.Recipe`][].

    **Raises:**

    A `ValueError` as [`eqdistill.recipes.dc`][], or if `batch_size` is less than 1; and
    when used, if there are fewer images than in a batch.
    """
    updates = check_updates(updates)
    inner = UnrolledSolver(
        warms_up(0, updates), {"learning_rate": 1e-3}, updates, batch_size=batch_size
    )
    settings = (("updates", updates), ("batch_size", as_int(batch_size)))
    prepare = ft.partial(with_hard_labels, "supervised", 0.0)
    return Recipe("supervised", settings, network, as_it_is, prepare, inner)


def learned_rates(
    network: Callable = LeNet,
    *,
    learning_rates: Sequence[float]
    | Float[Array, " steps"]
    | Float[np.ndarray, " steps"],
    batch_size: int,
    momentum: float = 0.0,
    adam: bool = False,
    seed: int | None = None,
) -> Recipe:
    r"""The recipe of a training run that was distilled with its step sizes: gradient
    descent, or Adam, on batches of the distilled images in their order, with a step
    size for each step. The loss, the labels and the ridge are those of the distilled
    set. `inner` of this recipe can be distilled through, and its step sizes learned.

    !!! Example

        ```python
        solver = result.inner  # An `UnrolledSolver` whose step sizes were learned.
        rates = jnp.exp(solver.log_hyperparameters["learning_rate"])
        recipe = eqd.recipes.learned_rates(
            learning_rates=rates, batch_size=10
        )
        ```

    **Arguments:**

    - `network`: as for [`eqdistill.recipes.dc`][].

    All other arguments are keyword only.

    - `learning_rates`: the step size of each step.
    - `batch_size`: the number of distilled images in a step.
    - `momentum`: the momentum, which is $\beta_1$ of Adam.
    - `adam`: whether the steps are those of Adam, with an `eps_root` of 1e-8, without
        which Adam has no derivative where a gradient is zero.
    - `seed`: the seed of known initial parameters, for which the set was distilled:
        each network is `network(shape, num_classes, key=jax.random.key(seed))`.
        Defaults to fresh networks.

    **Returns:**

    An [`eqdistill.recipes.Recipe`][].

    **Raises:**

    A `ValueError` if there are no step sizes, or more than 100,000, or if one is not
    positive and finite; if `batch_size` is less than 1, or if `momentum` is not in
    [0, 1).

    Source: Wang et al., *Dataset distillation*, 2018, Algorithm 1.
    """
    if isinstance(learning_rates, Sequence):
        learning_rates = list(learning_rates)
    array = np.asarray(as_array("learning_rates", learning_rates), np.float64)
    rates = tuple(array.tolist()) if array.ndim == 1 else ()
    if not 1 <= len(rates) <= MOST_UPDATES:
        raise ValueError(
            f"`learning_rates` must be from 1 to {MOST_UPDATES:,}; got {len(rates)}."
        )
    if not all(0 < rate < float("inf") for rate in rates):
        raise ValueError("`learning_rates` must be positive and finite; some are not.")
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1); got {momentum}.")
    batch_size, momentum = as_int(batch_size), as_float(momentum)
    seed = as_int_or_none(seed)
    inner = UnrolledSolver(
        by_step(momentum, adam),
        {"learning_rate": np.array(rates)},
        len(rates),
        batch_size=batch_size,
        shuffle=False,
    )
    settings = (
        ("learning_rates", rates),
        ("batch_size", batch_size),
        ("momentum", momentum),
        ("adam", adam),
        ("seed", seed),
    )
    if seed is not None:
        network = with_seed(network, seed)
    return Recipe("learned_rates", settings, network, as_it_is, as_distilled, inner)
