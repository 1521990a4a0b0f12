import functools as ft
import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._classifier import last_layer, LinearClassifier, LogisticRegression
from .._data._augmentation import AbstractAugmentation, augment
from .._data._distilled_set import DistilledSet
from .._nn._conv2d import Conv2d
from .._nn._network import Network
from ._inner_solver import AbstractInnerSolver, Fitted
from ._linear import with_head
from ._ridge_solver import RidgeSolver


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


class Pool(AbstractInnerSolver[PoolState]):
    r"""Fits the last layer of a network that is drawn from a pool, so that images are
    distilled for networks of all ages:

    $$w^\star(\theta) = \arg\min_w f(\Phi_j(\theta) w; y) + \frac{\lambda}{2} \|w\|^2,$$

    with the features $\Phi_j$ before the last layer of network $j$, which is drawn anew
    in each outer step. The features are scaled such that their mean squared norm is the
    number of images $n$: the ridge $\lambda$ is relative to the features.

    After each fit the network that was drawn takes one step of training on the
    distilled images, without a ridge. A network that has taken `max_age` steps is
    started anew. A hypergradient needs the features of the real images, and no gradient
    of them.

    `classifier` must be `None` where a pool is the inner solver, and a `key` must be
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

    takes_classifier: ClassVar[bool] = False

    networks: tuple[Callable, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    inner: AbstractInnerSolver
    size: int = eqx.field(static=True)
    max_age: int = eqx.field(static=True)
    optimiser: optax.GradientTransformation
    augmentation: AbstractAugmentation | None

    def __init__(
        self,
        *networks: Callable,
        num_classes: int,
        inner: AbstractInnerSolver = RidgeSolver(),
        size: int = 10,
        max_age: int = 100,
        optimiser: optax.GradientTransformation = optax.adam(1e-3),
        augmentation: AbstractAugmentation | None = None,
    ):
        """**Arguments:**

        - `networks`: the kinds of networks, with last layers of equally many features.
            Each one makes a network of `eqdistill.nn` from the shape of an image, the
            number of classes and a `key`, such as [`eqdistill.nn.ConvNet`][] with all
            else bound. The images serve the kinds that are in the pool: with and
            without normalisation, say.

        All other arguments are keyword only.

        - `num_classes`: the number of classes $c$.
        - `inner`: fits the last layer. The default is for
            [`eqdistill.SquaredError`][]; [`eqdistill.SpanSolver`][] is for
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
        sizes = {"num_classes": num_classes, "size": size, "max_age": max_age}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1; got {value}.")
        self.networks = networks
        self.num_classes = num_classes
        self.inner = inner
        self.size = size
        self.max_age = max_age
        self.optimiser = optimiser
        self.augmentation = augmentation

    def init(self, distilled, classifier, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `ValueError` if there is no `key`, or if the last layers of the networks
        differ in the number of their features.
        """
        del classifier
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

    def __call__(self, distilled: DistilledSet, classifier, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][]."""
        del classifier
        assert key is not None  # As `init` has checked.
        kind_key, index_key, *keys = jr.split(key, 2 + len(self.networks))
        kind = jr.randint(kind_key, (), 0, len(self.networks))
        index = jr.randint(index_key, (), 0, self.size)
        templates = self._templates(distilled)
        # One network of each kind is taken out, which costs nothing.
        drawn = [
            template.network(rows[index])
            for template, rows in zip(templates, state.weights, strict=True)
        ]
        features = _Either(kind, tuple(last_layer(x).features for x in drawn))
        fitted = self._fit(features, distilled)

        stacks = zip(state.weights, state.training, state.ages, strict=True)
        fixed = jax.lax.stop_gradient(distilled)
        moved = []
        for i, stack in enumerate(stacks):
            own = jax.tree.map(lambda x: jax.lax.stop_gradient(x[index]), stack)
            train = ft.partial(self._train, templates[i], fixed, key=keys[i])
            new = jax.lax.cond(kind == i, train, lambda *own: own, *own)
            moved.append(jax.tree.map(lambda x, y: x.at[index].set(y), stack, new))
        return fitted, PoolState(*zip(*moved, strict=True))

    def _fit(self, features: Callable, distilled: DistilledSet) -> Fitted:
        """Fits a last layer on the features."""
        rows = jax.vmap(features)(distilled.images)
        factor = len(rows) * jax.lax.rsqrt(jnp.sum(rows**2))
        head = LogisticRegression(
            rows.shape[1], self.num_classes, dtype=rows.dtype
        ).head
        scaled = LinearClassifier(_Scaled(features, factor), head)
        state = self.inner.init(distilled, scaled, key=None)
        fitted, _ = self.inner(distilled, scaled, state, key=None)
        # The features stay as they are, and the last layer takes the factor.
        weight = factor * fitted.classifier.head.weight
        classifier = with_head(LinearClassifier(features, head), weight, None)
        return eqx.tree_at(lambda f: f.classifier, fitted, classifier)

    def _train(self, template, distilled, weights, training, age, *, key):
        """A step of training, of a network that is then a step older, or started
        anew."""
        augmentation_key, fresh_key = jr.split(key)
        images = distilled.images
        if self.augmentation is not None:
            images = augment(self.augmentation, images, key=augmentation_key)

        def loss(weights):
            outputs = jax.vmap(template.network(weights))(images)
            return distilled.loss(outputs, distilled.labels)

        gradient = jax.grad(loss)(weights)
        updates, training = self.optimiser.update(gradient, training, weights)
        weights = optax.apply_updates(weights, updates)
        fresh = template.draw(fresh_key)
        return optax.tree.where(
            age + 1 < self.max_age,
            (weights, training, age + 1),
            (fresh, self.optimiser.init(fresh), jnp.zeros_like(age)),
        )

    def _templates(self, distilled: DistilledSet) -> list["_Template"]:
        shape = distilled.images.shape[1:]
        return [
            _Template(
                eqx.filter_eval_shape(network, shape, self.num_classes, key=jr.key(0))
            )
            for network in self.networks
        ]


class _Either(eqx.Module):
    """One of several features of an image."""

    kind: Int[Array, ""]
    options: tuple[Callable, ...]

    def __call__(self, image: Array) -> Array:
        if len(self.options) == 1:
            return self.options[0](image)
        # Modules that hold traced arrays cannot be branches, which JAX hashes.
        branches = [lambda x, f=f: f(x) for f in self.options]
        return jax.lax.switch(self.kind, branches, image)


class _Scaled(eqx.Module):
    features: Callable
    factor: Float[Array, ""]

    def __call__(self, image: Array) -> Array:
        return self.factor * self.features(image)


class _Template:
    """The structure of a network, whose parameters stand in a row: one array is quick
    to draw, to take out of a pool and to write back."""

    def __init__(self, network: Any):
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


def _bounds(network: Any) -> list[float | None]:
    """The bound of each array of a network, or `None` for the scale of a normalisation;
    its shift is zero."""
    is_layer = lambda x: isinstance(x, Conv2d | eqx.nn.Linear | eqx.nn.GroupNorm)
    bounds: list[float | None] = []
    for layer in jax.tree.leaves(network, is_leaf=is_layer):
        if isinstance(layer, eqx.nn.GroupNorm):
            bounds += [None, 0.0]
        elif is_layer(layer):
            bound = 1 / math.sqrt(math.prod(layer.weight.shape[1:]))
            bounds += [bound] * len(jax.tree.leaves(layer))
    return bounds
