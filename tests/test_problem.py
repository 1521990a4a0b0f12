"""The step of the outer loop, a pure function of its state, and the loop around it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import hypergradient, OneStep, subset


STEPS = 8
ADAM = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))
LBFGS = optax.lbfgs(memory_size=3)
KEY = jr.key(5)
QUICK = {"inner": OneStep(), "optimiser": ADAM}


@pytest.fixture(scope="module")
def problem(digits):
    train = subset(digits[0], 200)
    start = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.02, key=jr.key(0))
    return start, eqd.LogisticRegression(64, 10), train


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jr.key_data(x), jr.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["Adam, schedule, batches", "L-BFGS, line search"])
def test_a_run_goes_on_as_if_it_had_not_stopped(problem, name):
    start, model, train = problem
    if name.startswith("Adam"):
        args = {"optimiser": ADAM, "learn": (True, False)}
        train = eqd.Batches(train, 60)
    else:
        args = {"inner": OneStep(), "optimiser": LBFGS}
    run = lambda **kwargs: eqd.distill(start, model, train, **args, **kwargs)
    whole = run(steps=STEPS, key=KEY)
    half = run(steps=STEPS // 2, key=KEY)
    rest = run(steps=STEPS, state=half.state)
    assert_same_bits(rest.state, whole.state)
    losses = np.concatenate([half.history.loss, rest.history.loss])
    np.testing.assert_array_equal(losses, whole.history.loss)
    # The state that was handed over is still there.
    assert_same_bits(run(steps=STEPS, state=half.state).state, whole.state)


def test_step_is_that_of_distill(problem):
    start, model, train = problem
    own = eqd.Problem(start, model, train, **QUICK)
    state = own.init()
    step = eqx.filter_jit(own.step)
    losses = []
    for _ in range(3):
        state, metrics = step(state)
        losses.append(float(metrics.loss))
    result = eqd.distill(start, model, train, **QUICK, steps=3)
    np.testing.assert_allclose(losses, result.history.loss, rtol=1e-5)
    np.testing.assert_allclose(
        own.distilled(state).images, result.distilled.images, atol=1e-3
    )
    assert int(state.step) == 3
    # What the state holds is arrays, and its structure does not change.
    assert all(map(eqx.is_array, jax.tree.leaves(state)))
    assert jax.tree.structure(state) == jax.tree.structure(own.init())


@pytest.mark.slow
def test_step_composes_with_vmap(problem):
    start, model, train = problem
    own = eqd.Problem(start, model, train, **QUICK)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), own.init())
    moved = eqx.tree_at(
        lambda s: s.learned[0].images, states, replace_fn=lambda x: x.at[1].mul(2.0)
    )
    _, metrics = jax.jit(jax.vmap(own.step))(moved)
    twice = eqx.tree_at(lambda s: s.images, start, 2 * start.images)
    for loss, at in zip(metrics.loss, (start, twice), strict=True):
        wanted, _ = hypergradient(at, model, train, OneStep())
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_a_step_from_an_ended_state_changes_nothing(problem):
    start, model, train = problem
    args = {**QUICK, "tolerance": 100.0}
    result = eqd.distill(start, model, train, **args, steps=STEPS)
    assert result.converged
    assert len(result.history) == 1
    own = eqd.Problem(start, model, train, **args)
    after, _ = eqx.filter_jit(own.step)(result.state)
    assert_same_bits(after, result.state)
    with pytest.raises(
        ValueError, match=r"`state` must be of a run that goes on.*CONV"
    ):
        eqd.distill(start, model, train, **args, state=result.state)


def test_the_arrays_of_the_user_are_left_alone(problem):
    start, model, train = problem
    before = np.array(start.images)
    result = eqd.distill(start, model, train, **QUICK, steps=STEPS)
    np.testing.assert_array_equal(start.images, before)  # They are not deleted.
    result.distilled.images.block_until_ready()
    again = eqd.distill(start, model, train, **QUICK, steps=STEPS)
    np.testing.assert_array_equal(again.distilled.images, result.distilled.images)


@pytest.mark.parametrize("make", [lambda: ADAM, lambda: optax.scale(-0.1)])
def test_an_optimiser_is_compiled_once(problem, make, monkeypatch):
    # `optax.scale` takes no extra arguments, for which Optax wraps it anew each time.
    optimiser = make()
    args = {"inner": OneStep(), "optimiser": optimiser, "steps": 2}
    run = lambda: eqd.distill(*problem, **args)
    run()
    with jax.log_compiles(), pytest.MonkeyPatch.context():
        records = []
        import logging

        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        logger = logging.getLogger("jax")
        logger.addHandler(handler)
        run()
        logger.removeHandler(handler)
    assert not [text for text in records if "Compiling" in text and "step" in text]


def test_what_was_learned_is_said(problem):
    start, model, train = problem
    default = eqd.distill(start, model, train, **QUICK, steps=1)
    assert default.learned == ("images",)
    everything = eqd.distill(
        start, model, train, **QUICK, steps=1, learn=(True, False)
    )
    assert everything.learned == ("images", "log_l2")


def test_a_state_of_another_problem_is_refused(problem):
    start, model, train = problem
    state = eqd.distill(start, model, train, **QUICK, steps=2).state
    match = r"`state` must be of the same problem: .*`\.learned\[0\]\.images`.*5, 8, 8"
    fewer = eqd.DistilledSet(start.images[:5], start.labels[:5], l2=0.1)
    with pytest.raises(ValueError, match=match):
        eqd.distill(fewer, model, train, **QUICK, state=state)
    with pytest.raises(
        ValueError, match="`steps` must be above 2, the step of `state`"
    ):
        eqd.distill(start, model, train, **QUICK, steps=2, state=state)
    with pytest.raises(ValueError, match="`key` must not be given with `state`"):
        eqd.distill(start, model, train, **QUICK, steps=4, state=state, key=KEY)


class Doubled(eqx.Module):
    """A parameterisation: images are stored at half their size."""

    small: jax.Array
    labels: jax.Array

    def decode(self):
        images = jnp.repeat(jnp.repeat(self.small, 2, axis=1), 2, axis=2)
        return eqd.DistilledSet(images, self.labels, l2=0.05)


def test_what_is_learned_need_not_be_the_images(problem):
    start, model, train = problem
    small = Doubled(start.images[:, ::2, ::2], start.labels)
    with pytest.raises(ValueError, match=r"`learn` must say what is learned.*Doubled"):
        eqd.distill(small, model, train)
    result = eqd.distill(
        small, model, train, **QUICK, learn=(True, False), steps=STEPS
    )
    assert result.learned == ("small",)
    assert result.history.loss[-1] < 0.95 * result.history.loss[0]
    assert result.start.small.shape == (10, 4, 4)
    images = result.distilled.images
    np.testing.assert_array_equal(images[:, ::2, ::2], result.start.small)
    loss, _ = hypergradient(result.start, model, train, OneStep())
    wanted, _ = hypergradient(result.distilled, model, train, OneStep())
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_the_one_path(problem):
    """Through `FullBatch`, laid out once, the public outer loss is what `distill`
    differentiates."""
    start, model, train = problem
    data = eqd.FullBatch(train, model)
    (loss, gradient), (plain, plain_gradient) = (
        hypergradient(start, model, x, OneStep()) for x in (data, train)
    )
    np.testing.assert_allclose(loss, plain, rtol=1e-5)
    np.testing.assert_allclose(
        gradient.images, plain_gradient.images, rtol=1e-3, atol=1e-5
    )


@pytest.mark.usefixtures("x64")
def test_forward_mode(digits):
    train = subset(digits[0], 200)
    start = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.02, key=jr.key(0))
    model = eqd.LogisticRegression(64, 10)
    data = eqd.FullBatch(train, model)
    direction = jr.normal(KEY, start.images.shape)

    def along(t):
        images = start.images + t * direction
        at = eqx.tree_at(lambda s: s.images, start, images)
        return eqd.outer_loss(at, model, data)[0]

    both = jax.jit(lambda t: jax.jvp(along, (t,), (1.0,)))
    (high, _), (low, _), (_, slope) = both(1e-4), both(-1e-4), both(0.0)
    np.testing.assert_allclose(slope, (high - low) / 2e-4, rtol=1e-5)


def test_data_of_other_features_are_refused(problem):
    start, model, train = problem
    data = eqd.FullBatch(train, model)
    network = eqx.nn.Sequential(
        [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(64, 10, key=KEY)]
    )
    with pytest.raises(ValueError, match="`model` must have the features that"):
        eqd.outer_loss(start, network, data, OneStep())


@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
def test_batches_see_each_image_once_an_epoch(n):
    labels = np.arange(n)
    data = eqd.Batches(eqd.Dataset(np.ones((n, 1, 1), np.float32), labels, n), 1)

    # The loss of this model on the image of label k is k.
    def loss(step, key):
        logits = -jnp.arange(n, dtype=jnp.float32)
        constant = lambda image: logits
        total = data.loss(constant, step, key=key)
        return jnp.round(total - jax.nn.logsumexp(logits)).astype(int)

    losses = jax.jit(jax.vmap(loss, (0, None)))(jnp.arange(2 * n), KEY)
    first, second = np.split(np.asarray(losses), 2)
    np.testing.assert_array_equal(np.sort(first), labels)
    np.testing.assert_array_equal(np.sort(second), labels)
    if n >= 7:
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, labels)
