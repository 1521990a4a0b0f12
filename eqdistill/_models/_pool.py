import functools as ft
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._checks import check_at_least, check_make, check_model, check_positive
from .._conversions import as_float, as_int
from .._data._augmentation import AbstractAugmentation, augment
from .._data._distilled_set import DistilledSet
from .._inner._fit import image_struct
from .._inner._unrolled_solver import has_dropout
from .._losses import mean_loss
from .._sharding import vary_like
from ._flat_network import Flat, FlatNetworks, select_network
from ._models import AbstractModels


class PoolState(eqx.Module):
    """The networks of a pool: one entry for each constructor.

    **Attributes:**

    - `networks`: the arrays of the networks. Their first axis runs over the networks.
    - `training`: the states of their optimisers.
    - `ages`: the number of steps that each network has been trained for.
    """

    networks: tuple[Flat, ...]
    training: tuple[PyTree, ...]
    ages: tuple[Int[Array, " size"], ...]


class Pool(AbstractModels[PoolState]):
    r"""The last layer of a network that is drawn at random from a pool of networks of
    all ages. Images that are distilled for a pool can train networks from scratch. Each
    step fits

    $$w^\star(\theta) = \arg\min_w f(\Phi_j(\theta) w; y) + \frac{\lambda}{2} \|w\|^2,$$

    with the features $\Phi_j$ before the last layer of network $j$, which differs from
    step to step. [`eqdistill.AutoSolver`][] fits this layer with a ridge that is
    relative to the features.

    After each outer step, the network that was drawn takes one training step on the
    distilled images, without a ridge. After `max_age` steps it starts again, from fresh
    initial weights. A hypergradient needs the features of the real images, but not
    their gradients.

    Dropout is on when the networks are trained, and off when their features are
    computed. Networks with batch normalisation raise an error, because a pool cannot
    hold their state.

    !!! Example

        ```python
        network = functools.partial(eqd.nn.ConvNet, (28, 28), 10, widths=(16, 32, 64))
        start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0))
        result = eqd.distill(
            start.with_targets(10),
            eqd.Pool(network),
            eqd.Batches(train, 128),
            learn=lambda s: s,
            steps=2000,
        )
        ```

    Source: Zhou, Nezhadarya and Ba, *Dataset distillation using neural feature
    regression* (FRePo), 2022, Algorithm 1.
    """

    networks: tuple[FlatNetworks, ...] = eqx.field(static=True)
    weights: tuple[float, ...] | None = eqx.field(static=True)
    size: int = eqx.field(static=True, converter=as_int)
    max_age: int = eqx.field(static=True, converter=as_int)
    optimiser: optax.GradientTransformation
    augmentation: AbstractAugmentation | None

    def __init__(
        self,
        *makes: Callable,
        weights: Sequence[float] | None = None,
        where: Callable | None = None,
        size: int = 10,
        max_age: int = 100,
        optimiser: optax.GradientTransformation = optax.adam(1e-3),
        augmentation: AbstractAugmentation | None = None,
    ):
        """**Arguments:**

        - `makes`: functions `make(*, key)`, each of which builds a network, with the
            initial weights of your choice. The last layers of the networks may have
            different widths. The images work for the architectures that are in the
            pool.

        All other arguments are keyword only.

        - `weights`: positive numbers, in proportion to which the architectures are
            drawn. Defaults to equal weights. Give a larger weight to an
            architecture that learns poorly from the images.
        - `where`: selects the last layer of a network, as for
            [`eqdistill.linear.last_layer`][].
        - `size`: the number of networks of each architecture.
        - `max_age`: the number of training steps after which a network starts again.
        - `optimiser`: the Optax optimiser of the networks.
        - `augmentation`: changes the distilled images when the networks are trained.

        **Raises:**

        A `TypeError` if one of `makes` is a network, or needs arguments other than
        `key`. A `ValueError` if there is no function, if there is not one positive
        weight for each, or if `size` or `max_age` is less than 1.
        """
        if not makes:
            raise ValueError("`makes` must be at least one function; got none.")
        for make in makes:
            check_make("makes", make)
        check_at_least(1, size=size, max_age=max_age)
        self.weights = None
        if weights is not None:
            self.weights = tuple(map(as_float, weights))
            if len(weights) != len(makes):
                raise ValueError(
                    f"`weights` must have a number for each of the {len(makes)} "
                    f"`makes`; got {len(weights)}."
                )
            for weight in self.weights:
                check_positive(weights=weight)
        self.networks = tuple(FlatNetworks(make, where) for make in makes)
        self.size = size
        self.max_age = max_age
        self.optimiser = optimiser
        self.augmentation = augmentation

    def init(self, distilled, *, key):
        """**Raises:** a `TypeError` or `ValueError` for a network that cannot be
        applied to the distilled images or holds state, or if the networks differ
        in their number of outputs."""
        check_networks(self.networks, distilled)
        keys = jr.split(key, (len(self.networks), self.size))
        # A loop, since not every constructor can be vectorised.
        networks = tuple(
            jax.lax.map(own.draw, own_keys)
            for own, own_keys in zip(self.networks, keys, strict=True)
        )
        training = tuple(jax.vmap(self.optimiser.init)(rows) for rows, _ in networks)
        # The networks reach their maximum age one after another.
        age = jnp.arange(self.size) * self.max_age // self.size
        return PoolState(networks, training, tuple(age for _ in networks))

    def draw(self, state, *, key):
        kind, index, _ = self._place(key)
        flats = tuple(_read(stack, index) for stack in state.networks)
        return select_network(self.networks, flats, kind)

    def update(self, state, distilled, *, key):
        kind, index, key = self._place(key)
        stacks = list(zip(state.networks, state.training, state.ages, strict=True))
        updated = []
        for i, (networks, stack) in enumerate(zip(self.networks, stacks, strict=True)):
            own = jax.tree.map(lambda x: x[index], stack)
            train = ft.partial(self._train, networks, distilled, key=key)
            new = jax.lax.cond(kind == i, train, lambda *own: own, *own)
            updated.append(jax.tree.map(lambda x, y: x.at[index].set(y), stack, new))
        return PoolState(*zip(*updated, strict=True))

    def _place(self, key: PRNGKeyArray):
        kind_key, index_key, key = jr.split(key, 3)
        weights = None if self.weights is None else jnp.array(self.weights)
        kind = jr.choice(kind_key, len(self.networks), p=weights)
        return kind, jr.randint(index_key, (), 0, self.size), key

    def _train(self, networks, distilled, flat, training, age, *, key):
        """One training step, after which an old network starts again."""
        augmentation_key, dropout_key, fresh_key = jr.split(key, 3)
        images = distilled.images
        if self.augmentation is not None:
            images = augment(self.augmentation, images, key=augmentation_key)
        row, others = flat

        def loss(row):
            network = networks.network((row, others))
            if has_dropout(network):
                keys = jr.split(dropout_key, len(images))
                outputs = jax.vmap(lambda x, key: network(x, key=key))(images, keys)
            else:
                outputs = jax.vmap(network)(images)
            labels, weights = distilled.labels, distilled.weights
            return mean_loss(distilled.loss, outputs, labels, weights)

        updates, training = self.optimiser.update(jax.grad(loss)(row), training, row)
        trained = (optax.apply_updates(row, updates), others), training, age + 1

        def start_again(flat, training, age):
            flat = networks.draw(fresh_key)
            fresh = flat, self.optimiser.init(flat[0]), jnp.zeros_like(age)
            return vary_like(fresh, trained)

        is_young = age + 1 < self.max_age
        return jax.lax.cond(is_young, lambda *own: own, start_again, *trained)


def check_networks(networks: tuple[FlatNetworks, ...], distilled: DistilledSet) -> None:
    """**Raises:**

    A `TypeError` or `ValueError` for a network that cannot be applied to the distilled
    images or holds state, or if the networks differ in their number of outputs.
    """
    image = image_struct(distilled)
    found = set()
    for own in networks:
        check = lambda network: found.add(check_model(network, image))
        eqx.filter_eval_shape(check, own.struct)
    if len(found) > 1:
        raise ValueError(
            "The networks of a pool must have the same number of outputs; got "
            f"{sorted(found)}."
        )


def _read(stack: PyTree, index: Int[Array, ""]) -> PyTree:
    """One entry of stacked arrays."""
    # A branch copies the entry first. Otherwise XLA would read each number from the
    # stack wherever the number is used, and a step would take half as long again.
    entry = jax.tree.map(lambda x: jax.lax.stop_gradient(x[index]), stack)
    zeros = lambda entry: jax.tree.map(jnp.zeros_like, entry)
    return jax.lax.cond(index >= 0, lambda entry: entry, zeros, entry)
