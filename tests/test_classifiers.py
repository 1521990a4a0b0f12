"""Which parameters of a model are fitted, and which of them the ridge shrinks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd

from .conftest import ADAM, CNN, exact, OneStep


# Of six pixels and three classes.
IMAGES, REAL_IMAGES = np.split(
    np.random.default_rng(0).normal(size=(25, 6)).astype(np.float32), [5]
)
LABELS = np.arange(5) % 3
KEY = jr.key(0)
REAL = eqd.Dataset(REAL_IMAGES, np.arange(20) % 3)


def start(l2=0.1, **kwargs):
    return eqd.DistilledSet(IMAGES, LABELS, l2=l2, **kwargs)


def linear(in_features, out_features, use_bias=True, seed=0):
    """A random layer, made without compiling anything."""
    rng = np.random.default_rng(seed)
    layer = eqx.filter_eval_shape(
        eqx.nn.Linear, in_features, out_features, use_bias, key=KEY
    )
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.5), jnp.float32)
    return jax.tree.map(draw, layer)


class Affine(eqx.Module):
    """Leaves its `shift` out of the ridge."""

    scale: jax.Array
    shift: jax.Array

    def __call__(self, x, *, key=None):
        return self.scale * x + self.shift

    def penalised(self):
        return eqx.tree_at(lambda m: m.shift, jax.tree.map(lambda _: True, self), False)


class Nested(eqx.Module):
    """Frozen and fitted modules, nested and side by side."""

    blocks: dict[str, eqx.nn.Sequential]
    head: eqx.nn.Linear
    counts: jax.Array
    key: jax.Array

    def __init__(self):
        rng = np.random.default_rng(1)
        draw = lambda: jnp.asarray(rng.normal(size=4), jnp.float32)
        affine = lambda: Affine(draw(), draw())
        below = [linear(6, 4), affine(), eqx.nn.Lambda(jnp.tanh)]
        frozen = eqd.nn.Frozen(eqx.nn.Sequential(below))
        self.blocks = {
            "frozen": eqx.nn.Sequential([frozen, affine()]),
            "fitted": eqx.nn.Sequential(
                [linear(6, 4, use_bias=False, seed=1), affine()]
            ),
        }
        self.head = linear(4, 3)
        self.counts = jnp.arange(3)
        self.key = jr.key(7)

    def __call__(self, image):
        return self.head(sum(block(image) for block in self.blocks.values()))

    def groups(self):
        """The arrays that are frozen, fitted without a ridge, and fitted with it."""
        frozen, first = self.blocks["frozen"].layers
        weight, second = self.blocks["fitted"].layers
        return (
            jax.tree.leaves(eqx.filter(frozen, eqx.is_array)),
            [first.shift, second.shift],
            [first.scale, second.scale, weight.weight, *jax.tree.leaves(self.head)],
        )


def test_parameters():
    model = Nested()
    mask = eqd.nn.parameters(model)
    assert jax.tree.structure(mask) == jax.tree.structure(model)
    frozen, free, shrunk = model.groups()
    fitted = jax.tree.leaves(eqx.filter(model, mask))
    assert {id(x) for x in fitted} == {id(x) for x in (*free, *shrunk)}
    # Integers and keys are not parameters.
    rest = eqx.filter(eqx.filter(model, mask, inverse=True), eqx.is_array)
    others = (*frozen, model.counts, model.key)
    assert {id(x) for x in jax.tree.leaves(rest)} == {id(x) for x in others}


@pytest.mark.usefixtures("x64")
def test_fit_is_stationary_in_the_parameters():
    # At the fit the loss, written out here, is stationary in all arrays not frozen.
    to_double = lambda x: x.astype(float) if eqx.is_inexact_array(x) else x
    model = jax.tree.map(to_double, Nested())
    images, l2 = jnp.asarray(IMAGES, float), 0.05
    distilled = eqd.DistilledSet(images, LABELS, l2=l2)
    fitted = eqd.fit(distilled, model, exact())
    assert fitted.gradient_norm < 1e-10

    @eqx.filter_jit
    def loss(model):
        log_p = jax.nn.log_softmax(jax.vmap(model)(distilled.images))
        *_, shrunk = model.groups()
        ridge = l2 / 2 * sum(jnp.sum(x**2) for x in shrunk)
        return ridge - jnp.mean(log_p[jnp.arange(5), distilled.labels])

    assert loss(fitted.model) < loss(model) - 0.1
    before, after = model.groups(), fitted.model.groups()
    for x, y in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(x, y)
    leaves = jax.tree.leaves(eqx.filter(fitted.model, eqx.is_inexact_array))
    gradient = jax.tree.leaves(eqx.filter_grad(loss)(fitted.model))
    pairs = zip(leaves, gradient, strict=True)
    steep = {id(x) for x, g in pairs if jnp.abs(g).max() > 1e-7}
    assert steep == {id(x) for x in after[0]}


def mlp():
    return eqx.nn.Sequential([linear(6, 4), eqx.nn.Lambda(jnp.tanh), linear(4, 3)])


class HeadFirst(eqx.Module):
    """A network whose last layer is not its last field."""

    head: eqx.nn.Linear
    body: eqx.nn.Linear

    def __call__(self, image):
        return self.head(jnp.tanh(self.body(image)))


HEAD_FIRST = HeadFirst(linear(6, 3), linear(6, 6))


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (mlp, lambda n: n.layers[-1]),
        (lambda: eqx.nn.MLP(6, 3, 4, 1, key=KEY), lambda n: n.layers[-1]),
        (lambda: eqd.nn.MLP((6,), 3, key=KEY), lambda n: n.layers.layers[-1]),
        (lambda: CNN(key=KEY), lambda n: n.linear),
        (lambda: HEAD_FIRST, lambda n: n.head),
    ],
)
def test_last_layer_computes_the_same(make, head):
    network = make()
    x = jnp.ones((8, 8)) if isinstance(network, CNN) else jnp.asarray(IMAGES[0])
    where = head if network is HEAD_FIRST else None
    model = eqd.linear.last_layer(network, where)
    np.testing.assert_allclose(model(x), network(x), rtol=1e-6)
    assert model.head is head(network)
    fitted = jax.tree.leaves(eqx.filter(model, eqd.nn.parameters(model)))
    assert {id(x) for x in fitted} == {id(x) for x in jax.tree.leaves(model.head)}


def test_last_layer_that_is_not_last_is_refused():
    model = eqd.linear.last_layer(HEAD_FIRST)
    with pytest.raises(ValueError, match=r"`image` must have features of shape \(6,\)"):
        model(jnp.asarray(IMAGES[0]))
    with pytest.raises(TypeError, match=r"must end with.*Linear`; got a Sequential"):
        eqd.linear.last_layer(eqx.nn.Sequential([eqd.nn.Frozen(mlp())]))


def squared():
    """A start for `RidgeSolver`, which compiles quickly."""
    return start(loss=eqd.SquaredError())


class Trained(eqx.Module):
    """A trained network with state."""

    network: eqx.nn.BatchNorm
    state: eqx.nn.State

    def __init__(self):
        network, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            6, axis_name="batch", mode="ema"
        )
        train = jax.vmap(network, (0, None), (0, None), axis_name="batch")
        _, self.state = jax.jit(train)(REAL_IMAGES, state)
        self.network = eqx.nn.inference_mode(network)

    def __call__(self, image):
        return self.network(image, self.state)[0]


class OnTop(eqx.Module):
    below: Trained | eqd.nn.Frozen
    layer: eqx.nn.Linear

    def __call__(self, image):
        return self.layer(self.below(image))


def test_state_is_refused_outside_frozen():
    bad = OnTop(Trained(), linear(6, 3))
    with pytest.raises(TypeError, match=r"must not hold state.*at `below\.network\."):
        eqd.fit(start(), bad)


@pytest.mark.parametrize("kind", ["network", "features"])
def test_state_is_accepted_inside_frozen(kind):
    if kind == "network":
        model, inner = OnTop(eqd.nn.Frozen(Trained()), linear(6, 3)), OneStep()
    else:
        model = eqd.linear.LinearClassifier(Trained(), linear(6, 3))
        inner = eqd.linear.RidgeSolver()
    objective = eqd.Bilevel(model, inner)
    history = eqd.distill(squared(), objective, REAL, optimiser=ADAM, steps=4).history
    assert history.loss[-1] < history.loss[0] - 1e-3
    fitted = eqd.fit(squared(), model, inner).model
    frozen = lambda m: m.below if kind == "network" else m.features
    assert eqx.tree_equal(frozen(fitted), frozen(model))


@pytest.mark.slow
def test_dropout_is_off():
    dropout = eqx.nn.Dropout(0.9)
    network = eqx.nn.Sequential(
        [linear(6, 4), eqx.nn.Lambda(jnp.tanh), dropout, linear(4, 3)]
    )
    model = eqd.linear.last_layer(network)
    evaluation = eqd.evaluate(squared(), model, REAL)
    # The loss without dropout.
    fitted = evaluation.fitted.model
    first, last = fitted.features.module.layers[0], fitted.head
    hidden = np.tanh(REAL.images @ first.weight.T + first.bias)
    log_p = jax.nn.log_softmax((hidden @ last.weight.T + last.bias) / 0.2)
    loss = -np.mean(log_p[np.arange(20), REAL.labels])
    np.testing.assert_allclose(evaluation.loss, loss, rtol=1e-4)
    # Dropout is also off for the real images.
    history = eqd.distill(squared(), model, REAL, steps=1).history
    np.testing.assert_allclose(history.loss[0], loss, rtol=1e-4)
