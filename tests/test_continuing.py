"""Runs that continue an earlier result with other arguments."""

import functools as ft

import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import ADAM, hypergradient


INJECTED = optax.inject_hyperparams(optax.adam)


@pytest.fixture
def run(logistic):
    start, objective, _ = logistic

    def run(objective=objective, data=logistic[2], optimiser=ADAM, steps=3, **kwargs):
        return eqd.distill(
            start, objective, data, optimiser=optimiser, steps=steps, **kwargs
        )

    return run


def moved(result, since):
    return result.distilled.images - since.distilled.images


def test_nothing_has_changed(run):
    half = run()
    assert half.changes == run(steps=4, state=half).changes == ()
    assert run(steps=4, state=half).state.step == 4


def test_another_learning_rate(run):
    half = run()
    same, slower = (
        run(optimiser=x, steps=4, state=half) for x in (ADAM, optax.adam(0.0125))
    )
    np.testing.assert_allclose(moved(slower, half), moved(same, half) / 4, atol=1e-6)
    (change,) = slower.changes
    assert change.startswith("from step 3: `optimiser")
    assert change.endswith("was -0.05 and is -0.0125 now")
    assert repr(slower).endswith("; changes: 1>")
    # They add up.
    last = run(steps=5, state=slower)
    assert last.changes[0] == change
    assert last.changes[1].startswith("from step 4: `optimiser")


@pytest.mark.parametrize("argument", ["data", "objective"])
def test_other_data_and_another_objective(run, logistic, digits, argument):
    _, objective, train = logistic
    images, labels = (x[200:400] for x in (digits[0].images, digits[0].labels))
    changed = {"data": eqd.Dataset(images, labels, 10)}
    if argument == "objective":
        loss = eqd.CrossEntropy(0.5)
        changed = {"objective": eqd.Bilevel(objective.models, objective.inner, loss)}
    half = run()
    whole = run(**changed, steps=4, state=half)
    wanted, _ = hypergradient(
        half.distilled, changed.get("objective", objective), changed.get("data", train)
    )
    np.testing.assert_allclose(whole.history.loss, [wanted], rtol=1e-5)
    (change,) = whole.changes
    assert change.startswith(f"from step 3: `{argument}.")


def test_a_bare_state_has_no_record(run):
    (change,) = run(steps=4, state=run().state).changes
    assert change == "from step 3: unknown, as `state` was not a result"


def test_states_that_do_not_fit(run, logistic):
    half = run()
    match = r"`state` must fit `optimiser`: .*count`.*pass `start=result.start`"
    with pytest.raises(ValueError, match=match):
        run(optimiser=optax.sgd(0.1), steps=4, state=half)
    model = eqd.linear.LogisticRegression(64, 10)
    with pytest.raises(ValueError, match=r"`state` must fit `objective`: .*weight`"):
        run(objective=model, steps=4, state=half)
    with pytest.raises(ValueError, match=r"`state` must fit `start` and `learn`: .*l2"):
        run(learn=lambda s: s, steps=4, state=half)


def test_injected_hyperparameters(run):
    half = run(optimiser=INJECTED(0.05))
    slower = ft.partial(run, optimiser=INJECTED(0.0125), steps=4)
    fix = r"optax.tree.set\(result.state, learning_rate=0.0125\)"
    match = f"`optimiser` must have the `learning_rate` of `state`.*0.05; .*{fix}"
    for state in (half, half.state):
        with pytest.raises(ValueError, match=match):
            slower(state=state)
    state = optax.tree.set(half.state, learning_rate=0.0125)
    same = run(optimiser=INJECTED(0.05), steps=4, state=half)
    result = slower(state=state)
    np.testing.assert_allclose(moved(result, half), moved(same, half) / 4, atol=1e-6)
    # Schedules are functions of the step.
    schedule = INJECTED(optax.linear_schedule(0.05, 0.0, 10))
    half = run(optimiser=schedule)
    assert run(optimiser=schedule, steps=4, state=half).changes == ()
