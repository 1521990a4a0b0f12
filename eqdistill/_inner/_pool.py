import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._checks import check_at_least
from .._classifier import last_layer, LinearClassifier
from .._conversions import as_int
from .._data._augmentation import AbstractAugmentation, augment
from .._data._distilled_set import DistilledSet
from ._drawn_network import Either, Template
from ._inner_solver import AbstractDrawingSolver, AbstractInnerSolver
from ._linear import with_head
from ._relative_ridge import RelativeRidge


class PoolState(eqx.Module):
    """The networks of a pool: one entry for each kind of network.

    **Attributes:**

    - `weights`: the parameters of each network, in a row.
    - `training`: the state of the optimiser of each network.
    - `ages`: the number of steps that each network has been trained for.
    """

    weights: tuple[Float[Array, "size _"], ...]
    training: tuple[PyTree, ...]
    ages: tuple[Int[Array, " size"], ...]


class Pool(AbstractDrawingSolver[PoolState]):
    r"""Fits the last layer of a network that is drawn from a pool, so that images are
    distilled for networks of all ages:

    $$w^\star(\theta) = \arg\min_w f(\Phi_j(\theta) w; y) + \frac{\lambda}{2} \|w\|^2,$$

    with the features $\Phi_j$ before the last layer of network $j$, which is drawn anew
    in each outer step. By default the ridge $\lambda$ is relative to the features:
    [`eqdistill.RelativeRidge`][].

    After each fit the network that was drawn takes one step of training on the
    distilled images, without a ridge. A network that has taken `max_age` steps is
    started anew. Where the inner problem is a last layer, a hypergradient needs the
    features of the real images, and no gradient of them.

    `model` must be `None` where a pool is the inner solver, and a `key` must be
    given.

    !!! Example

        ```python
        network = functools.partial(eqd.nn.ConvNet, widths=(16, 32, 64), norm=None)
        targets = jax.nn.one_hot(real.labels, 10) - 0.1
        start = eqd.DistilledSet(
            real.images, targets, l2=1e-3, loss=eqd.SquaredError()
        )
        result = eqd.distill(
            start,
            None,
            eqd.Batches(train, 128),
            inner=eqd.Pool(network, num_classes=10),
            learn=(True, False),
            steps=2000,
            key=jr.key(0),
        )
        ```

    Source: Zhou, Nezhadarya and Ba, *Dataset distillation using neural feature
    regression* (FRePo), 2022, Algorithm 1.
    """

    networks: tuple[Callable, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True, converter=as_int)
    inner: AbstractInnerSolver
    size: int = eqx.field(static=True, converter=as_int)
    max_age: int = eqx.field(static=True, converter=as_int)
    optimiser: optax.GradientTransformation
    augmentation: AbstractAugmentation | None

    def __init__(
        self,
        *networks: Callable,
        num_classes: int,
        inner: AbstractInnerSolver = RelativeRidge(),
        size: int = 10,
        max_age: int = 100,
        optimiser: optax.GradientTransformation = optax.adam(1e-3),
        augmentation: AbstractAugmentation | None = None,
    ):
        """**Arguments:**

        - `networks`: the kinds of networks, with last layers of equally many features.
            Each one makes a network of `eqdistill.nn` from the shape of an image, the
            number of classes and a `key`, such as [`eqdistill.nn.ConvNet`][] with all
            else bound. Only the structure of that network is used: the pool draws
            parameters of its own, as PyTorch does. The images serve the kinds that are
            in the pool: with and without normalisation, say.

        All other arguments are keyword only.

        - `num_classes`: the number of classes $c$.
        - `inner`: fits the last layer, as in FRePo; or the network linearised in its
            parameters: [`eqdistill.LinearisedSolver`][]. The default is for
            [`eqdistill.SquaredError`][], and `RelativeRidge(SpanSolver())` is for
            [`eqdistill.CrossEntropy`][].
        - `size`: the number of networks of each kind.
        - `max_age`: the number of steps after which a network is started anew.
        - `optimiser`: the Optax optimiser of the networks.
        - `augmentation`: changes the distilled images in the training of the networks.

        **Raises:**

        A `ValueError` if there is no kind of network, no network, no class or no age.
        """
        if not networks:
            raise ValueError("`networks` must be at least one kind; got none.")
        check_at_least(1, num_classes=num_classes, size=size, max_age=max_age)
        self.networks = networks
        self.num_classes = num_classes
        self.inner = inner
        self.size = size
        self.max_age = max_age
        self.optimiser = optimiser
        self.augmentation = augmentation

    def init(self, distilled, model, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `ValueError` if there is no `key`, or if the last layers of the networks
        differ in the number of their features. A `TypeError` for a network that a pool
        cannot train.
        """
        del model
        if key is None:
            raise ValueError(
                "`key` must be given with a `Pool`, which draws networks; got None."
            )
        templates = self._templates(distilled)
        widths = {template.in_features for template in templates}
        if len(widths) > 1:
            raise ValueError(
                "`networks` must have last layers of equally many features; got "
                f"{sorted(widths)}."
            )
        keys = jr.split(key, (len(templates), self.size))
        weights = tuple(
            jax.vmap(template.draw)(own)
            for template, own in zip(templates, keys, strict=True)
        )
        training = tuple(jax.vmap(self.optimiser.init)(rows) for rows in weights)
        # The networks reach their greatest age one after the other.
        age = jnp.arange(self.size) * self.max_age // self.size
        return PoolState(weights, training, tuple(age for _ in weights))

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][]."""
        del model
        assert key is not None  # As `init` has checked.
        kind_key, index_key, take_key, train_key = jr.split(key, 4)
        kind = jr.randint(kind_key, (), 0, len(self.networks))
        index = jr.randint(index_key, (), 0, self.size)
        templates = self._templates(distilled)
        stacks = list(zip(state.weights, state.training, state.ages, strict=True))
        # One network of each kind is taken out, which costs nothing.
        taken = [
            self._take(template, stack, index, key=take_key)
            for template, stack in zip(templates, stacks, strict=True)
        ]
        drawn = [
            template.network(weights)
            for template, (weights, *_) in zip(templates, taken, strict=True)
        ]
        # Frozen by the linear model as a whole.
        features = Either(kind, tuple(last_layer(x).features.module for x in drawn))
        heads = [last_layer(x).head for x in drawn]
        weight = jnp.stack([head.weight for head in heads])[kind]
        model = with_head(LinearClassifier(features, heads[0]), weight, None)
        inner_state = self.inner.init(distilled, model, key=None)
        fitted, _ = self.inner(distilled, model, inner_state, key=None)

        fixed = jax.lax.stop_gradient(distilled)
        moved = []
        for i, (stack, own) in enumerate(zip(stacks, taken, strict=True)):
            train = ft.partial(self._train, templates[i], fixed, key=train_key)
            new = jax.lax.cond(kind == i, train, lambda *own: own, *own)
            moved.append(jax.tree.map(lambda x, y: x.at[index].set(y), stack, new))
        return fitted, PoolState(*zip(*moved, strict=True))

    def _take(self, template, stack, index, *, key):
        """A network with the state of its optimiser and its age, started anew if the
        network is old."""
        # A branch gives arrays. XLA would else read each number from the pool wherever
        # the number is used, and a step would take half as long again.
        own = jax.tree.map(lambda x: jax.lax.stop_gradient(x[index]), stack)

        def start_anew(weights, training, age):
            weights = template.draw(key)
            return weights, self.optimiser.init(weights), jnp.zeros_like(age)

        return jax.lax.cond(own[-1] < self.max_age, lambda *own: own, start_anew, *own)

    def _train(self, template, distilled, weights, training, age, *, key):
        """A step of training."""
        images = distilled.images
        if self.augmentation is not None:
            images = augment(self.augmentation, images, key=key)

        def loss(weights):
            outputs = jax.vmap(template.network(weights))(images)
            return distilled.loss(outputs, distilled.labels)

        gradient = jax.grad(loss)(weights)
        updates, training = self.optimiser.update(gradient, training, weights)
        return optax.apply_updates(weights, updates), training, age + 1

    def _templates(self, distilled: DistilledSet) -> list[Template]:
        shape = distilled.images.shape[1:]
        return [
            Template("networks", make, shape, self.num_classes)
            for make in self.networks
        ]
