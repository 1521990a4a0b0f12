"""What a network is made of, and how its weights are drawn."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_at_least
from ._conv2d import Conv2d


class Network(eqx.Module):
    """A network whose layers stand in a row, with all that is needed to make the
    network again from a file.

    **Attributes:**

    - `layers`: the layers, from one image to its logits. The last one is an
        `equinox.nn.Linear`: [`eqdistill.last_layer`][] makes a linear classifier of the
        network.
    - `architecture`: the name of the function that made the network.
    - `settings`: the arguments of that function, as pairs of a name and a value.
    """

    layers: eqx.nn.Sequential
    architecture: str = eqx.field(static=True)
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " c"]:
        """**Arguments:**

        - `image`: one image, of the shape that the network was made for.

        **Returns:**

        The logits.

        **Raises:**

        A `ValueError` if the image is of another shape.
        """
        wanted = dict(self.settings)["shape"]
        if image.shape != wanted:
            raise ValueError(
                f"`image` must have shape {wanted}, for which this "
                f"`{self.architecture}` was made; got shape {image.shape}."
            )
        return self.layers(image)


def instance_norm(channels: int) -> eqx.nn.GroupNorm:
    """Instance normalisation with a learned scale and shift for each channel.

    Source: Ulyanov et al., *Instance normalization*, 2016.
    """
    check_at_least(1, channels=channels)
    return eqx.nn.GroupNorm(int(channels), int(channels))


def group_norm(channels: int) -> eqx.nn.GroupNorm:
    """Group normalisation in four groups.

    Source: Wu and He, *Group normalization*, 2018.
    """
    if channels < 1 or channels % 4 != 0:
        raise ValueError(f"`channels` must be a multiple of 4; got {channels}.")
    return eqx.nn.GroupNorm(4, int(channels))


# He et al. 2015 and LeCun et al. 1998, for the weights of Equinox's layers, whose first
# axis is that of the outputs. Biases become zero.
he = jax.nn.initializers.he_normal(in_axis=1, out_axis=0)
lecun = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)


def initialise(
    network: Network, initialiser: Callable, *, key: PRNGKeyArray
) -> Network:
    """The network with all weights drawn anew, and all biases zero. Scales and shifts
    of normalisations stay.

    **Arguments:**

    - `network`: an [`eqdistill.nn.Network`][].
    - `initialiser`: of the kind of `jax.nn.initializers`, for weights whose first two
        axes are the outputs and the inputs: `eqdistill.nn.he` or
        `eqdistill.nn.lecun`.
    - `key`: a `jax.random.key`. (Keyword only argument.)

    **Returns:**

    The new network.
    """

    def is_layer(node: Any) -> bool:
        return isinstance(node, Conv2d | eqx.nn.Linear)

    def draw(layer: Any, key: PRNGKeyArray) -> Any:
        weight = initialiser(key, layer.weight.shape, layer.weight.dtype)
        layer = eqx.tree_at(lambda layer: layer.weight, layer, weight)
        if layer.bias is None:
            return layer
        zeros = jnp.zeros_like(layer.bias)
        return eqx.tree_at(lambda layer: layer.bias, layer, zeros)

    leaves, structure = jax.tree.flatten(network.layers, is_leaf=is_layer)
    keys = jr.split(key, len(leaves))
    leaves = [
        draw(leaf, key) if is_layer(leaf) else leaf
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    layers = jax.tree.unflatten(structure, leaves)
    return dataclasses.replace(network, layers=layers)


def zero_head(network: Network) -> Network:
    """The network with a last layer of zeros. With few training images, the function
    that a random last layer starts with is never unlearned.

    **Arguments:**

    - `network`: an [`eqdistill.nn.Network`][].

    **Returns:**

    The new network, all logits of which are zero.

    Source: the centring (a network less its initial function) of Loo et al., *Efficient
    dataset distillation using random feature approximation*, 2022, has the same effect.
    """
    zeros = jax.tree.map(jnp.zeros_like, network.layers[-1])
    return eqx.tree_at(lambda network: network.layers[-1], network, zeros)
