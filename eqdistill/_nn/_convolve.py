"""What a convolutional layer computes."""

import functools as ft
import itertools as it
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


class Window(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


def library(
    image: Float[Array, "_ _ _"],
    weight: Float[Array, "_ _ _ _"],
    window: Window,
    layout: tuple[str, str, str],
) -> Float[Array, "_ _ _"]:
    out = lax.conv_general_dilated(
        image[None],
        weight,
        window.stride,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=layout,
        feature_group_count=window.groups,
    )
    return out[0]


@ft.partial(jax.custom_jvp, nondiff_argnums=(2,))
def convolve(
    image: Float[Array, "height width in_channels"],
    weight: Float[Array, "kernel_height kernel_width group_channels out_channels"],
    window: Window,
) -> Float[Array, "new_height new_width out_channels"]:
    # XLA's convolution takes ten times as long for one channel, and fifty times as long
    # for a kernel that is larger than the image. The sum must be of few terms, as XLA
    # computes a sum again where several layers read the result.
    *kernel, _, out_channels = weight.shape
    if any(n < k for n, k in zip(image.shape[:2], kernel, strict=True)):
        return _convolve_patches(image, weight, window)
    if image.shape[2] == 1 and math.prod(kernel) <= 9:
        shifted = _shifted(image, kernel, window)
        weights = weight.reshape(-1, out_channels)
        return sum(map(jnp.multiply, shifted[1:], weights[1:]), shifted[0] * weights[0])
    return library(image, weight, window, ("NHWC", "HWIO", "NHWC"))


@ft.partial(convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(window, primals, tangents):
    # The convolution is linear in the image and in the weight. Each of the two products
    # is over patches, so that higher derivatives are too. Images are often constants:
    # a tangent that is known to be zero costs nothing.
    image, weight = primals
    d_image, d_weight = tangents
    out = convolve(image, weight, window)
    if isinstance(d_image, SymbolicZero):
        return out, _convolve_patches(image, d_weight, window)
    d_out = _convolve_patches(d_image, weight, window)
    if isinstance(d_weight, SymbolicZero):
        return out, d_out
    return out, d_out + _convolve_patches(image, d_weight, window)


def _convolve_patches(
    image: Float[Array, "height width in_channels"],
    weight: Float[Array, "kernel_height kernel_width group_channels out_channels"],
    window: Window,
) -> Float[Array, "new_height new_width out_channels"]:
    """`convolve` as one matrix product over the patches of the image."""
    *kernel, in_channels, out_channels = weight.shape
    patches = jnp.stack(_shifted(image, kernel, window), axis=2)
    height, width, *_ = patches.shape
    groups = window.groups
    out = jnp.einsum(
        "hwkgi,kigo->hwgo",
        patches.reshape(height, width, -1, groups, in_channels),
        weight.reshape(-1, in_channels, groups, out_channels // groups),
    )
    return out.reshape(height, width, out_channels)


def _shifted(
    image: Float[Array, "height width in_channels"],
    kernel: Sequence[int],
    window: Window,
) -> list[Float[Array, "new_height new_width in_channels"]]:
    """The pixels that each point of the kernel meets."""
    stride, padding, dilation, _ = window
    zero = jnp.zeros((), image.dtype)
    image = lax.pad(
        image, zero, (*((low, high, 0) for low, high in padding), (0, 0, 0))
    )
    last = tuple(
        (n - d * (k - 1) - 1) // s * s
        for n, k, s, d in zip(image.shape[:2], kernel, stride, dilation, strict=True)
    )
    shifted = []
    for point in it.product(*map(range, kernel)):
        start = tuple(p * d for p, d in zip(point, dilation, strict=True))
        stop = tuple(a + b + 1 for a, b in zip(start, last, strict=True))
        shifted.append(
            lax.slice(image, (*start, 0), (*stop, image.shape[2]), (*stride, 1))
        )
    return shifted
