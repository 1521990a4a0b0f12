"""Layers that are fast on a CPU and compute what Equinox's layers compute."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from ._conv2d import Conv2d


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
