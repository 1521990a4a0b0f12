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
REAL = eqd.Dataset(REAL_IMAGES, np.arange(20) % 3)


def start(l2=0.1, **kwargs):
    return eqd.DistilledSet(IMAGES, LABELS, l2=l2, **kwargs)


def linear(in_features, out_features, use_bias=True, seed=0):
    """Random, but nothing is compiled for it."""
    rng = np.random.default_rng(seed)
    key = jr.key(0)
    layer = eqx.filter_eval_shape(
        eqx.nn.Linear, in_features, out_features, use_bias, key=key
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
    """Modules of either kind, inside of each other and side by side."""

    blocks: dict[str, eqx.nn.Sequential]
    head: eqx.nn.Linear
    counts: jax.Array
    key: jax.Array

    def __init__(self):
        rng = np.random.default_rng(1)
        draw = lambda: jnp.asarray(rng.normal(size=4), jnp.float32)
        affine = lambda: Affine(draw(), draw())
        below = [linear(6, 4), affine(), eqx.nn.Lambda(jnp.tanh)]
        frozen = eqd.Frozen(eqx.nn.Sequential(below))
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
        """The arrays that are frozen, those that are fitted without a ridge, and those
        that the ridge is taken over."""
        frozen, first = self.blocks["frozen"].layers
        weight, second = self.blocks["fitted"].layers
        return (
            jax.tree.leaves(eqx.filter(frozen, eqx.is_array)),
            [first.shift, second.shift],
            [first.scale, second.scale, weight.weight, *jax.tree.leaves(self.head)],
        )


def test_parameters():
    model = Nested()
    mask = eqd.parameters(model)
    assert jax.tree.structure(mask) == jax.tree.structure(model)
    frozen, free, shrunk = model.groups()
    fitted = jax.tree.leaves(eqx.filter(model, mask))
    assert {id(x) for x in fitted} == {id(x) for x in (*free, *shrunk)}
    # Neither integers nor keys.
    others = eqx.filter(eqx.filter(model, mask, inverse=True), eqx.is_array)
    others = jax.tree.leaves(others)
    assert {id(x) for x in others} == {
        id(x) for x in (*frozen, model.counts, model.key)
    }


def test_ridge():
    model = Nested()
    loss = eqx.filter_jit(eqd.inner_loss)
    *_, shrunk = model.groups()
    squares = sum(np.sum(np.square(x, dtype=np.float64)) for x in shrunk)
    by_the_ridge = loss(start(1.0), model) - loss(start(1e-6), model)
    np.testing.assert_allclose(by_the_ridge, squares / 2, rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_fit_by_central_differences():
    # At the fit the loss, written anew here, is stationary in all that is not frozen.
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
    leaves, structure = jax.tree.flatten(fitted.model)
    steep = set()
    for i, x in enumerate(leaves):
        if not eqx.is_inexact_array(x):
            continue
        direction = np.random.default_rng(i).normal(size=x.shape)
        losses = [
            loss(jax.tree.unflatten(structure, [*leaves[:i], x + t, *leaves[i + 1 :]]))
            for t in (1e-5 * direction, -1e-5 * direction)
        ]
        if abs(losses[0] - losses[1]) / 2e-5 > 1e-7:
            steep.add(id(x))
    assert steep == {id(x) for x in after[0]}


def test_all_frozen_is_refused():
    frozen = eqd.Frozen(linear(6, 3))
    with pytest.raises(ValueError, match="`model` must have parameters to fit"):
        eqd.fit(start(), frozen)


def mlp():
    return eqx.nn.Sequential([linear(6, 4), eqx.nn.Lambda(jnp.tanh), linear(4, 3)])


@pytest.mark.parametrize("kind", ["Sequential", "MLP", "where"])
def test_last_layer_computes_the_same(kind):
    network, x, where = mlp(), jnp.asarray(IMAGES[0]), None
    if kind == "MLP":
        network = eqx.nn.MLP(6, 3, 4, 1, key=jr.key(0))
    elif kind == "where":
        network, x, where = CNN(key=jr.key(0)), jnp.ones((8, 8)), lambda n: n.linear
    model = eqd.last_layer(network, *([] if where is None else [where]))
    np.testing.assert_allclose(model(x), network(x), rtol=1e-6)
    assert model.head is (network.layers[-1] if where is None else where(network))
    fitted = jax.tree.leaves(eqx.filter(model, eqd.parameters(model)))
    assert {id(x) for x in fitted} == {id(x) for x in jax.tree.leaves(model.head)}


def test_last_layer_is_linear_in_the_features():
    network = mlp()
    got = eqd.fit(squared(), eqd.last_layer(network)).model
    features = np.asarray(jax.vmap(network[:2])(IMAGES))
    of_features = eqd.DistilledSet(features, LABELS, l2=0.1, loss=eqd.SquaredError())
    model = eqd.LogisticRegression(4, 3, use_intercept=True)
    want = eqd.fit(of_features, model).model
    np.testing.assert_allclose(got.head.weight, want.head.weight, atol=1e-5)
    np.testing.assert_allclose(got.head.bias, want.head.bias, atol=1e-5)
    assert eqx.tree_equal(got.features.module[:2], network[:2])


def squared():
    """A start for `RidgeSolver`, which is soon compiled."""
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
    below: Trained | eqd.Frozen
    layer: eqx.nn.Linear

    def __call__(self, image):
        return self.layer(self.below(image))


def test_state_is_refused_outside_of_frozen():
    match = r"must not hold state.*at `below\.network\..*GroupNorm.*inside a `Frozen`"
    bad = OnTop(Trained(), linear(6, 3))
    for call in (
        lambda: eqd.fit(start(), bad),
        lambda: eqd.evaluate(start(), bad, REAL),
        lambda: eqd.distill(start(), bad, REAL),
    ):
        with pytest.raises(TypeError, match=match):
            call()


@pytest.mark.parametrize("kind", ["network", "features"])
def test_state_is_accepted_inside_frozen(kind):
    if kind == "network":
        model, inner = OnTop(eqd.Frozen(Trained()), linear(6, 3)), OneStep()
    else:
        model = eqd.LinearClassifier(Trained(), linear(6, 3))
        inner = eqd.RidgeSolver()
    args = {"inner": inner, "optimiser": ADAM, "steps": 4}
    history = eqd.distill(squared(), model, REAL, **args).history
    assert history.loss[-1] < history.loss[0] - 1e-3
    fitted = eqd.fit(squared(), model, inner).model
    frozen = fitted.below if kind == "network" else fitted.features
    before = model.below if kind == "network" else model.features
    assert eqx.tree_equal(frozen, before)


@pytest.mark.parametrize("kind", ["network", "features"])
def test_dropout_is_off(kind):
    dropout = eqx.nn.Dropout(0.9)
    network = eqx.nn.Sequential(
        [linear(6, 4), eqx.nn.Lambda(jnp.tanh), dropout, linear(4, 3)]
    )
    model = network if kind == "network" else eqd.last_layer(network)
    evaluation = eqd.evaluate(squared(), model, REAL)
    # Measured anew, without.
    fitted = evaluation.fitted.model
    first = (fitted if kind == "network" else fitted.features.module).layers[0]
    last = fitted.layers[3] if kind == "network" else fitted.head
    hidden = np.tanh(REAL.images @ first.weight.T + first.bias)
    log_p = jax.nn.log_softmax((hidden @ last.weight.T + last.bias) / 0.2)
    loss = -np.mean(log_p[np.arange(20), REAL.labels])
    np.testing.assert_allclose(evaluation.loss, loss, rtol=1e-4)
    if kind == "features":  # The real ones are computed without, too.
        history = eqd.distill(squared(), model, REAL, steps=1).history
        np.testing.assert_allclose(history.loss[0], loss, rtol=1e-4)


class Projected(eqx.Module):
    """Draws its random projection anew from its key with each call."""

    key: jax.Array
    weight: jax.Array

    def __call__(self, image):
        return self.weight @ (jr.normal(self.key, (4, 6)) @ image)


def test_key_inside_a_classifier():
    model = Projected(jr.key(0), jnp.zeros((3, 4)))
    fitted = eqd.fit(start(), model, OneStep()).model
    assert fitted.key == model.key
    projection = np.asarray(jr.normal(model.key, (4, 6)))
    # The first step of gradient descent, from zero.
    residuals = np.eye(3)[LABELS] - 1 / 3
    want = 10 / 5 * residuals.T @ IMAGES @ projection.T
    np.testing.assert_allclose(fitted.weight, want, rtol=1e-4, atol=1e-5)
    args = {"inner": OneStep(), "optimiser": ADAM, "steps": 4}
    history = eqd.distill(start(), model, REAL, **args).history
    assert history.loss[-1] < history.loss[0] - 1e-3
    loss = eqd.evaluate(start(), model, REAL, OneStep()).loss
    np.testing.assert_allclose(history.loss[0], loss, rtol=1e-5)


class Features(eqx.Module):
    key: jax.Array

    def __call__(self, image):
        return jnp.tanh(jr.normal(self.key, (4, 6)) @ image)


@pytest.mark.slow
def test_key_inside_features():
    head = linear(4, 3)
    model, other = (
        eqd.LinearClassifier(Features(jr.key(seed)), head) for seed in (0, 1)
    )
    data = eqd.FullBatch(REAL, model)
    loss = eqd.evaluate(squared(), model, REAL).loss
    got, _ = eqx.filter_jit(eqd.outer_loss)(squared(), model, data)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    with pytest.raises(ValueError, match="the features that this `FullBatch` was made"):
        eqd.distill(squared(), other, data, steps=1)


@pytest.mark.slow
def test_features_in_batches():
    """The features of the real images are computed once, and not in a step."""
    model = eqd.LinearClassifier(Features(jr.key(0)), linear(4, 3))
    for make in (eqd.Batches, eqd.BalancedBatches):
        once, anew = make(REAL, 2, model), make(REAL, 2)
        assert once.dataset.shape == (4,)
        loss = lambda data: data.loss(model, jnp.array(3), key=jr.key(0))
        got, wanted = loss(once), loss(anew)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    other = eqd.LinearClassifier(Features(jr.key(1)), linear(4, 3))
    with pytest.raises(ValueError, match="that this `BalancedBatches` was made with"):
        eqd.distill(squared(), other, once, key=jr.key(0), steps=1)
    with pytest.raises(ValueError, match=r"`augmentation` must be None.*got a Flip"):
        eqd.Batches(REAL, 2, model, augmentation=eqd.Flip())
    bad = eqd.LinearClassifier(lambda x: x / 0, linear(6, 3))
    with pytest.raises(ValueError, match=r"`model` must have features.*finite"):
        eqd.FullBatch(REAL, bad)
