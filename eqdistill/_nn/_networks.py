"""The standard networks of dataset distillation."""

import functools as ft
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray

from .._conversions import as_int, as_int_or_none, as_ints
from ._convolve import average_pool, Conv2d, max_pool
from ._network import instance_norm, Network


Activation = Callable[[Array], Array]
# Makes a normalisation layer for a given number of channels.
Norm = Callable[[int], Callable]


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
    """The convolutional network of dataset distillation: blocks of a 3 x 3 convolution,
    a normalisation, an activation and a pooling layer, followed by a linear layer.

    The defaults give the network of Zhao et al. With `widths=(128, 256, 512)` and
    `norm=None` it is the network of FRePo and RCIG.

    **Arguments:**

    - `shape`: the shape of an image: `(height, width)` or `(channels, height, width)`.
    - `num_classes`: the number of classes $c$.

    All other arguments are keyword only.

    - `widths`: the number of channels of each block.
    - `norm`: a function that makes a layer for a given number of channels, such as
        [`eqdistill.nn.instance_norm`][], or `None`.
    - `norm_last`: whether the normalisation follows the pooling instead of the
        convolution.
    - `activation`: a function of an array. Use a smooth one, such as
        `jax.nn.softplus`, with [`eqdistill.ArgminSolver`][].
    - `pool`: `eqdistill.nn.average_pool` or `eqdistill.nn.max_pool`, over 2 x 2 pixels.
    - `size`: images are padded with zeros to this height and width. Greyscale
        images of 28 x 28 pixels are often padded to 32.
    - `key`: a `jax.random.key` for the weights, which are drawn as in PyTorch. For
        another distribution, use [`eqdistill.nn.initialise`][].

    **Raises:**

    A `ValueError` if `shape` is not the shape of an image, if `size` is smaller than
    the image, or if the pooling leaves no pixels.

    Source: Zhao, Mopuri and Bilen, *Dataset condensation with gradient matching*, 2021;
    Zhou et al., *Dataset distillation using neural feature regression*, 2022.
    """
    settings = _settings(locals())
    layers, (channels, height, width) = _pad_input(settings["shape"], settings["size"])
    for new_channels in settings["widths"]:
        before, after = (None, norm) if norm_last else (norm, None)
        layers += _conv_block(channels, new_channels, activation, norm=before, key=key)
        layers += [pool] if after is None else [pool, after(new_channels)]
        channels, height, width = new_channels, height // 2, width // 2
    if height * width == 0:
        raise ValueError(
            "`widths` must not have more entries than the number of times that an "
            "image can be halved; got "
            f"{len(widths)} for images of shape {settings['shape']}."
        )
    layers += _linear_head(channels * height * width, settings, key)
    return _network("ConvNet", settings, layers, key)


def LeNet(
    shape: Sequence[int],
    num_classes: int,
    *,
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """LeNet-5 with max pooling, for images padded with zeros to 32 x 32.

    **Arguments, returns and raises:** as for [`eqdistill.nn.ConvNet`][] with `size=32`.

    Source: LeCun et al., *Gradient-based learning applied to document recognition*,
    1998, as modified by Zhao et al. 2021.
    """
    settings = _settings(locals())
    layers, (channels, _, _) = _pad_input(settings["shape"], 32)
    function = eqx.nn.Lambda(activation)
    layers += [
        *(Conv2d(channels, 6, 5, key=key), function, max_pool),
        *(Conv2d(6, 16, 5, key=key), function, max_pool),
        eqx.nn.Lambda(jnp.ravel),
        *(eqx.nn.Linear(400, 120, key=key), function),
        *(eqx.nn.Linear(120, 84, key=key), function),
        eqx.nn.Linear(84, settings["num_classes"], key=key),
    ]
    return _network("LeNet", settings, layers, key)


def MLP(
    shape: Sequence[int],
    num_classes: int,
    *,
    widths: Sequence[int] = (128, 128),
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """A multilayer perceptron.

    **Arguments and returns:** as for [`eqdistill.nn.ConvNet`][]. `shape` may have any
    number of axes, and `widths` are the widths of the hidden layers.

    Source: the perceptron of Zhao et al. 2021.
    """
    settings = _settings(locals())
    sizes = [math.prod(settings["shape"]), *settings["widths"], settings["num_classes"]]
    layers: list[Callable] = [eqx.nn.Lambda(jnp.ravel)]
    for in_size, out_size in itertools.pairwise(sizes):
        layers.append(eqx.nn.Linear(in_size, out_size, key=key))
        layers.append(eqx.nn.Lambda(activation))
    return _network("MLP", settings, layers[:-1], key)


def AlexNet(
    shape: Sequence[int],
    num_classes: int,
    *,
    norm: Norm | None = instance_norm,
    width_multiplier: float = 1.0,
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """A network similar to AlexNet, for images padded with zeros to 32 x 32. With
    `norm=None` it is the network of Zhao et al.

    **Arguments, returns and raises:** as for [`eqdistill.nn.ConvNet`][] with `size=32`.
    All numbers of channels are multiplied by `width_multiplier`, and rounded.

    Source: Krizhevsky et al. 2012, as modified by Zhao et al. 2021.
    """
    settings = _settings(locals())
    plan = [(128, 5), None, (192, 5), None, (256, 3), (192, 3), (192, 3), None]
    return _from_plan("AlexNet", plan, settings, key)


def VGG11(
    shape: Sequence[int],
    num_classes: int,
    *,
    norm: Norm | None = instance_norm,
    width_multiplier: float = 1.0,
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """A network similar to VGG-11 with one linear layer, for images padded with zeros
    to 32 x 32.

    **Arguments, returns and raises:** as for [`eqdistill.nn.AlexNet`][].

    Source: Simonyan and Zisserman 2014, as modified by Zhao et al. 2021.
    """
    settings = _settings(locals())
    widths = [64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None]
    return _from_plan("VGG11", [w and (w, 3) for w in widths], settings, key)


def ResNet18(
    shape: Sequence[int],
    num_classes: int,
    *,
    norm: Norm | None = instance_norm,
    width_multiplier: float = 1.0,
    activation: Activation = jax.nn.relu,
    key: PRNGKeyArray,
) -> Network:
    """A network similar to ResNet-18, for images padded with zeros to 32 x 32.

    **Arguments, returns and raises:** as for [`eqdistill.nn.AlexNet`][].

    Source: He et al., *Deep residual learning*, 2016, as modified by Zhao et al. 2021.
    """
    settings = _settings(locals())
    layers, (channels, _, _) = _pad_input(settings["shape"], 32)
    conv = ft.partial(_conv_block, norm=norm, use_bias=False, key=key)
    first_width, *widths = (_width(64 * 2**i, settings) for i in (0, 0, 1, 2, 3))
    layers += conv(channels, first_width, activation)
    channels = first_width
    for i in range(8):
        width, stride = widths[i // 2], 2 if i in (2, 4, 6) else 1
        body = conv(channels, width, activation, stride=stride)
        body += conv(width, width, None)
        shortcut = []
        if stride == 2:
            shortcut = conv(channels, width, None, kernel_size=1, stride=2)
        both = map(eqx.nn.Sequential, (body, shortcut))
        layers.append(_Residual(*both, activation=activation))
        channels = width
    layers.append(eqx.nn.Lambda(_mean_over_pixels))
    layers += _linear_head(channels, settings, key)
    return _network("ResNet18", settings, layers, key)


def _from_plan(name: str, plan, settings: dict[str, Any], key) -> Network:
    """A network of convolutional blocks, given by their width and kernel size, and of
    pooling layers, given by `None`."""
    layers, (channels, size, _) = _pad_input(settings["shape"], 32)
    block = ft.partial(
        _conv_block, activation=settings["activation"], norm=settings["norm"], key=key
    )
    for entry in plan:
        if entry is None:
            layers.append(max_pool)
            size //= 2
        else:
            width, kernel_size = _width(entry[0], settings), entry[1]
            layers += block(channels, width, kernel_size=kernel_size)
            channels = width
    layers += _linear_head(channels * size**2, settings, key)
    return _network(name, settings, layers, key)


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a network without its key, with sizes as Python integers."""
    settings = {name: x for name, x in arguments.items() if name != "key"}
    for name in settings.keys() & {"shape", "widths"}:
        settings[name] = as_ints(name, settings[name])
    settings["num_classes"] = as_int(settings["num_classes"])
    if "size" in settings:
        settings["size"] = as_int_or_none(settings["size"])
    sizes = settings["shape"] + (settings["num_classes"],) + settings.get("widths", ())
    if min(sizes) < 1:
        raise ValueError(
            "`shape`, `num_classes` and `widths` must be at least 1; got a size of "
            f"{min(sizes)}."
        )
    return settings


def _width(width: int, settings: dict[str, Any]) -> int:
    multiplier = settings["width_multiplier"]
    if not 0 < multiplier <= 64:
        raise ValueError(
            f"`width_multiplier` must be positive and at most 64; got {multiplier}."
        )
    return max(1, round(multiplier * width))


def _network(
    name: str, settings: dict[str, Any], layers: list[Callable], key: PRNGKeyArray
) -> Network:
    """Redraws all weights and biases from one vector of random numbers, because it is
    the number of random arrays that makes an initialisation slow to compile."""
    is_layer = lambda x: isinstance(x, Conv2d | eqx.nn.Linear)
    nodes, structure = jax.tree.flatten(eqx.nn.Sequential(layers), is_leaf=is_layer)
    drawn = [i for i, node in enumerate(nodes) if is_layer(node)]
    vectors, restore = zip(*(ravel_pytree(nodes[i]) for i in drawn), strict=True)
    ends = np.cumsum([x.size for x in vectors])
    parts = jnp.split(jr.uniform(key, (ends[-1],), minval=-1, maxval=1), ends[:-1])
    for i, part, fn in zip(drawn, parts, restore, strict=True):
        weight = nodes[i].weight
        nodes[i] = fn(part * (len(weight) / weight.size) ** 0.5)
    sequential = jax.tree.unflatten(structure, nodes)
    return Network(sequential, name, tuple(settings.items()))


def _mean_over_pixels(x: Array) -> Array:
    return jnp.mean(x, axis=(1, 2))


class _Pad(eqx.Module):
    """Adds a channel axis to an image without one, and pads the image with zeros."""

    padding: tuple[tuple[int, int], ...] = eqx.field(static=True)

    def __call__(self, image: Array, *, key: PRNGKeyArray | None = None) -> Array:
        image = image[None] if image.ndim == 2 else image
        return jnp.pad(image, self.padding)


class _Residual(eqx.Module):
    """A residual block."""

    body: eqx.nn.Sequential
    shortcut: eqx.nn.Sequential
    activation: Activation

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        return self.activation(self.body(x) + self.shortcut(x))


def _pad_input(shape, size) -> tuple[list[Callable], tuple[int, int, int]]:
    """The first layer of a network, and the shape of its output."""
    if len(shape) not in (2, 3):
        raise ValueError(
            "`shape` must be (height, width) or (channels, height, width); got "
            f"{shape}."
        )
    channels, *lengths = (1, *shape)[-3:]
    if size is not None and max(lengths) > size:
        raise ValueError(
            f"`shape` must be at most {size} x {size}, the `size` that images are "
            f"padded to; got {shape}."
        )
    height, width = lengths if size is None else (size, size)
    margins = (height - lengths[0], width - lengths[1])
    padding = ((0, 0), *((n // 2, n - n // 2) for n in margins))
    return [_Pad(padding)], (channels, height, width)


def _conv_block(
    channels, width, activation, *, norm, kernel_size=3, stride=1, use_bias=True, key
) -> list[Callable]:
    """A convolution, a normalisation and an activation."""
    sizes = (channels, width, kernel_size, stride, kernel_size // 2)
    norms = [] if norm is None else [norm(width)]
    activations = [] if activation is None else [eqx.nn.Lambda(activation)]
    return [Conv2d(*sizes, use_bias=use_bias, key=key), *norms, *activations]


def _linear_head(in_features: int, settings, key) -> list[Callable]:
    head = eqx.nn.Linear(in_features, settings["num_classes"], key=key)
    return [eqx.nn.Lambda(jnp.ravel), head]
