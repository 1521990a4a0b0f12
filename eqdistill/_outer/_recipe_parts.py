"""What recipes are made from: optimisers, initial weights, and sets as a recipe takes
them."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._conversions import as_int
from .._data._distilled_set import DistilledSet
from .._losses import AbstractLoss, CrossEntropy, SquaredError
from .._nn._network import initialise, lecun, Network, zero_head


MOST_UPDATES = 100_000


def with_seed(network: Callable, seed: int) -> Callable:
    def make(shape, num_classes, *, key):
        del key
        return network(shape, num_classes, key=jr.key(seed))

    return make


@ft.cache  # What holds a new function is compiled anew.
def drops_at_half(updates: int) -> Callable:
    def make(learning_rate):
        schedule = optax.piecewise_constant_schedule(learning_rate, {updates // 2: 0.1})
        return optax.sgd(schedule, momentum=0.9)

    return make


@ft.cache
def by_step(momentum: float, adam: bool) -> Callable:
    def make(learning_rate):
        if adam:
            return optax.adam(
                lambda step: learning_rate[step], b1=momentum, eps_root=1e-8
            )
        # No momentum has no state.
        return optax.sgd(lambda step: learning_rate[step], momentum=momentum or None)

    return make


@ft.cache
def warms_up(warm_up: int, updates: int) -> Callable:
    start = 0.0 if warm_up > 0 else 1.0
    # Of concrete numbers, as Optax asks for.
    factor = optax.warmup_cosine_decay_schedule(start, 1.0, warm_up, updates, 0.01)
    return lambda learning_rate: optax.adam(lambda step: learning_rate * factor(step))


def as_it_is(network: PyTree, *, key: PRNGKeyArray) -> PyTree:
    del key
    return network


def as_distilled(distilled: DistilledSet, num_classes: int) -> DistilledSet:
    del num_classes
    return distilled


def as_by_lecun(network: PyTree, *, key: PRNGKeyArray) -> Network:
    return initialise(_check_network(network), lecun, key=key)


def from_zero_by_lecun(network: PyTree, *, key: PRNGKeyArray) -> Network:
    return zero_head(as_by_lecun(network, key=key))


def from_zero(network: PyTree, *, key: PRNGKeyArray) -> Network:
    del key
    return zero_head(_check_network(network))


def _check_network(network: PyTree) -> Network:
    if not isinstance(network, Network):
        raise TypeError(
            "`network` must make an `eqdistill.nn.Network` for this recipe, which "
            f"draws its weights; got a {type(network).__name__}."
        )
    return network


def check_updates(updates: int) -> int:
    if not 2 <= updates <= MOST_UPDATES:
        raise ValueError(
            f"`updates` must be from 2 to {MOST_UPDATES:,}; got {updates}."
        )
    return as_int(updates)


def with_hard_labels(
    recipe: str, weight_decay: float, distilled: DistilledSet, num_classes: int
) -> DistilledSet:
    del num_classes
    if distilled.labels.ndim != 1:
        raise ValueError(
            f"`distilled` must have hard labels for the recipe `{recipe}`; got labels "
            f"of dtype {distilled.labels.dtype} and shape {distilled.labels.shape}."
        )
    return _with(distilled, CrossEntropy(), weight_decay)


def with_targets(
    distilled: DistilledSet, num_classes: int, weight_decay: float = 0.0
) -> DistilledSet:
    is_soft = distilled.labels.ndim == 2
    if is_soft and isinstance(distilled.loss, CrossEntropy):
        targets = jax.nn.softmax(distilled.labels) - 1 / num_classes
        distilled = eqx.tree_at(lambda d: d.labels, distilled, targets)
    return _with(distilled, SquaredError(), weight_decay)


def _with(
    distilled: DistilledSet, loss: AbstractLoss, weight_decay: float
) -> DistilledSet:
    # No decay is a ridge whose logarithm is minus infinity.
    log_l2 = jnp.log(jnp.asarray(weight_decay, distilled.images.dtype))
    return eqx.tree_at(lambda d: (d.loss, d.log_l2), distilled, (loss, log_l2))
