"""The computation of a convolutional layer."""

import functools as ft
import itertools as it
import math
from typing import NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


class ConvSettings(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


def convolve(
    image: Float[Array, "in_channels height width"],
    weight: Float[Array, "out_channels group_channels kernel_height kernel_width"],
    settings: ConvSettings,
) -> Float[Array, "out_channels new_height new_width"]:
    """The convolution, computed in the way that is fast on the device."""
    # The device is unknown until the program is lowered: don't ask for the backend.
    layout = ("NCHW", "OIHW", "NCHW")
    return lax.platform_dependent(
        image,
        weight,
        cpu=ft.partial(_convolve_cpu, settings=settings),
        default=ft.partial(convolve_xla, settings=settings, layout=layout),
    )


def convolve_xla(
    image: Array, weight: Array, settings: ConvSettings, layout: tuple[str, str, str]
) -> Array:
    """XLA's own convolution."""
    return lax.conv_general_dilated(
        image[None],
        weight,
        settings.stride,
        settings.padding,
        rhs_dilation=settings.dilation,
        dimension_numbers=layout,
        feature_group_count=settings.groups,
    )[0]


def _convolve_cpu(image, weight, settings):
    # Channels last: XLA's CPU convolution is fast only in this layout, and XLA does not
    # change the layout by itself inside a loop.
    image, weight = image.transpose(1, 2, 0), weight.transpose(2, 3, 1, 0)
    return _convolve_channels_last(image, weight, settings).transpose(2, 0, 1)


@ft.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _convolve_channels_last(
    image: Float[Array, "height width in_channels"],
    weight: Float[Array, "kernel_height kernel_width group_channels out_channels"],
    settings: ConvSettings,
) -> Float[Array, "new_height new_width out_channels"]:
    # On the CPU, XLA's convolution is ten times slower for one channel, and fifty times
    # slower for a kernel larger than the image. The sum below must have few terms,
    # because XLA recomputes it for every layer that reads the result.
    *kernel, _, out_channels = weight.shape
    if any(n < k for n, k in zip(image.shape[:2], kernel, strict=True)):
        return _convolve_patches(image, weight, settings)
    if image.shape[2] == 1 and math.prod(kernel) <= 9:
        shifted = _shift_image(image, kernel, settings)
        weights = weight.reshape(-1, out_channels)
        return sum(map(jnp.multiply, shifted[1:], weights[1:]), shifted[0] * weights[0])
    return convolve_xla(image, weight, settings, ("NHWC", "HWIO", "NHWC"))


@ft.partial(_convolve_channels_last.defjvp, symbolic_zeros=True)
def _(settings, primals, tangents):
    # The convolution is linear in the image and in the weight. Both products use
    # patches, so higher derivatives do too. Images are often constants: skip products
    # with a tangent that is known to be zero.
    (image, weight), (d_image, d_weight) = primals, tangents
    pairs = [(d_image, weight), (image, d_weight)]
    changes = [
        _convolve_patches(*pair, settings)
        for pair in pairs
        if not any(isinstance(x, SymbolicZero) for x in pair)
    ]
    return _convolve_channels_last(image, weight, settings), sum(
        changes[1:], changes[0]
    )


def _convolve_patches(image, weight, settings):
    """The convolution, channels last, as one matrix product over the patches."""
    *kernel, in_channels, out_channels = weight.shape
    patches = jnp.stack(_shift_image(image, kernel, settings), axis=2)
    height, width, *_ = patches.shape
    groups = settings.groups
    out = jnp.einsum(
        "hwkgi,kigo->hwgo",
        patches.reshape(height, width, -1, groups, in_channels),
        weight.reshape(-1, in_channels, groups, out_channels // groups),
    )
    return out.reshape(height, width, out_channels)


def _shift_image(image, kernel, settings) -> list[Array]:
    """For each point of the kernel, the pixels that it is multiplied by, of shape
    `(new_height, new_width, in_channels)`."""
    stride, padding, dilation, _ = settings
    pads = [(low, high, 0) for low, high in (*padding, (0, 0))]
    image = lax.pad(image, jnp.zeros((), image.dtype), pads)
    last = [
        (n - d * (k - 1) - 1) // s * s
        for n, k, s, d in zip(image.shape[:2], kernel, stride, dilation, strict=True)
    ]
    shifted = []
    for point in it.product(*map(range, kernel)):
        start = [p * d for p, d in zip(point, dilation, strict=True)]
        stop = [a + b + 1 for a, b in zip(start, last, strict=True)]
        shifted.append(
            lax.slice(image, (*start, 0), (*stop, image.shape[2]), (*stride, 1))
        )
    return shifted
