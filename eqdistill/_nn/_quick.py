"""Layers that are quick on a CPU, in the place of Equinox's."""

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
def _average_pool_jvp(primals, tangents):
    return _average_pool(*primals), _library_pool(*tangents)


# Over squares of 2 x 2 pixels. A last row or column that is left over is dropped. XLA
# computes the average of four slices together with the layers before, and the library's
# in a slow loop of its own. The derivative of the library's is the quicker one.
average_pool = eqx.nn.Lambda(_average_pool)
max_pool = eqx.nn.MaxPool2d(2, 2)
_library_pool = eqx.nn.AvgPool2d(2, 2)


def quick_convolutions(network: PyTree) -> PyTree:
    """The same network, with an `eqdistill.nn.Conv2d` in place of each
    `equinox.nn.Conv2d`, and `eqdistill.nn.average_pool` in place of each
    `equinox.nn.AvgPool2d(2, 2)`, which would compute such convolutions again.

    **Arguments:**

    - `network`: any pytree. Subclasses of `equinox.nn.Conv2d`, other poolings and
        convolutions of other dimensions stay as they are.

    **Returns:**

    The network, with the same parameters. Its outputs are the same up to rounding.
    """

    def quick(node):
        # By type, as a subclass may compute something else.
        if type(node) is eqx.nn.Conv2d:
            return Conv2d.of(node)
        return average_pool if eqx.tree_equal(node, _library_pool) is True else node

    is_layer = lambda node: type(node) in (eqx.nn.Conv2d, eqx.nn.AvgPool2d)
    return jax.tree.map(quick, network, is_leaf=is_layer)
