"""What networks are made from."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from ._conv2d import Conv2d


Activation = Callable[[Array], Array]
# From a number of channels to a layer.
Norm = Callable[[int], Callable]


class Pad(eqx.Module):
    """Gives an image an axis of channels, and pads the image by zeros around."""

    padding: tuple[tuple[int, int], ...] = eqx.field(static=True)

    def __call__(self, image: Array, *, key: PRNGKeyArray | None = None) -> Array:
        del key
        image = image[None] if image.ndim == 2 else image
        return jnp.pad(image, self.padding)


class Residual(eqx.Module):
    """Two convolutions, to whose result the input is added."""

    body: eqx.nn.Sequential
    shortcut: eqx.nn.Sequential
    activation: Activation

    def __init__(self, channels, new_channels, stride, norm, activation, *, key):
        keys = jr.split(key, 3)
        first = block(
            channels,
            new_channels,
            norm,
            activation,
            stride=stride,
            use_bias=False,
            key=keys[0],
        )
        second = block(
            new_channels, new_channels, norm, None, use_bias=False, key=keys[1]
        )
        self.body = eqx.nn.Sequential(first + second)
        is_same = stride == 1 and channels == new_channels
        shortcut = block(
            channels,
            new_channels,
            norm,
            None,
            kernel_size=1,
            stride=stride,
            use_bias=False,
            key=keys[2],
        )
        self.shortcut = eqx.nn.Sequential([] if is_same else shortcut)
        self.activation = activation

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        del key
        return self.activation(self.body(x) + self.shortcut(x))


def begin(
    shape: tuple[int, ...], size: int | None, *others: int
) -> tuple[list[Callable], tuple[int, int, int]]:
    """The first layer, and the shape of what the layer gives.

    **Raises:**

    A `ValueError` if an image of this shape cannot be taken, or if one of the other
    sizes is not positive.
    """
    check_positive(*shape, *others)
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
            f"`shape` must be of images of at most {size} x {size}, the `size` that "
            f"they are padded to; got {shape}."
        )
    padding = [(0, 0)]
    for length in (height, width):
        before = (size - length) // 2
        padding.append((before, size - length - before))
    return [Pad(tuple(padding))], (channels, size, size)


def check_positive(*sizes: int) -> None:
    if min(sizes, default=1) < 1:
        raise ValueError(
            "`shape`, `num_classes` and `widths` must be at least 1; got a size of "
            f"{min(sizes)}."
        )


def block(
    channels: int,
    new_channels: int,
    norm: Norm | None,
    activation: Activation | None,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    use_bias: bool = True,
    key: PRNGKeyArray,
) -> list[Callable]:
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


def end(in_features: int, num_classes: int, *, key: PRNGKeyArray) -> list[Callable]:
    return [
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(in_features, num_classes, key=key),
    ]
