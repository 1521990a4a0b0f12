"""Layers that are fast on a CPU and compute what Equinox's layers compute."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import check_at_least
from ._convolve import convolve, ConvSettings


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
        """**Arguments and raises:** as `equinox.nn.Conv2d`."""
        ints = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        check_at_least(1, in_channels=in_channels, out_channels=out_channels)
        check_at_least(1, kernel_size=np.min(kernel_size), stride=np.min(stride))
        check_at_least(1, dilation=np.min(dilation), groups=groups)
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
        self = object.__new__(cls)
        _copy_fields(convolution, self)
        return self

    def __call__(
        self, image: Float[Array, "*shape"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "out_channels new_height new_width"]:
        """**Arguments:**

        - `image`: one image, of shape `(in_channels, height, width)`.
        - `key`: ignored. Accepted for `equinox.nn.Sequential`.

        **Returns:**

        The convolution, of shape `(out_channels, new_height, new_width)`.

        **Raises:**

        A `ValueError` if the image has another number of axes or channels, or if the
        padded image is smaller than the kernel.
        """
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
    """Converts NumPy's integers, also in nested sequences."""
    if isinstance(x, str):
        return x
    return tuple(map(_as_ints, x)) if isinstance(x, Sequence) else operator.index(x)


def _copy_fields(convolution: eqx.nn.Conv2d, new: Conv2d) -> None:
    # `__init__` needs a key, and a frozen module refuses `setattr`.
    for field in dataclasses.fields(Conv2d):
        object.__setattr__(new, field.name, getattr(convolution, field.name))


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
    """Replaces each `equinox.nn.Conv2d` by an [`eqdistill.nn.Conv2d`][], and each
    `equinox.nn.AvgPool2d(2, 2)` by `eqdistill.nn.average_pool`.

    **Arguments:**

    - `network`: any pytree. Subclasses of `equinox.nn.Conv2d`, other pooling layers and
        convolutions of other dimensions are unchanged.

    **Returns:**

    The network with the same parameters, and the same outputs up to rounding.
    """

    def replace(node):
        # Not `isinstance`: a subclass may compute something else.
        if type(node) is eqx.nn.Conv2d:
            return Conv2d.of(node)
        return average_pool if eqx.tree_equal(node, _equinox_pool) is True else node

    is_layer = lambda node: type(node) in (eqx.nn.Conv2d, eqx.nn.AvgPool2d)
    return jax.tree.map(replace, network, is_leaf=is_layer)
