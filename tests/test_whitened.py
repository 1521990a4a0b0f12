"""Optimisers in coordinates in which the real images are white."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import subset


@pytest.fixture(scope="module")
def problem(digits):
    train = subset(digits[0], 300)
    distilled = eqd.DistilledSet.from_noise(train, l2=0.05, key=jr.key(0))
    return distilled, eqd.LogisticRegression(64, 10), train


def test_gradient_descent_is_by_the_metric_of_the_data(problem):
    start, _, train = problem
    params = eqx.filter(start, eqx.is_inexact_array)
    optimiser = eqd.whitened(optax.sgd(0.1), train, damping=0.02, scale=2.0)
    gradient = jax.tree.map(lambda x: jr.normal(jr.key(1), x.shape), params)
    updates, _ = optimiser.update(gradient, optimiser.init(params), params)
    images, log_l2 = jax.tree.leaves(updates)
    pixels = np.asarray(train.floating(), np.float64).reshape(len(train), -1)
    moments = pixels.T @ pixels / len(pixels)
    metric = moments + 0.02 * np.trace(moments) * np.eye(64)
    want = -0.4 * np.linalg.solve(metric, np.reshape(gradient.images, (10, 64)).T).T
    np.testing.assert_allclose(np.reshape(images, (10, 64)), want, rtol=1e-3, atol=1e-4)
    # What has not the shape of the images is only divided by the scale.
    np.testing.assert_allclose(log_l2, -0.4 * gradient.log_l2)


def test_lbfgs_needs_fewer_steps(problem):
    plain = optax.lbfgs(learning_rate=1.0, linesearch=None)
    first, second = (
        eqd.distill(*problem, optimiser=optimiser, steps=12).history.loss[-1]
        for optimiser in (plain, eqd.whitened(plain, problem[2]))
    )
    least = eqd.distill(*problem, optimiser=plain, steps=60).history.loss[-1]
    assert least < second < least + 0.5 * (first - least)


def test_line_search(problem):
    start, classifier, train = problem
    at = [start]
    history = eqd.distill(
        *problem,
        optimiser=eqd.whitened(optax.lbfgs(), train),
        steps=5,
        block_size=1,
        callback=lambda so_far: at.append(so_far.distilled),
    ).history
    assert (np.diff(history.loss) < 0).all()
    # The search keeps its last gradient, which is not to be taken for a whitened one.
    for distilled, norm in zip(at, history.gradient_norm, strict=False):
        gradient = eqx.filter_grad(eqd.outer_loss)(distilled, classifier, train)
        np.testing.assert_allclose(norm, jnp.linalg.norm(gradient.images), rtol=1e-2)


def test_bad_input(problem):
    start, _, train = problem
    with pytest.raises(ValueError, match=r"`damping` must be positive; got 0"):
        eqd.whitened(optax.sgd(1.0), train, damping=0.0)
    with pytest.raises(ValueError, match=r"`scale` must be positive; got -1.0"):
        eqd.whitened(optax.sgd(1.0), train, scale=-1.0)
    optimiser = eqd.whitened(optax.sgd(1.0), train)
    with pytest.raises(ValueError, match=r"images of shape \(8, 8\).*got"):
        optimiser.init({"labels": jnp.zeros((10, 10))})
    state = optimiser.init(start.images)
    with pytest.raises(ValueError, match="must be given `params`"):
        optimiser.update(start.images, state)
