"""The convolution that is quick in loops."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_at_least
from .._conversions import as_int, as_ints
from ._convolve import convolve, library, Window


class Conv2d(eqx.Module):
    """The convolution of one image, with the values and the parameters of
    `equinox.nn.Conv2d`. It is quick on a CPU, and its derivatives inside loops are.

    On a CPU, XLA's convolutions are slow for one channel, for a kernel that is larger
    than the image, and if their derivative lies in a `jax.lax.scan`, `while_loop`,
    `cond` or `switch`. There this layer sums the shifted copies of an image of one
    channel, each times its weight; and convolutions by larger kernels, and derivatives,
    are one matrix product over the patches of the image. On an accelerator this layer
    is XLA's convolution.
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
        """**Arguments:**

        - `in_channels`: the number of channels of the image.
        - `out_channels`: the number of channels of the result.
        - `kernel_size`: the height and width of the kernel. Here and below, one integer
            stands for both axes.
        - `stride`: the step of the kernel along each axis.
        - `padding`: the number of pixels to add on both sides of each axis, or a pair
            of numbers for each axis, or `"SAME"`, `"SAME_LOWER"` or `"VALID"`.
        - `dilation`: the distance between neighbouring points of the kernel.
        - `groups`: the number of groups of channels. Each group of the result depends
            on one group of the image.
        - `use_bias`: whether to add a bias.
        - `padding_mode`: what to pad with: `"ZEROS"`, `"REFLECT"`, `"REPLICATE"` or
            `"CIRCULAR"`.
        - `dtype`: the parameters' dtype. Defaults to JAX's default floating dtype.
        - `key`: a `jax.random.key` to draw the parameters with.

        **Raises:**

        A `TypeError` or `ValueError` for an argument out of its range; from
        `equinox.nn.Conv2d` if the groups or the padding's name do not fit.
        """
        check_at_least(1, in_channels=in_channels, out_channels=out_channels)
        check_at_least(1, groups=groups)
        in_channels, out_channels, groups = map(
            as_int, (in_channels, out_channels, groups)
        )
        kernel_size = _two("kernel_size", kernel_size, 1)
        stride, dilation = _two("stride", stride, 1), _two("dilation", dilation, 1)
        if not isinstance(padding, str):
            padding = _pairs(padding)
        convolution = eqx.nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            use_bias,
            padding_mode,
            dtype,
            key=key,
        )
        _copy_fields(convolution, self)

    @classmethod
    def of(cls, convolution: eqx.nn.Conv2d) -> "Conv2d":
        """The layer that computes what a given `equinox.nn.Conv2d` computes.

        **Arguments:**

        - `convolution`: the layer to take the parameters and the settings of. Its
            parameters may have further axes in front, or be `None`.

        **Returns:**

        A `Conv2d` with the same parameters and settings.
        """
        self = object.__new__(cls)
        _copy_fields(convolution, self)
        return self

    def __call__(
        self, image: Float[Array, "*shape"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "out_channels new_height new_width"]:
        """**Arguments:**

        - `image`: one image, of shape `(in_channels, height, width)`.
        - `key`: ignored; there for `equinox.nn.Sequential`.

        **Returns:**

        The convolution, of shape `(out_channels, new_height, new_width)`.

        **Raises:**

        A `ValueError` if the image has another number of axes or channels, or if the
        padded image is smaller than the kernel.
        """
        del key
        if image.ndim != 3 or image.shape[0] != self.in_channels:
            raise ValueError(
                f"`image` must have shape (in_channels={self.in_channels}, height, "
                f"width); got shape {image.shape}. For many images, use `jax.vmap`."
            )
        extent = tuple(
            d * (k - 1) + 1
            for k, d in zip(self.kernel_size, self.dilation, strict=True)
        )
        if isinstance(self.padding, str):
            padding = lax.padtype_to_pads(
                image.shape[1:], extent, self.stride, self.padding
            )
        else:
            padding = self.padding
        padding = tuple((int(low), int(high)) for low, high in padding)
        padded = tuple(
            n + low + high
            for n, (low, high) in zip(image.shape[1:], padding, strict=True)
        )
        if padded[0] < extent[0] or padded[1] < extent[1]:
            raise ValueError(
                f"`image` must be at least as large as the kernel, {extent} with its "
                f"dilation; got shape {image.shape}, {padded} with its padding."
            )
        if self.padding_mode != "ZEROS":
            image = jnp.pad(image, ((0, 0), *padding), _PAD_MODES[self.padding_mode])
            padding = ((0, 0), (0, 0))
        window = Window(self.stride, padding, self.dilation, self.groups)

        if jax.default_backend() == "cpu":
            # Channels last: XLA has a quick convolution for this layout only, and does
            # not change to this layout by itself inside a loop.
            out = convolve(
                image.transpose(1, 2, 0), self.weight.transpose(2, 3, 1, 0), window
            ).transpose(2, 0, 1)
        else:
            out = library(image, self.weight, window, ("NCHW", "OIHW", "NCHW"))
        return out if self.bias is None else out + self.bias


def _two(name: str, x: int | Sequence[int], least: int | None) -> tuple[int, ...]:
    """A number for each of the two axes.

    **Raises:**

    A `TypeError` or `ValueError` that names the argument by `name`.
    """
    both = as_ints(name, x if isinstance(x, Sequence) else (x, x))
    if len(both) != 2 or (least is not None and min(both) < least):
        bound = "" if least is None else f", of at least {least}"
        raise ValueError(f"`{name}` must be one integer or two{bound}; got {both}.")
    return both


def _pairs(padding: Any) -> Any:
    """The padding before and after each axis, checked as by `_two`."""
    if isinstance(padding, Sequence) and any(isinstance(x, Sequence) for x in padding):
        if len(padding) != 2:
            raise ValueError(
                f"`padding` must have a pair for each of two axes; got {len(padding)}."
            )
        return tuple(_two("padding", pair, None) for pair in padding)
    return tuple((x, x) for x in _two("padding", padding, None))


_PAD_MODES = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


def _copy_fields(convolution: eqx.nn.Conv2d, new: Conv2d) -> None:
    # Not by `__init__`, which needs a key, and not by `setattr`, which a module that is
    # complete refuses.
    for field in dataclasses.fields(Conv2d):
        object.__setattr__(new, field.name, getattr(convolution, field.name))
