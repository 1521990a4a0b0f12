"""Building blocks of the networks."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from ._conv2d import Conv2d


Activation = Callable[[Array], Array]
# Makes a normalisation layer for a number of channels.
Norm = Callable[[int], Callable]


class Pad(eqx.Module):
    """Adds a channel axis to an image without one, and pads the image with zeros."""

    padding: tuple[tuple[int, int], ...] = eqx.field(static=True)

    def __call__(self, image: Array, *, key: PRNGKeyArray | None = None) -> Array:
        del key
        image = image[None] if image.ndim == 2 else image
        return jnp.pad(image, self.padding)


class Residual(eqx.Module):
    """A residual block of two convolutions."""

    body: eqx.nn.Sequential
    shortcut: eqx.nn.Sequential
    activation: Activation

    def __init__(self, channels, new_channels, stride, norm, activation, *, key):
        keys = jr.split(key, 3)
        conv = ft.partial(conv_block, norm=norm, use_bias=False)
        first = conv(channels, new_channels, activation, stride=stride, key=keys[0])
        second = conv(new_channels, new_channels, None, key=keys[1])
        self.body = eqx.nn.Sequential(first + second)
        shortcut = []
        if stride != 1 or channels != new_channels:
            shortcut = conv(
                channels, new_channels, None, kernel_size=1, stride=stride, key=keys[2]
            )
        self.shortcut = eqx.nn.Sequential(shortcut)
        self.activation = activation

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        del key
        return self.activation(self.body(x) + self.shortcut(x))


def pad_input(
    shape: tuple[int, ...], size: int | None
) -> tuple[list[Callable], tuple[int, int, int]]:
    """The first layer of a network, and the shape of its output.

    **Raises:**

    A `ValueError` if `shape` is not the shape of an image, or is larger than `size`.
    """
    if len(shape) not in (2, 3):
        raise ValueError(
            "`shape` must be (height, width) or (channels, height, width); got "
            f"{shape}."
        )
    channels, height, width = (1, *shape)[-3:]
    if size is None:
        return [Pad(((0, 0),) * 3)], (channels, height, width)
    if max(height, width) > size:
        raise ValueError(
            f"`shape` must be at most {size} x {size}, the `size` that images are "
            f"padded to; got {shape}."
        )
    padding = [(0, 0)]
    for length in (height, width):
        before = (size - length) // 2
        padding.append((before, size - length - before))
    return [Pad(tuple(padding))], (channels, size, size)


def conv_block(
    channels: int,
    new_channels: int,
    activation: Activation | None,
    *,
    norm: Norm | None,
    kernel_size: int = 3,
    stride: int = 1,
    use_bias: bool = True,
    key: PRNGKeyArray,
) -> list[Callable]:
    """A convolution, a normalisation and an activation."""
    convolution = Conv2d(
        channels,
        new_channels,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        use_bias=use_bias,
        key=key,
    )
    layers: list[Callable] = [convolution]
    if norm is not None:
        layers.append(norm(new_channels))
    if activation is not None:
        layers.append(eqx.nn.Lambda(activation))
    return layers


def linear_head(
    in_features: int, num_classes: int, *, key: PRNGKeyArray
) -> list[Callable]:
    return [
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(in_features, num_classes, key=key),
    ]
