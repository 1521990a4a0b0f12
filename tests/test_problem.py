"""The step of the outer loop, a pure function of a state and of data."""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import ADAM, assert_same_bits, OneStep


STEPS = 8
KEY = jr.key(5)
SCHEDULE = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))


def problem_of(logistic, optimiser=ADAM, **kwargs):
    return eqd.Problem(*logistic[:2], optimiser=optimiser, **kwargs)


def test_distill_is_a_loop_around_the_step(logistic):
    start, objective, train = logistic
    problem = problem_of(logistic)
    data = objective.layout(train)
    state = problem.init(key=KEY)
    structure = jax.tree.structure(state)
    step = eqx.filter_jit(problem.step)
    losses = []
    for _ in range(3):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    names = {"loss", "gradient_norm", "inner_residual"}
    assert set(metrics) == names  # pyright: ignore[reportPossiblyUnboundVariable]
    result = eqd.distill(start, objective, train, optimiser=ADAM, steps=3, key=KEY)
    np.testing.assert_allclose(losses, result.history.loss, rtol=1e-5)
    images = problem.distilled(state).images
    np.testing.assert_allclose(images, result.distilled.images, atol=1e-3)
    assert int(state.step) == 3
    assert all(map(eqx.is_array, jax.tree.leaves(state)))
    assert jax.tree.structure(state) == structure


@pytest.mark.parametrize("case", ["schedule and batches", "line search"])
def test_a_run_continues_as_if_it_had_not_stopped(logistic, case):
    start, objective, train = logistic
    args = {"optimiser": optax.lbfgs(memory_size=3)}
    if case == "schedule and batches":
        args = {"optimiser": SCHEDULE, "learn": lambda s: s}
        train = eqd.Batches(train, 60)
    run = lambda **kwargs: eqd.distill(start, objective, train, **args, **kwargs)
    whole = run(steps=STEPS, key=KEY)
    half = run(steps=STEPS // 2, key=KEY)
    rest = run(steps=STEPS, state=half.state)
    assert_same_bits(rest.state, whole.state)
    losses = np.concatenate([half.history.loss, rest.history.loss])
    np.testing.assert_array_equal(losses, whole.history.loss)
    # The first call has not deleted the state that it continued from.
    assert_same_bits(run(steps=STEPS, state=half.state).state, whole.state)


def test_what_is_learned_is_a_choice_of_arrays(logistic):
    start, objective, _ = logistic
    assert problem_of(logistic).learn[1] == jax.tree.map(lambda _: False, objective)
    problem = problem_of(logistic, learn=lambda s: s.log_l2)
    state = problem.init(key=KEY)
    assert [x.shape for x in jax.tree.leaves(state.learned)] == [()]
    moved = eqx.tree_at(lambda s: s.learned[0].log_l2, state, jnp.array(0.0))
    assert problem.distilled(moved).l2 == 1.0
    np.testing.assert_array_equal(problem.distilled(moved).images, start.images)
    with pytest.raises(ValueError, match="must pick at least one"):
        problem_of(logistic, learn=lambda s: ())


def test_a_state_that_has_stopped_stays_the_same(logistic):
    start, objective, train = logistic
    explodes = optax.sgd(lambda step: jnp.where(jnp.asarray(step) < 2, 1.0, jnp.inf))
    problem = problem_of(logistic, explodes)
    data = objective.layout(train)
    step = eqx.filter_jit(problem.step)
    states = [problem.init(key=KEY)]
    for _ in range(4):
        states.append(step(states[-1], data)[0])
    assert [int(state.step) for state in states] == [0, 1, 2, 2, 2]
    assert [int(state.status) > 0 for state in states] == [False] * 3 + [True] * 2
    assert_same_bits(states[4], states[3])
    np.testing.assert_array_equal(
        problem.distilled(states[3]).images, problem.distilled(states[2]).images
    )
    with pytest.raises(ValueError, match="`state` must come from a run that can"):
        eqd.distill(start, objective, train, optimiser=explodes, state=states[4])


def test_the_user_keeps_their_arrays(logistic):
    start, objective, train = logistic
    before = np.array(start.images)
    run = lambda: eqd.distill(start, objective, train, optimiser=ADAM, steps=3)
    result = run()
    np.testing.assert_array_equal(start.images, before)
    np.testing.assert_array_equal(run().distilled.images, result.distilled.images)


@pytest.mark.parametrize("optimiser", [ADAM, optax.scale(-0.1)])
def test_a_second_run_compiles_nothing(logistic, optimiser):
    # `optax.scale` takes no extra arguments: Optax wraps it in a new function.
    run = lambda: eqd.distill(*logistic, optimiser=optimiser, steps=2)
    run()
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            run()
            jax.jit(lambda x: x + 1)(jnp.zeros(3))
    finally:
        logger.removeHandler(handler)
    compiled = [text for text in messages if "Compiling" in text]
    assert compiled
    assert not [text for text in compiled if "step" in text]


def test_a_state_of_another_problem_is_refused(logistic):
    start, objective, train = logistic
    run = lambda start, **kwargs: eqd.distill(
        start, objective, train, optimiser=ADAM, **kwargs
    )
    state = run(start, steps=2).state
    fewer = eqd.DistilledSet(start.images[:5], start.labels[:5], l2=0.1)
    match = r"`state` must fit `start` and `learn`: .*`\[0\]\.images`.*5, 8, 8"
    with pytest.raises(ValueError, match=match):
        run(fewer, state=state)
    with pytest.raises(ValueError, match="`steps` must be above 2, the step of"):
        run(start, steps=2, state=state)
    with pytest.raises(ValueError, match="`key` must not be given with `state`"):
        run(start, steps=4, state=state, key=KEY)


def test_one_bad_start_among_eight(logistic):
    start, objective, train = logistic
    problem, data = problem_of(logistic), objective.layout(train)
    images = jnp.stack([start.images] * 8).at[3].set(jnp.inf)
    starts = jax.vmap(lambda x: eqx.tree_at(lambda s: s.images, start, x))(images)
    states = jax.vmap(problem.init)(starts, key=jr.split(KEY, 8))
    step = eqx.filter_jit(eqx.filter_vmap(problem.step, in_axes=(0, None)))
    for _ in range(2):
        states, _ = step(states, data)
    each = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(8)]
    failures = [problem.failure(state) for state in each]
    assert failures[3] == "the inner solver did not converge"
    assert [*filter(None, failures)] == [failures[3]]
    assert [int(state.step) for state in each] == [2, 2, 2, 0, 2, 2, 2, 2]
    alone, _ = eqx.filter_jit(problem.step)(problem.init(key=KEY), data)
    alone, _ = eqx.filter_jit(problem.step)(alone, data)
    for i in (0, 7):
        found = problem.distilled(each[i]).images
        np.testing.assert_allclose(found, problem.distilled(alone).images, atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_forward_mode(logistic):
    start, _, train = logistic
    start = eqx.tree_at(lambda s: s.images, start, start.images.astype(float))
    model = eqd.linear.LogisticRegression(64, 10)
    objective = eqd.Bilevel(model, OneStep())
    data = objective.layout(train)
    state = objective.init(start, key=KEY)
    direction = jr.normal(KEY, start.images.shape)

    def along(t):
        moved = eqx.tree_at(lambda s: s.images, start, start.images + t * direction)
        return objective(moved, data, state, step=jnp.array(0), key=KEY)[0]

    both = jax.jit(lambda t: jax.jvp(along, (t,), (1.0,)))
    (high, _), (low, _), (_, slope) = both(1e-4), both(-1e-4), both(0.0)
    np.testing.assert_allclose(slope, (high - low) / 2e-4, rtol=1e-5)
