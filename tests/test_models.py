"""Where the models of the outer steps come from."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import ADAM, check_gradient, hypergradient, subset


KEY = jr.key(0)
ConvNet = functools.partial(
    eqd.nn.ConvNet, (8, 8), 10, widths=(4,), norm=None, activation=jax.nn.softplus
)


def sequential(*, key, width=12, between=()):
    """A user's own network, with a narrower last layer than `ConvNet`."""
    first, last = jr.split(key)
    return eqx.nn.Sequential(
        [
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(64, width, key=first),
            eqx.nn.Lambda(jnp.tanh),
            *between,
            eqx.nn.Linear(width, 10, key=last),
        ]
    )


class HeadFirst(eqx.Module):
    """A user's own class, whose last field is not its last layer."""

    head: eqx.nn.Linear
    body: eqx.nn.Linear

    def __init__(self, *, key):
        self.head = eqx.nn.Linear(6, 10, key=key)
        self.body = eqx.nn.Linear(64, 6, key=key)

    def __call__(self, image):
        return self.head(jnp.tanh(self.body(jnp.ravel(image))))


def pool(*makes, **settings):
    return eqd.Pool(*makes or (ConvNet,), **{"size": 2, "max_age": 3} | settings)


@pytest.fixture
def train(digits):
    return subset(digits[0], 200)


@pytest.fixture
def start(train):
    real = eqd.DistilledSet.from_real(train, 10, l2=1e-2, key=KEY)
    return real.with_targets(10)


def features_of(model, images):
    return jax.vmap(model.features)(images)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("loss", "inner"),
    [
        (eqd.SquaredError(), eqd.AutoSolver()),
        pytest.param(eqd.CrossEntropy(), eqd.AutoSolver(), marks=pytest.mark.slow),
    ],
)
def test_pool_agrees_with_central_differences(train, start, loss, inner):
    start = eqx.tree_at(lambda s: s.loss, start, loss)
    start = jax.tree.map(lambda x: x.astype(float), start)
    objective = eqd.Bilevel(pool(sequential, ConvNet), inner)
    check_gradient(start, objective, train)


@pytest.mark.slow
def test_the_last_layer_is_fitted_by_ridge_regression_on_scaled_features(start):
    # The features of the narrow network are padded with zeros.
    source = pool(sequential, ConvNet)
    state = source.init(start, key=KEY)
    keys = jr.split(KEY, 8)
    fitted = [eqd.fit(start, source.draw(state, key=key)).model for key in keys]
    widths = set()
    for model in fitted:
        features = np.asarray(features_of(model, start.images), np.float64)
        assert features.shape == (10, 64)
        widths.add(int((features != 0).any(axis=0).sum()))
        scaled = features * np.sqrt(100 / np.sum(features**2))
        gram = scaled @ scaled.T + 10 * 1e-2 * np.eye(10)
        wanted = scaled @ scaled.T @ np.linalg.solve(gram, np.asarray(start.labels))
        outputs = features @ np.asarray(model.head.weight, np.float64).T
        np.testing.assert_allclose(outputs, wanted, atol=1e-3)
    assert widths == {12, 64}


@pytest.mark.parametrize(("weights", "share"), [(None, 0.5), ([6.0, 2], 0.75)])
def test_networks_keep_the_initialisation_of_their_constructor(start, weights, share):
    networks = sequential(key=jr.key(1)), ConvNet(key=jr.key(2))
    makes = (lambda *, key, own=own: own for own in networks)
    source = pool(*makes, weights=weights)
    state = source.init(start, key=KEY)
    wanted = [
        eqd.linear.last_layer(network)(start.images[0]) - network.layers[-1].bias
        for network in networks
    ]
    draw = lambda key: source.draw(state, key=key)(start.images[0])
    found = jax.vmap(draw)(jr.split(KEY, 400))
    which = [[np.allclose(x, y, rtol=1e-5, atol=1e-6) for y in wanted] for x in found]
    np.testing.assert_array_equal(np.sum(which, axis=1), 1)
    np.testing.assert_allclose(np.mean(which, axis=0), [share, 1 - share], atol=0.06)


@pytest.mark.slow
def test_networks_are_trained_and_restarted(start):
    source = pool(sequential, functools.partial(sequential, width=7))
    update = eqx.filter_jit(source.update)
    state = source.init(start, key=KEY)
    np.testing.assert_array_equal(state.ages[0], [0, 1])
    seen = set()
    for i in range(20):
        new = update(state, start, key=jr.key(i))
        changed = [
            (kind, int(state.ages[kind][row]), int(new.ages[kind][row]))
            for kind in range(2)
            for row in range(2)
            if (state.networks[kind][0][row] != new.networks[kind][0][row]).any()
        ]
        # One network is trained; when it is three steps old, it restarts.
        [(kind, old, age)] = changed
        assert age == (old + 1) % 3
        if age == 0:
            old_rows, rows = (s.networks[kind][0] for s in (state, new))
            row = np.flatnonzero((old_rows != rows).any(axis=1))
            assert not np.isclose(old_rows[row], rows[row]).any()
        seen |= {(kind, age)}
        state = new
    assert seen == {(kind, age) for kind in range(2) for age in range(3)}


@pytest.mark.slow
def test_dropout_is_on_in_training_and_off_in_features(start):
    def source(rate):
        network = sequential(key=KEY, between=[eqx.nn.Dropout(rate)])
        return pool(lambda *, key: network, size=1, optimiser=optax.sgd(0.1))

    draws, trained = [], []
    for rate, seed in ((0.0, 1), (0.5, 1), (0.5, 2)):
        own = source(rate)
        state = own.init(start, key=KEY)
        draws.append(features_of(own.draw(state, key=jr.key(seed)), start.images))
        new = own.update(state, start, key=jr.key(seed))
        trained.append(new.networks[0][0])
    for features in draws[1:]:
        np.testing.assert_array_equal(features, draws[0])
    for i, j in ((0, 1), (1, 2)):
        assert not np.allclose(trained[i], trained[j], atol=1e-4)


def batch_norm(*, key):
    layer = eqx.nn.BatchNorm(12, "batch", mode="batch")
    return eqx.nn.make_with_state(sequential)(key=key, between=[layer])[0]


def no_last_layer(*, key):
    return eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), eqx.nn.LayerNorm(64)])


def test_what_cannot_work_is_refused_by_name(train, start):
    with pytest.raises(TypeError, match="running statistics of batch normalisation"):
        eqd.distill(start, pool(batch_norm), train)
    with pytest.raises(TypeError, match=r"`network` must end with an .*Linear"):
        eqd.distill(start, pool(no_last_layer), train)
    with pytest.raises(TypeError, match=r"`where` must select an .*Linear"):
        eqd.distill(start, pool(HeadFirst, where=lambda network: network.legs), train)
    five = functools.partial(eqd.nn.ConvNet, (8, 8), 5, widths=(4,))
    with pytest.raises(ValueError, match=r"same number of outputs; got \[5, 10\]"):
        eqd.distill(start, pool(ConvNet, five), train)


def test_where_picks_the_last_layer(start):
    source = pool(HeadFirst, where=lambda network: network.head)
    model = source.draw(source.init(start, key=KEY), key=KEY)
    assert features_of(model, start.images).shape == (10, 6)
    assert model.head.out_features == 10


@pytest.mark.slow
def test_a_fresh_model_in_each_step(digits):
    train = subset(digits[0], 30)
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=KEY)
    training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 3)
    objective = eqd.Bilevel(eqd.Fresh(sequential), training)
    losses = [
        float(hypergradient(start, objective, train, step=i)[0]) for i in (0, 1, 1)
    ]
    assert losses[1] == losses[2]
    assert abs(losses[0] - losses[1]) > 1e-3
    drawn = eqd.Fresh(sequential).draw(None, key=jr.key(4))
    assert eqx.tree_equal(drawn, sequential(key=jr.key(4)))
    args = {"optimiser": ADAM, "steps": 2, "key": KEY}
    result = eqd.distill(start, objective, train, **args)
    np.testing.assert_allclose(result.history.loss[0], losses[0], rtol=1e-4)


def test_random_features_are_those_of_several_networks(start):
    network = sequential(key=KEY)
    known = eqd.RandomFeatures(lambda *, key: network, num_networks=3)
    model = known.draw(known.init(start, key=KEY), key=KEY)
    wanted = features_of(eqd.linear.last_layer(network), start.images)
    np.testing.assert_allclose(
        features_of(model, start.images), np.tile(wanted, 3), rtol=1e-5, atol=1e-6
    )
    random = eqd.RandomFeatures(sequential, num_networks=3)
    blocks = np.split(features_of(random.draw(None, key=KEY), start.images[:1])[0], 3)
    assert not np.isclose(blocks[0], blocks[1]).any()
    assert not np.isclose(blocks[1], blocks[2]).any()


@pytest.mark.slow
def test_real_images_need_no_backward_pass(train, start):
    def count(n):
        problem = eqd.Problem(start, eqd.Bilevel(pool()), optimiser=ADAM)
        state = eqx.filter_eval_shape(problem.init, key=KEY)
        data = eqd.Batches(subset(train, n), n)
        step = jax.jit(lambda state: problem.step(state, data)).lower(state)
        costs = step.compile().cost_analysis()
        assert costs is not None
        return costs["flops"]

    # A forward pass of the convolution, and less than a backward pass for the rest.
    per_image = (count(200) - count(100)) / 100
    forward = 2 * 4 * 9 * 64
    assert forward <= per_image < 2.5 * forward


@pytest.mark.slow
def test_images_train_fresh_networks(digits):
    train, test = digits
    network = functools.partial(eqd.nn.ConvNet, (8, 8), 10, widths=(8, 16), norm=None)
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=KEY).with_targets(10)
    makes = network, functools.partial(sequential, width=32)
    problem = start, eqd.Pool(*makes), eqd.Batches(train, 128)
    result = eqd.distill(*problem, learn=lambda s: s, steps=400, key=KEY)
    for make in makes:
        recipe = eqd.recipes.zero_start(make)
        before, after = (
            eqd.evaluate(x, recipe, test, num_models=3).accuracy
            for x in (start, result.distilled)
        )
        assert after > before + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("inner", [eqd.AutoSolver(), eqd.linear.LinearisedSolver()])
def test_a_dead_network(train, start, inner):
    """All of its features are zero: that is no failure, and nothing is learned."""
    make = functools.partial(ConvNet, activation=lambda x: 0 * x)
    objective = eqd.Bilevel(pool(make), inner)
    loss, gradient = hypergradient(start, objective, train)
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)
    for x in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(x, 0)
    # The next network may be alive, so the run continues.
    run = {"optimiser": ADAM, "steps": 2, "key": KEY}
    assert len(eqd.distill(start, objective, train, **run).history.loss) == 2
