"""A pool of networks whose last layer is fitted."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd
from eqdistill import nn

from .conftest import ADAM, hypergradient, subset


SMOOTH = functools.partial(nn.ConvNet, widths=(4,), activation=jax.nn.softplus)
PLAIN = functools.partial(SMOOTH, norm=None)
KEY = jr.key(0)


def pool(*kinds, **settings):
    kinds = kinds or (PLAIN,)
    return eqd.Pool(*kinds, num_classes=10, **{"size": 2, "max_age": 3} | settings)


def targets(labels):
    return jax.nn.one_hot(labels, 10) - 0.1


def start_of(train, l2=1e-2, loss=None):
    loss = eqd.SquaredError() if loss is None else loss
    real = eqd.DistilledSet.from_real(train, 10, l2=l2, key=jr.key(0))
    labels = targets(real.labels).astype(real.images.dtype)
    return eqd.DistilledSet(real.images, labels, l2=l2, loss=loss)


@pytest.fixture
def train(digits):
    return subset(digits[0], 200)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("loss", "inner"),
    [
        (eqd.SquaredError, eqd.RelativeRidge()),
        pytest.param(
            eqd.CrossEntropy,
            eqd.RelativeRidge(eqd.SpanSolver()),
            marks=pytest.mark.slow,
        ),
        pytest.param(eqd.SquaredError, eqd.LinearisedSolver(), marks=pytest.mark.slow),
    ],
)
def test_hypergradient_agrees_with_central_differences(train, loss, inner):
    solver = pool(PLAIN, SMOOTH, inner=inner)
    start = start_of(train, loss=loss())
    state = solver.init(start, None, key=KEY)
    run = lambda at: hypergradient(at, None, train, solver, state=state, key=KEY)
    _, gradient = run(start)
    rng = np.random.default_rng(0)
    move = jax.tree.map(lambda x: rng.normal(size=x.shape), gradient)
    at = lambda t: run(eqx.apply_updates(start, jax.tree.map(lambda x: t * x, move)))[0]
    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(move), strict=True)
    np.testing.assert_allclose(slope, sum(np.vdot(x, y) for x, y in pairs), rtol=1e-6)


def test_fit_is_that_of_the_inner_solver_on_scaled_features(train):
    start = start_of(train)
    fitted = eqd.fit(start, None, pool(), key=KEY).model
    features = np.asarray(jax.vmap(fitted.features)(start.images), np.float64)
    scaled = features * np.sqrt(100 / np.sum(features**2))
    gram = scaled @ scaled.T + 10 * 1e-2 * np.eye(10)
    wanted = scaled @ scaled.T @ np.linalg.solve(gram, np.asarray(start.labels))
    outputs = features @ np.asarray(fitted.head.weight, np.float64).T
    np.testing.assert_allclose(outputs, wanted, atol=1e-3)


@pytest.mark.slow
def test_networks_are_trained_and_started_anew(train):
    start, solver = start_of(train), pool(PLAIN, SMOOTH)
    call = eqx.filter_jit(solver.__call__)
    state = solver.init(start, None, key=KEY)
    np.testing.assert_array_equal(state.ages[0], [0, 1])
    assert state.weights[0].shape[1] == 40 + 650
    seen = set()
    for i in range(12):
        _, new = call(start, None, state, key=jr.key(i))
        changed = [
            (kind, int(state.ages[kind][row]), int(new.ages[kind][row]))
            for kind, (a, b) in enumerate(zip(state.weights, new.weights, strict=True))
            for row in np.flatnonzero((a != b).any(axis=1))
        ]
        # One network is trained, from anew if it is old.
        [(kind, old, age)] = [entry for entry in changed if entry[2] > 0]
        assert age == old % 3 + 1
        # One of the other kind was old, and is new.
        assert all(old == 3 for _, old, age in changed if age == 0)
        seen |= {(kind, age)}
        state = new
    assert {0, 1} == {kind for kind, _ in seen}
    assert {1, 2, 3} == {age for _, age in seen}


@pytest.mark.slow
def test_weights_are_drawn_as_by_pytorch(train):
    start = start_of(train)
    solver = pool(SMOOTH, size=50)
    state = solver.init(start, None, key=KEY)
    fitted = eqd.fit(start, None, solver, key=KEY).model
    layers = fitted.features.module.options[0].layers
    convolution = layers[1]
    assert jnp.abs(convolution.weight).max() <= 1 / 3
    assert jnp.abs(convolution.bias).max() <= 1 / 3
    np.testing.assert_array_equal(layers[2].weight, 1)
    np.testing.assert_array_equal(layers[2].bias, 0)
    filters = state.weights[0][:, :36]
    np.testing.assert_allclose(filters.std(), (1 / 3) / np.sqrt(3), rtol=0.05)


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(train):
    start = start_of(train)
    args = {"inner": pool(), "optimiser": ADAM, "learn": (True, False)}
    data = eqd.Batches(train, 50)
    run = lambda **more: eqd.distill(start, None, data, **args, **more)
    whole, half = run(steps=8, key=KEY), run(steps=4, key=KEY)
    rest = run(steps=8, state=half.state)
    for x, y in zip(
        jax.tree.leaves(whole.start), jax.tree.leaves(rest.start), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    assert whole.learned == ("images", "labels", "log_l2", "loss.log_temperature")


@pytest.mark.slow
def test_no_gradient_of_the_real_images_is_computed(train):
    def count(n):
        data = eqd.Batches(subset(train, n), n)
        problem = eqd.Problem(
            start_of(train), None, data, pool(), optimiser=ADAM, learn=(True, False)
        )
        state = eqx.filter_eval_shape(problem.init, key=KEY)
        step = jax.jit(lambda state: problem.step(state)).lower(state).compile()
        costs = step.cost_analysis()
        assert costs is not None
        return costs["flops"]

    # A forward pass of the convolution, and less than a backward pass for all else.
    per_image = (count(200) - count(100)) / 100
    forward = 2 * 4 * 9 * 64
    assert forward <= per_image < 2.5 * forward


@pytest.mark.slow
def test_images_train_fresh_networks(digits):
    train, test = digits
    network = functools.partial(nn.ConvNet, widths=(8, 16), norm=None)
    start = start_of(train, l2=1e-3)
    result = eqd.distill(
        start,
        None,
        eqd.Batches(train, 128),
        inner=eqd.Pool(network, num_classes=10),
        optimiser=optax.adam(0.02),
        steps=300,
        key=KEY,
    )
    recipe = eqd.recipes.zero_start(network)
    evaluate = lambda x: eqd.recipes.evaluate(x, recipe, test, num_networks=3, key=KEY)
    assert evaluate(result.distilled).mean > evaluate(start).mean + 0.1


def test_bad_input(train):
    start = start_of(train)
    with pytest.raises(ValueError, match="`networks` must be at least one kind"):
        eqd.Pool(num_classes=10)
    for name in ("size", "max_age"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got 0"):
            pool(**{name: 0})
    with pytest.raises(ValueError, match="`key` must be given with a `Pool`"):
        eqd.fit(start, None, pool())
    wider = functools.partial(PLAIN, widths=(5,))
    with pytest.raises(ValueError, match=r"equally many features; got \[64, 80\]"):
        eqd.fit(start, None, pool(PLAIN, wider), key=KEY)
    model = eqd.LogisticRegression(64, 10)
    with pytest.raises(TypeError, match="`model` must be None with `Pool`"):
        eqd.distill(start, model, train, inner=pool(), key=KEY)
    with pytest.raises(TypeError, match="`model` must be given with `AutoSolver`"):
        eqd.fit(start, None)
    with pytest.raises(TypeError, match=r"`SquaredError`.*`RidgeSolver` minimises"):
        eqd.fit(start_of(train, loss=eqd.CrossEntropy()), None, pool(), key=KEY)
    few = eqd.Pool(PLAIN, num_classes=9, size=2)
    with pytest.raises(
        ValueError, match=r"each of the 9 classes of `Pool`.*\(10, 10\)"
    ):
        eqd.fit(start, None, few, key=KEY)
    hard = eqd.DistilledSet.from_real(train, 9, l2=0.1, key=KEY)
    with pytest.raises(
        ValueError, match="`inner` must have a logit for each of the 10"
    ):
        eqd.outer_loss(hard, None, train, few, key=KEY)
    five = lambda shape, _, *, key: PLAIN(shape, 5, key=key)
    with pytest.raises(ValueError, match=r"networks with 10 logits.*; got 5"):
        eqd.fit(start, None, pool(five), key=KEY)
    larger = pool(size=3).init(start, None, key=KEY)
    with pytest.raises(ValueError, match=r"`state` must be a state of `inner`.*\(3,"):
        eqd.outer_loss(start, None, train, pool(), larger, key=KEY)


def with_layer(make_layer):
    def make(*shape, key):
        network = PLAIN(*shape, key=key)
        layers = eqx.nn.Sequential([make_layer(), *network.layers])
        return nn.Network(layers, network.architecture, network.settings)

    return make


def batch_norm():
    return eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", mode="batch")[0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (with_layer(eqx.nn.Dropout), "got a Dropout at `layers.layers.0`"),
        (with_layer(batch_norm), "got a .* at `layers.layers.0"),
        (with_layer(eqx.nn.PReLU), "array of another layer at `layers.layers.0"),
        (lambda *_, key: eqx.nn.Identity(), "of `eqdistill.nn`; got a Identity"),
    ],
    ids=["dropout", "batch norm", "other layer", "other type"],
)
def test_networks_that_no_pool_can_train(train, make, match):
    with pytest.raises(TypeError, match=match):
        eqd.fit(start_of(train), None, pool(make), key=KEY)


@pytest.mark.slow
def test_a_dead_network(train):
    """All of its features are zero: no accident, and nothing to be learned."""
    dead = lambda x: 0 * x
    kind = functools.partial(nn.ConvNet, widths=(4,), norm=None, activation=dead)
    start = start_of(train)
    for inner in (eqd.RelativeRidge(), eqd.LinearisedSolver()):
        solver = pool(kind, inner=inner)
        assert eqd.fit(start, None, solver, key=KEY).converged
        loss, gradient = hypergradient(start, None, train, solver, key=KEY)
        np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)
        for x in jax.tree.leaves(gradient):
            np.testing.assert_array_equal(x, 0)
        # The next network need not be dead.
        run = {"inner": solver, "optimiser": ADAM, "steps": 2, "key": KEY}
        result = eqd.distill(start, None, train, **run)
        assert not result.converged
        assert len(result.history.loss) == 2


@pytest.mark.slow
def test_all_layers_of_a_linearised_network_move(train):
    solver = pool(PLAIN, inner=eqd.LinearisedSolver())
    tangent = eqd.fit(start_of(train), None, solver, key=KEY).model.tangent
    shapes = {x.shape for x in jax.tree.leaves(tangent)}
    assert shapes == {(4, 1, 3, 3), (4, 1, 1), (10, 64)}
