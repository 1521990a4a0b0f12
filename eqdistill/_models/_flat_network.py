"""Networks of any kind with their parameters in one flat array, which is fast to draw,
to read from a pool and to write back."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._classifier import last_layer, LinearClassifier


# The flattened parameters of a network, and its other arrays, usually none.
Flat = tuple[Float[Array, "..."], PyTree]


@dataclasses.dataclass(frozen=True)
class FlatNetworks:
    """The networks that a constructor makes, with the initialisation of that
    constructor.

    **Attributes:**

    - `make`: the constructor, a function of `key`.
    - `where`: selects the last layer, as for [`eqdistill.linear.last_layer`][].
    """

    make: Callable
    where: Callable | None

    def draw(self, key: PRNGKeyArray) -> Flat:
        """A fresh network."""
        # XLA compiles these random numbers several times faster than the default ones.
        data = jr.bits(key, (4,), jnp.uint32)
        floats, rest = eqx.partition(
            self.make(key=jr.wrap_key_data(data, impl="rbg")), eqx.is_inexact_array
        )
        return ravel_pytree(floats)[0], eqx.filter(rest, eqx.is_array)

    def network(self, flat: Flat) -> PyTree:
        row, others = flat
        unravel, static = self._structure
        return eqx.combine(unravel(row), others, static)

    def last_layer(self, flat: Flat) -> LinearClassifier:
        return last_layer(self.network(flat), self.where)

    @ft.cached_property
    def struct(self) -> PyTree:
        """The network, with shapes and dtypes instead of arrays."""
        return eqx.filter_eval_shape(self.make, key=jr.key(0))

    @property
    def head(self) -> eqx.nn.Linear:
        """The last layer, with shapes and dtypes instead of arrays."""
        return last_layer(self.struct, self.where).head

    @ft.cached_property
    def _structure(self) -> tuple[Callable, PyTree]:
        is_struct = lambda x: isinstance(x, jax.ShapeDtypeStruct)
        is_float = lambda x: is_struct(x) and jnp.issubdtype(x.dtype, jnp.inexact)
        floats = eqx.filter(self.struct, is_float)
        unravel = []

        def ravel(floats):
            row, inverse = ravel_pytree(floats)
            unravel.append(inverse)
            return row

        jax.eval_shape(ravel, floats)
        return unravel[0], eqx.filter(self.struct, is_struct, inverse=True)


def select_network(
    networks: tuple[FlatNetworks, ...],
    flats: tuple[Flat, ...],
    index: int | Int[Array, ""],
) -> LinearClassifier:
    """The last layer of one of several networks, without its bias. Features are padded
    with zeros to the largest width, which does not affect ridge regression."""
    models = [x.last_layer(flat) for x, flat in zip(networks, flats, strict=True)]
    width = max(x.head.weight.shape[1] for x in models)
    pad = lambda weight: jnp.pad(weight, ((0, 0), (0, width - weight.shape[1])))
    weight = jnp.stack([pad(x.head.weight) for x in models])[index]
    widest = max((x.head for x in models), key=lambda head: head.weight.shape[1])
    head = eqx.tree_at(
        lambda h: (h.weight, h.bias), widest, (weight, None), is_leaf=_is_none
    )
    features = tuple(x.features.module for x in models)
    return LinearClassifier(
        _SelectedFeatures(jnp.asarray(index), features, width), head
    )


class _SelectedFeatures(eqx.Module):
    index: Int[Array, ""]
    options: tuple[Callable, ...]
    width: int = eqx.field(static=True)

    def __call__(self, image: Array) -> Float[Array, " width"]:
        def features(option, image):
            found = option(image)
            return jnp.pad(found, (0, self.width - len(found)))

        # Modules that hold traced arrays cannot be branches, which JAX hashes.
        branches = [
            lambda x, option=option: features(option, x) for option in self.options
        ]
        return jax.lax.switch(self.index, branches, image)


def _is_none(x: Any) -> bool:
    return x is None
