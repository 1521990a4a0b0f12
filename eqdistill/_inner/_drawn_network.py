"""Fresh networks, whose parameters stand in a row."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._classifier import last_layer
from .._nn._conv2d import Conv2d
from .._nn._network import Network


class Template:
    """The structure of a network, whose parameters stand in a row: one array is quick
    to draw, to take out of a pool and to write back."""

    def __init__(
        self, name: str, make: Callable, shape: tuple[int, ...], num_classes: int
    ):
        """**Raises:**

        A `TypeError`, which names the argument `name`, for a network that cannot be
        drawn, or cannot be trained without a state or a key; a `ValueError` for one
        with another number of logits.
        """
        network = eqx.filter_eval_shape(make, shape, num_classes, key=jr.key(0))
        _check(name, network)
        found = network.layers[-1].out_features
        if found != num_classes:
            raise ValueError(
                f"`{name}` must make networks with {num_classes} logits, the "
                f"`num_classes`; got {found}."
            )
        is_struct = lambda x: isinstance(x, jax.ShapeDtypeStruct)
        self._structs, self._structure = jax.tree.flatten(network)
        self._places = [i for i, x in enumerate(self._structs) if is_struct(x)]
        self._bounds = _bounds(network)
        self.size = sum(self._structs[i].size for i in self._places)
        self.in_features = network.layers[-1].in_features

    def network(self, weights: Float[Array, " parameters"]) -> Network:
        leaves, first = list(self._structs), 0
        for i in self._places:
            struct = leaves[i]
            leaves[i] = weights[first : first + struct.size].reshape(struct.shape)
            first += struct.size
        return jax.tree.unflatten(self._structure, leaves)

    def draw(self, key: PRNGKeyArray) -> Float[Array, " parameters"]:
        """Draws parameters as PyTorch does: uniformly within one over the square root
        of a layer's number of inputs. Scales of normalisations are one."""
        uniform = jr.uniform(key, (self.size,), minval=-1.0)
        parts, first = [], 0
        for i, bound in zip(self._places, self._bounds, strict=True):
            size = self._structs[i].size
            part = uniform[first : first + size]
            parts.append(jnp.ones_like(part) if bound is None else bound * part)
            first += size
        return jnp.concatenate(parts)


_LAYERS = Conv2d | eqx.nn.Linear | eqx.nn.GroupNorm


def _check(name: str, network: Any) -> None:
    if not isinstance(network, Network):
        raise TypeError(
            f"`{name}` must make networks of `eqdistill.nn`; got a "
            f"{type(network).__name__}."
        )
    last_layer(network)
    is_node = lambda x: isinstance(x, _LAYERS | eqx.nn.StateIndex | eqx.nn.Dropout)
    for path, node in jax.tree.leaves_with_path(network, is_leaf=is_node):
        if isinstance(node, jax.ShapeDtypeStruct) or (
            is_node(node) and not isinstance(node, _LAYERS)
        ):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            is_array = isinstance(node, jax.ShapeDtypeStruct)
            kind = "array of another layer" if is_array else type(node).__name__
            raise TypeError(
                f"`{name}` must have convolutions, linear layers and group "
                "normalisation for all of their parameters, and neither a state, as "
                f"batch normalisation has, nor dropout; got a {kind} at `{where}`."
            )


def _bounds(network: Network) -> list[float | None]:
    """The bound of each array of a network, or `None` for the scale of a normalisation;
    its shift is zero."""
    is_layer = lambda x: isinstance(x, _LAYERS)
    bounds: list[float | None] = []
    for layer in jax.tree.leaves(network, is_leaf=is_layer):
        if isinstance(layer, eqx.nn.GroupNorm):
            bounds += [None, 0.0] if layer.channelwise_affine else []
        elif is_layer(layer):
            bound = 1 / math.sqrt(math.prod(layer.weight.shape[1:]))
            bounds += [bound] * len(jax.tree.leaves(layer))
    return bounds


class Either(eqx.Module):
    """One of several features of an image."""

    kind: Int[Array, ""]
    options: tuple[Callable, ...]

    def __call__(self, image: Array) -> Array:
        # Modules that hold traced arrays cannot be branches, which JAX hashes.
        branches = [lambda x, f=f: f(x) for f in self.options]
        return jax.lax.switch(self.kind, branches, image)
