import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._classifier import last_layer, LinearClassifier
from .._data._augmentation import AbstractAugmentation, augment
from .._data._distilled_set import DistilledSet
from .._nn._conv2d import Conv2d
from .._nn._networks import Network
from ._inner_solver import AbstractInnerSolver, Fitted
from ._ridge_solver import RidgeSolver


class PoolState(eqx.Module):
    """The networks of a pool.

    **Attributes:**

    - `weights`: the parameters of each network, in a row.
    - `training`: the state of the optimiser of each network.
    - `ages`: the number of steps that each network has been trained for.
    """

    weights: Float[Array, "networks parameters"]
    training: PyTree
    ages: Int[Array, " networks"]


class Pool(AbstractInnerSolver[PoolState]):
    r"""Fits the last layer of a network that is drawn from a pool, in closed form, so
    that images are distilled for networks of all ages:

    $$w^\star(\theta) = \arg\min_w \frac{1}{2n} \|\Phi_j(\theta) w - T\|^2
    + \frac{\lambda}{2} \|w\|^2,$$

    with the features $\Phi_j$ before the last layer of network $j$, drawn anew in each
    outer step, and scaled such that their mean squared norm is the number of images
    $n$. The ridge $\lambda$ is therefore relative to the features.

    After each fit the network that was drawn takes one step of training on the
    distilled images, and when it has taken `max_age` steps it is started anew. A
    hypergradient needs the features of the real images, and no gradient of them.

    `classifier` must be `None` where a pool is the inner solver.

    !!! Example

        ```python
        network = functools.partial(eqd.nn.ConvNet, widths=(16, 32, 64), norm=None)
        start = eqd.DistilledSet(
            real.images, targets, l2=1e-3, loss=eqd.SquaredError()
        )
        result = eqd.distill(
            start,
            None,
            eqd.Batches(train, 128),
            inner=eqd.Pool(network, train.num_classes),
            learn=(True, False),
            key=jr.key(0),
        )
        ```

    Source: Zhou, Nezhadarya and Ba, *Dataset distillation using neural feature
    regression* (FRePo), 2022, Algorithm 1.

    **Attributes:**

    - `network`: makes a network from the shape of an image, the number of classes and a
        `key`, such as [`eqdistill.nn.ConvNet`][] with all else bound.
    - `num_classes`: the number of classes $c$.
    - `inner`: fits the last layer.
    - `size`: the number of networks in the pool.
    - `max_age`: the number of steps after which a network is started anew.
    - `optimiser`: the Optax optimiser of the networks.
    - `augmentation`: how the distilled images are changed in the training of the
        networks, or `None`.
    """

    takes_classifier: ClassVar[bool] = False

    network: Callable = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    inner: AbstractInnerSolver = RidgeSolver()
    size: int = eqx.field(static=True, default=10)
    max_age: int = eqx.field(static=True, default=100)
    optimiser: optax.GradientTransformation = eqx.field(
        static=True, default=optax.adam(1e-3)
    )
    augmentation: AbstractAugmentation | None = None

    def __check_init__(self):
        """**Raises:**

        A `ValueError` if there are no networks or classes, or networks of no age.
        """
        for name in ("num_classes", "size", "max_age"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1; got {getattr(self, name)}."
                )

    def init(self, distilled, classifier, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `ValueError` if there is no `key`.
        """
        del classifier
        if key is None:
            raise ValueError(
                "`key` must be given with a `Pool`, which draws networks; got None."
            )
        template = self._template(distilled)
        weights = jax.vmap(template.draw)(jr.split(key, self.size))
        return PoolState(
            weights,
            jax.vmap(self.optimiser.init)(weights),
            # One after the other reaches its greatest age.
            jnp.arange(self.size) * self.max_age // self.size,
        )

    def __call__(self, distilled: DistilledSet, classifier, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][]."""
        del classifier
        assert key is not None  # As `init` has checked.
        index_key, augmentation_key, fresh_key = jr.split(key, 3)
        index = jr.randint(index_key, (), 0, self.size)
        template = self._template(distilled)
        weights, training, age = jax.tree.map(
            lambda x: x[index], (state.weights, state.training, state.ages)
        )
        fitted = self._fit(template.network(weights), distilled)

        # The training of the network is not differentiated.
        images, labels = jax.lax.stop_gradient((distilled.images, distilled.labels))
        if self.augmentation is not None:
            images = augment(self.augmentation, images, key=augmentation_key)

        def loss(weights):
            outputs = jax.vmap(template.network(weights))(images)
            return distilled.loss(outputs, labels)

        updates, training = self.optimiser.update(
            jax.grad(loss)(weights), training, weights
        )
        weights = optax.apply_updates(weights, updates)
        fresh = template.draw(fresh_key)
        weights, training, age = optax.tree.where(
            age + 1 < self.max_age,
            (weights, training, age + 1),
            (fresh, self.optimiser.init(fresh), jnp.zeros_like(age)),
        )
        stacks, structure = jax.tree.flatten(state)
        new = jax.lax.stop_gradient(jax.tree.leaves((weights, training, age)))
        stacks = [x.at[index].set(y) for x, y in zip(stacks, new, strict=True)]
        return fitted, jax.tree.unflatten(structure, stacks)

    def _fit(self, network: Network, distilled: DistilledSet) -> Fitted:
        linear = last_layer(network)
        features = jax.vmap(linear.features)(distilled.images)
        n, p = features.shape
        factor = n * jax.lax.rsqrt(jnp.sum(features**2))
        shape = jax.ShapeDtypeStruct((self.num_classes, p), features.dtype)
        head = eqx.filter_eval_shape(
            eqx.nn.Linear, p, self.num_classes, use_bias=False, key=jr.key(0)
        )
        zeros = eqx.tree_at(
            lambda h: h.weight, head, jnp.zeros(shape.shape, shape.dtype)
        )
        scaled = LinearClassifier(_Scaled(linear.features, factor), zeros)
        solver_state = self.inner.init(distilled, scaled, key=None)
        fitted, _ = self.inner(distilled, scaled, solver_state, key=None)
        # The features stay as they are, and the head takes the factor.
        head = eqx.tree_at(
            lambda h: h.weight, zeros, factor * fitted.classifier.head.weight
        )
        return eqx.tree_at(
            lambda f: f.classifier, fitted, LinearClassifier(linear.features, head)
        )

    def _template(self, distilled: DistilledSet) -> "_Template":
        network = eqx.filter_eval_shape(
            self.network,
            distilled.images.shape[1:],
            self.num_classes,
            key=jr.key(0),
        )
        return _Template(network)


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
