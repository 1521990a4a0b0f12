"""Distillation from several starts at once: `vmap` of the step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd

from .conftest import ADAM, LBFGS, small_noise


def run_each(problem, starts, data, *, steps, keys):
    """The final states, and the losses of each step."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    states = eqx.filter_vmap(lambda start, key: problem.init(start, key=key))(
        stacked, keys
    )
    step = eqx.filter_jit(eqx.filter_vmap(problem.step, in_axes=(0, None)))
    losses = []
    for _ in range(steps):
        states, metrics = step(states, data)
        losses.append(metrics["loss"])
    return states, np.stack(losses, axis=1)


@pytest.mark.slow
def test_is_as_one_by_one(logistic):
    _, objective, train = logistic
    starts = [small_noise(train, l2=0.05 * (i + 1), seed=i) for i in range(3)]
    optimiser = eqd.linear.whitened(LBFGS, train)
    problem = eqd.Problem(starts[0], objective, optimiser=optimiser)
    keys = jr.split(jr.key(0), 3)
    data = objective.layout(train)
    states, losses = run_each(problem, starts, data, steps=6, keys=keys)
    for i, start in enumerate(starts):
        alone = eqd.distill(start, objective, train, optimiser=optimiser, steps=6)
        np.testing.assert_allclose(losses[i], alone.history.loss, rtol=1e-4)
        state = jax.tree.map(lambda x, i=i: x[i], states)
        found = problem.distilled(state)
        assert found.l2 == start.l2
        np.testing.assert_allclose(
            found.images, alone.distilled.images, rtol=1e-2, atol=1e-3
        )


def test_one_that_fails_does_not_stop_the_others(logistic):
    start, objective, train = logistic
    bad = eqx.tree_at(lambda s: s.images, start, jnp.full_like(start.images, jnp.nan))
    problem = eqd.Problem(start, objective, optimiser=ADAM)
    keys = jr.split(jr.key(0), 2)
    data = objective.layout(train)
    states, losses = run_each(problem, [start, bad], data, steps=3, keys=keys)
    np.testing.assert_array_equal(states.step, [3, 0])
    assert states.status[0] == 0 != states.status[1]
    assert losses[0, 2] < losses[0, 0]
