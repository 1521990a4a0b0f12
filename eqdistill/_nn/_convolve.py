"""Layers that are fast on a CPU and compute what Equinox's layers compute."""

import dataclasses
import functools as ft
import itertools as it
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import check_at_least


class Conv2d(eqx.Module):
    """`equinox.nn.Conv2d` for the CPU: the same parameters and values, but also fast
    when differentiated inside loops.

    On a CPU, XLA's convolution is slow for one channel, for a kernel larger than the
    image, and if its derivative is inside a `jax.lax.scan`, `while_loop`, `cond` or
    `switch`. This layer instead sums shifted copies of a one-channel image, and
    computes convolutions with large kernels and all derivatives as one matrix product
    over the patches of the image. On other devices it is XLA's convolution.
    """

    weight: Float[Array, "out_channels group_channels kernel_height kernel_width"]
    bias: Float[Array, "out_channels 1 1"] | None
    in_channels: int = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)
    kernel_size: tuple[int, ...] = eqx.field(static=True)
    stride: tuple[int, ...] = eqx.field(static=True)
    padding: str | tuple[tuple[int, int], ...] = eqx.field(static=True)
    dilation: tuple[int, ...] = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)
    padding_mode: str = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = (1, 1),
        padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = (0, 0),
        dilation: int | Sequence[int] = (1, 1),
        groups: int = 1,
        use_bias: bool = True,
        padding_mode: str = "ZEROS",
        dtype=None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments and raises:** the same as `equinox.nn.Conv2d`."""
        ints = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        check_at_least(1, in_channels=in_channels, out_channels=out_channels)
        check_at_least(1, groups=groups)
        pairs = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        for name, x in pairs.items():
            if np.size(x) > 2 or np.min(x) < 1:
                raise ValueError(
                    f"`{name}` must be one or two integers of at least 1; got {x}."
                )
        convolution = eqx.nn.Conv2d(
            *map(_as_ints, ints),
            use_bias=use_bias,
            padding_mode=padding_mode,
            dtype=dtype,
            key=key,
        )
        _copy_fields(convolution, self)

    @classmethod
    def of(cls, convolution: eqx.nn.Conv2d) -> "Conv2d":
        """Converts an `equinox.nn.Conv2d` to a `Conv2d` with the same parameters and
        settings. The parameters may have leading batch axes, or be `None`."""
        return _copy_fields(convolution, object.__new__(cls))

    def __call__(
        self, image: Float[Array, "*shape"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "out_channels new_height new_width"]:
        """Returns the convolution of one image, of shape
        `(in_channels, height, width)`. The `key` is ignored.

        **Raises:** a `ValueError` if the image has the wrong number of axes or
        channels, or if the padded image is smaller than the kernel."""
        if image.ndim != 3 or image.shape[0] != self.in_channels:
            raise ValueError(
                f"`image` must have shape (in_channels={self.in_channels}, height, "
                f"width); got shape {image.shape}. For many images, use `jax.vmap`."
            )
        kernel = zip(self.kernel_size, self.dilation, strict=True)
        extent = tuple(d * (k - 1) + 1 for k, d in kernel)
        padding = self.padding
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(image.shape[1:], extent, self.stride, padding)
        padding = tuple((int(low), int(high)) for low, high in padding)
        sizes = zip(image.shape[1:], padding, strict=True)
        padded = tuple(n + low + high for n, (low, high) in sizes)
        if padded[0] < extent[0] or padded[1] < extent[1]:
            raise ValueError(
                f"`image` must be at least as large as the kernel, {extent} with its "
                f"dilation; got shape {image.shape}, {padded} with its padding."
            )
        if self.padding_mode != "ZEROS":
            image = jnp.pad(image, ((0, 0), *padding), _PAD_MODES[self.padding_mode])
            padding = ((0, 0), (0, 0))
        settings = ConvSettings(self.stride, padding, self.dilation, self.groups)
        out = convolve(image, self.weight, settings)
        return out if self.bias is None else out + self.bias


_PAD_MODES = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


def _as_ints(x: Any) -> Any:
    """Converts NumPy integers, including those in nested sequences."""
    if isinstance(x, str):
        return x
    return tuple(map(_as_ints, x)) if isinstance(x, Sequence) else operator.index(x)


def _copy_fields(convolution: eqx.nn.Conv2d, new: Conv2d) -> Conv2d:
    # `__init__` needs a key, and a frozen module does not allow `setattr`.
    for field in dataclasses.fields(Conv2d):
        object.__setattr__(new, field.name, getattr(convolution, field.name))
    return new


@jax.custom_jvp
def _average_pool(
    x: Float[Array, "channels height width"],
) -> Float[Array, "channels half_height half_width"]:
    height, width = (n // 2 * 2 for n in x.shape[1:])
    corners = [x[:, i:height:2, j:width:2] for i in range(2) for j in range(2)]
    return sum(corners[1:], corners[0]) / 4


@_average_pool.defjvp
def _(primals, tangents):
    return _average_pool(*primals), _equinox_pool(*tangents)


# Pooling over squares of 2 x 2 pixels, without an odd last row or column. XLA fuses the
# average of four slices with the preceding layers, but computes Equinox's pooling in a
# slow loop. The derivative of Equinox's pooling is the faster one.
average_pool = eqx.nn.Lambda(_average_pool)
max_pool = eqx.nn.MaxPool2d(2, 2)
_equinox_pool = eqx.nn.AvgPool2d(2, 2)


def fast_convolutions(network: PyTree) -> PyTree:
    """Replaces each `equinox.nn.Conv2d` with an [`eqdistill.nn.Conv2d`][], and each
    `equinox.nn.AvgPool2d(2, 2)` with `eqdistill.nn.average_pool`.

    `network` is any pytree. Subclasses of `equinox.nn.Conv2d`, other pooling layers and
    convolutions in other dimensions are unchanged. The returned network has the same
    parameters, and the same outputs up to rounding.
    """

    def replace(node):
        # Not `isinstance`: a subclass may compute something else.
        if type(node) is eqx.nn.Conv2d:
            return Conv2d.of(node)
        return average_pool if eqx.tree_equal(node, _equinox_pool) is True else node

    is_layer = lambda node: type(node) in (eqx.nn.Conv2d, eqx.nn.AvgPool2d)
    return jax.tree.map(replace, network, is_leaf=is_layer)


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
    cpu = lambda x, w: _convolve_cpu(x, w, settings)
    other = lambda x, w: convolve_xla(x, w, settings, ("NCHW", "OIHW", "NCHW"))
    return lax.platform_dependent(image, weight, cpu=cpu, default=other)


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
        weights = weight.reshape(-1, 1, 1, out_channels)
        return sum(map(jnp.multiply, shifted[1:], weights[1:]), shifted[0] * weights[0])
    return convolve_xla(image, weight, settings, ("NHWC", "HWIO", "NHWC"))


@ft.partial(_convolve_channels_last.defjvp, symbolic_zeros=True)
def _(settings, primals, tangents):
    # The convolution is linear in the image and in the weight. Both products use
    # patches, so higher derivatives do too. Images are often constants: skip products
    # with a tangent that is known to be zero.
    (image, weight), (d_image, d_weight) = primals, tangents
    changes = [
        _convolve_patches(*pair, settings)
        for pair in ((d_image, weight), (image, d_weight))
        if not any(isinstance(x, SymbolicZero) for x in pair)
    ]
    return _convolve_channels_last(image, weight, settings), sum(
        changes[1:], changes[0]
    )


def _convolve_patches(image, weight, settings):
    """The convolution, channels last, as one matrix product over the patches."""
    *kernel, in_channels, out_channels = weight.shape
    patches = jnp.stack(_shift_image(image, kernel, settings), axis=2)
    (height, width, *_), groups = patches.shape, settings.groups
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
