"""The networks of the field's tables, made of Equinox's layers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from .._conversions import as_int, as_int_or_none, as_ints
from ._blocks import Activation, begin, block, check_positive, end, Norm, Residual
from ._conv2d import Conv2d
from ._network import instance_norm, Network
from ._quick import average_pool, max_pool


def ConvNet(
    shape: Sequence[int],
    num_classes: int,
    *,
    widths: Sequence[int] = (128, 128, 128),
    norm: Norm | None = instance_norm,
    norm_last: bool = False,
    activation: Activation = jax.nn.relu,
    pool: Callable = average_pool,
    size: int | None = None,
    key: PRNGKeyArray,
) -> Network:
    """The convolutional network of dataset distillation: blocks of a convolution of
    3 x 3, a normalisation, an activation and a pooling; then a linear layer.

    The defaults are the network of Zhao et al. With `widths=(128, 256, 512)` and
    `norm=None` it is the network of FRePo and RCIG.

    **Arguments:**

    - `shape`: the shape of an image: `(height, width)` or `(channels, height, width)`.
    - `num_classes`: the number of classes $c$.

    All other arguments are keyword only.

    - `widths`: the number of channels after each block.
    - `norm`: makes a layer from a number of channels, such as
        [`eqdistill.nn.instance_norm`][]; or `None`.
    - `norm_last`: whether the normalisation of a block stands after the pooling, and
        not before the activation.
    - `activation`: a function of an array. A smooth one, such as `jax.nn.softplus`, is
        best for [`eqdistill.ArgminSolver`][].
    - `pool`: `eqdistill.nn.average_pool` or `eqdistill.nn.max_pool`, of 2 x 2 pixels.
    - `size`: images are padded by zeros to this height and width. Grey images of
        28 x 28 are often padded to 32.
    - `key`: a `jax.random.key` for the weights, which are drawn as PyTorch draws them.
        [`eqdistill.nn.initialise`][] draws them in another way.

    **Returns:**

    An [`eqdistill.nn.Network`][].

    **Raises:**

    A `ValueError` if `shape` is not that of an image, if `size` is smaller than the
    image, or if so many blocks leave no pixel.

    Source: Zhao, Mopuri and Bilen, *Dataset condensation with gradient matching*, 2021;
    Zhou et al., *Dataset distillation using neural feature regression*, 2022.
    """
    shape, widths = as_ints("shape", shape), as_ints("widths", widths)
    num_classes = as_int(num_classes)
    settings = {
        "shape": shape,
        "num_classes": num_classes,
        "widths": widths,
        "norm": norm,
        "norm_last": norm_last,
        "activation": activation,
        "pool": pool,
        "size": as_int_or_none(size),
    }
    layers, (channels, height, width) = begin(shape, size, num_classes, *widths)
    *keys, head_key = jr.split(key, len(widths) + 1)
    for new_channels, key in zip(widths, keys, strict=True):
        before, after = (None, norm) if norm_last else (norm, None)
        layers += block(channels, new_channels, before, activation, key=key)
        layers.append(pool)
        if after is not None:
            layers.append(after(new_channels))
        channels, height, width = new_channels, height // 2, width // 2
    if height * width == 0:
        raise ValueError(
            "`widths` must have no more entries than an image can be halved; got "
            f"{len(widths)} for images of shape {shape}."
        )
    layers += end(channels * height * width, num_classes, key=head_key)
    return _network("ConvNet", settings, layers)


def LeNet(
    shape: Sequence[int],
    num_classes: int,
    *,
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """LeNet-5 with maximum pooling, for images padded by zeros to 32 x 32.

    **Arguments:** as for [`eqdistill.nn.ConvNet`][].

    **Returns:**

    An [`eqdistill.nn.Network`][].

    **Raises:**

    A `ValueError` if `shape` is not that of an image of at most 32 x 32.

    Source: LeCun et al., *Gradient-based learning applied to document recognition*,
    1998; in the form of Zhao et al. 2021.
    """
    shape, num_classes = as_ints("shape", shape), as_int(num_classes)
    settings = {
        "shape": shape,
        "num_classes": num_classes,
        "activation": activation,
    }
    layers, (channels, _, _) = begin(shape, 32, num_classes)
    keys = jr.split(key, 5)
    relu, pool = eqx.nn.Lambda(activation), max_pool
    layers += [
        *(Conv2d(channels, 6, 5, key=keys[0]), relu, pool),
        *(Conv2d(6, 16, 5, key=keys[1]), relu, pool),
        eqx.nn.Lambda(jnp.ravel),
        *(eqx.nn.Linear(400, 120, key=keys[2]), relu),
        *(eqx.nn.Linear(120, 84, key=keys[3]), relu),
        eqx.nn.Linear(84, num_classes, key=keys[4]),
    ]
    return _network("LeNet", settings, layers)


def MLP(
    shape: Sequence[int],
    num_classes: int,
    *,
    widths: Sequence[int] = (128, 128),
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """A perceptron with hidden layers of given widths.

    **Arguments:** as for [`eqdistill.nn.ConvNet`][], but for

    - `shape`: of any number of axes.
    - `widths`: the width of each hidden layer.

    **Returns:**

    An [`eqdistill.nn.Network`][].

    Source: the perceptron of Zhao et al. 2021.
    """
    shape, widths = as_ints("shape", shape), as_ints("widths", widths)
    num_classes = as_int(num_classes)
    settings = {
        "shape": shape,
        "num_classes": num_classes,
        "widths": widths,
        "activation": activation,
    }
    check_positive(*shape, num_classes, *widths)
    in_size = math.prod(shape)
    layers: list[Callable] = [eqx.nn.Lambda(jnp.ravel)]
    *keys, head_key = jr.split(key, len(widths) + 1)
    for width, key in zip(widths, keys, strict=True):
        layers += [eqx.nn.Linear(in_size, width, key=key), eqx.nn.Lambda(activation)]
        in_size = width
    layers.append(eqx.nn.Linear(in_size, num_classes, key=head_key))
    return _network("MLP", settings, layers)


def AlexNet(
    shape: Sequence[int],
    num_classes: int,
    *,
    norm: Norm | None = instance_norm,
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """A network like AlexNet, for images padded by zeros to 32 x 32. The one of Zhao et
    al. has no normalisation: `norm=None`.

    **Arguments:** as for [`eqdistill.nn.ConvNet`][].

    **Returns:**

    An [`eqdistill.nn.Network`][].

    **Raises:**

    A `ValueError` if `shape` is not that of an image of at most 32 x 32.

    Source: Krizhevsky et al. 2012; in the form of Zhao et al. 2021.
    """
    plan = [(128, 5), None, (192, 5), None, (256, 3), (192, 3), (192, 3), None]
    return _from_plan("AlexNet", plan, shape, num_classes, norm, activation, key=key)


def VGG11(
    shape: Sequence[int],
    num_classes: int,
    *,
    norm: Norm | None = instance_norm,
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """A network like VGG-11 with one linear layer, for images padded by zeros to
    32 x 32.

    **Arguments:** as for [`eqdistill.nn.ConvNet`][].

    **Returns:**

    An [`eqdistill.nn.Network`][].

    **Raises:**

    A `ValueError` if `shape` is not that of an image of at most 32 x 32.

    Source: Simonyan and Zisserman 2014; in the form of Zhao et al. 2021.
    """
    widths = [64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None]
    plan = [width and (width, 3) for width in widths]
    return _from_plan("VGG11", plan, shape, num_classes, norm, activation, key=key)


def ResNet18(
    shape: Sequence[int],
    num_classes: int,
    *,
    norm: Norm | None = instance_norm,
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """A network like ResNet-18, for images padded by zeros to 32 x 32.

    **Arguments:** as for [`eqdistill.nn.ConvNet`][].

    **Returns:**

    An [`eqdistill.nn.Network`][].

    **Raises:**

    A `ValueError` if `shape` is not that of an image of at most 32 x 32.

    Source: He et al., *Deep residual learning*, 2016; in the form of Zhao et al. 2021.
    """
    shape, num_classes = as_ints("shape", shape), as_int(num_classes)
    settings = {
        "shape": shape,
        "num_classes": num_classes,
        "norm": norm,
        "activation": activation,
    }
    layers, (channels, _, _) = begin(shape, 32, num_classes)
    first_key, head_key, *keys = jr.split(key, 10)
    layers += block(channels, 64, norm, activation, use_bias=False, key=first_key)
    channels = 64
    for i, key in enumerate(keys):
        new_channels = 64 * 2 ** (i // 2)
        stride = 2 if i in (2, 4, 6) else 1
        layers.append(
            Residual(channels, new_channels, stride, norm, activation, key=key)
        )
        channels = new_channels
    layers.append(eqx.nn.Lambda(_mean_over_pixels))
    layers += end(channels, num_classes, key=head_key)
    return _network("ResNet18", settings, layers)


def _from_plan(
    name: str,
    plan: Sequence[tuple[int, int] | None],
    shape: Sequence[int],
    num_classes: int,
    norm: Norm | None,
    activation: Activation,
    *,
    key: PRNGKeyArray,
) -> Network:
    """A network of blocks, each of some width and kernel size, and of poolings, where
    the plan says `None`."""
    shape, num_classes = as_ints("shape", shape), as_int(num_classes)
    settings = {
        "shape": shape,
        "num_classes": num_classes,
        "norm": norm,
        "activation": activation,
    }
    layers, (channels, size, _) = begin(shape, 32, num_classes)
    *keys, head_key = jr.split(key, len(plan) + 1)
    for entry, key in zip(plan, keys, strict=True):
        if entry is None:
            layers.append(max_pool)
            size //= 2
        else:
            width, kernel_size = entry
            layers += block(
                channels, width, norm, activation, kernel_size=kernel_size, key=key
            )
            channels = width
    layers += end(channels * size**2, num_classes, key=head_key)
    return _network(name, settings, layers)


def _network(name: str, settings: dict[str, Any], layers: list[Callable]) -> Network:
    return Network(
        eqx.nn.Sequential(layers),
        name,
        tuple(settings.items()),
    )


def _mean_over_pixels(x: Array) -> Array:
    return jnp.mean(x, axis=(1, 2))
