from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import check_at_least
from .._classifier import Frozen, last_layer, parameters
from .._typechecking import describe
from ._convolve import Conv2d


class Network(eqx.Module):
    """A sequence of layers that remembers how it was made, so that it can be rebuilt
    from a file.

    **Attributes:**

    - `layers`: the layers, from one image to its logits. The last one is an
        `equinox.nn.Linear`.
    - `architecture`: the name of the function that made the network.
    - `settings`: the arguments of that function, as pairs of a name and a value.
    """

    layers: eqx.nn.Sequential
    architecture: str = eqx.field(static=True)
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " c"]:
        """Returns the outputs for one image. Raises a `ValueError` if its shape is not
        the one that the network was made for."""
        wanted = dict(self.settings)["shape"]
        if image.shape != wanted:
            raise ValueError(
                f"`image` must have shape {wanted}, the shape that this "
                f"`{self.architecture}` was made for; got shape {image.shape}."
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


# He et al. 2015 and LeCun et al. 1998, for weights whose first axis is the outputs.
he = jax.nn.initializers.he_normal(in_axis=1, out_axis=0)
lecun = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)

_WEIGHT_LAYERS = (Conv2d, eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.Linear)
_NORM_LAYERS = (eqx.nn.BatchNorm, eqx.nn.GroupNorm, eqx.nn.LayerNorm, eqx.nn.RMSNorm)


def initialise(network: PyTree, initialiser: Callable, *, key: PRNGKeyArray) -> PyTree:
    """Redraws the weights of all linear and convolutional layers, and sets their biases
    to zero. Normalisation layers are unchanged, and so is everything inside an
    [`eqdistill.nn.Frozen`][].

    **Arguments:**

    - `network`: any `equinox.Module` made of such layers.
    - `initialiser`: a function like those in `jax.nn.initializers`, for weights whose
        first two axes are the outputs and the inputs: `eqdistill.nn.he` or
        `eqdistill.nn.lecun`.
    - `key`: a `jax.random.key`. (Keyword only argument.)

    **Raises:**

    A `TypeError` if the network has a floating-point array in any other kind of layer,
    or a layer whose weights are stacked.
    """
    _check_layers(network)
    is_layer = lambda x: isinstance(x, (*_WEIGHT_LAYERS, Frozen))
    nodes, structure = jax.tree.flatten(network, is_leaf=is_layer)
    if not any(isinstance(x, _WEIGHT_LAYERS) for x in nodes):
        raise TypeError(
            "`network` must be an `equinox.Module` with linear or convolutional "
            f"layers; got {describe(network)} without any."
        )
    keys = jr.split(key, len(nodes))
    for i, (node, key) in enumerate(zip(nodes, keys, strict=True)):
        if isinstance(node, _WEIGHT_LAYERS):
            weight = initialiser(key, node.weight.shape, node.weight.dtype)
            zeros = jax.tree.map(jnp.zeros_like, node)
            nodes[i] = eqx.tree_at(lambda x: x.weight, zeros, weight)
    return jax.tree.unflatten(structure, nodes)


def zero_head(
    network: PyTree, where: Callable[[PyTree], eqx.nn.Linear] | None = None
) -> PyTree:
    """Sets the last layer, and so all outputs, to zero. A few training images cannot
    undo the effect of a random last layer.

    **Arguments:**

    - `network`: an `equinox.Module` whose last operation is an `equinox.nn.Linear`.
    - `where`: selects that layer, as for [`eqdistill.linear.last_layer`][].

    Source: equivalent to centring, i.e. subtracting the initial function, as in Loo et
    al., *Efficient dataset distillation using random feature approximation*, 2022.
    """
    head = last_layer(network, where).head
    zeros = jax.tree.map(jnp.zeros_like, head)
    return jax.tree.map(
        lambda x: zeros if x is head else x, network, is_leaf=lambda x: x is head
    )


def _check_layers(network: PyTree) -> None:
    """Raises a `TypeError` for weights that `initialise` would leave unchanged."""
    is_known = lambda x: isinstance(x, (*_WEIGHT_LAYERS, *_NORM_LAYERS, Frozen))
    for path, node in jax.tree.leaves_with_path(network, is_leaf=is_known):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        is_bad = eqx.is_inexact_array(node)
        if isinstance(node, _WEIGHT_LAYERS):
            # A subclass may have arrays that its base class lacks.
            fields = {
                k: x for k, x in vars(node).items() if k not in ("weight", "bias")
            }
            others = [k for k in fields if any(jax.tree.leaves(parameters(fields[k])))]
            is_bad, name = bool(others), ".".join([name, *others[:1]])
        if is_bad:
            raise TypeError(
                "`network` must have floating-point arrays only in linear, "
                "convolutional and normalisation layers, which `initialise` can "
                f"handle; got `{name}`. Draw its weights yourself, or wrap it in a "
                "`Frozen`."
            )
        if isinstance(node, _WEIGHT_LAYERS):
            kernel = () if isinstance(node, eqx.nn.Linear) else node.kernel_size
            if node.weight.ndim != 2 + len(kernel):
                raise TypeError(
                    "`network` must not have layers with stacked weights; got "
                    f"`{name}.weight` of shape {node.weight.shape}."
                )
