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
    distilled = eqd.DistilledSet.from_noise(train, l2=0.05, scale=1 / 64, key=jr.key(0))
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


def test_soft_labels_of_the_shape_of_an_image(problem):
    # Ten pixels, and ten classes.
    rng = np.random.default_rng(0)
    train = eqd.Dataset(
        rng.normal(size=(50, 10)).astype(np.float32), np.arange(50) % 10
    )
    images, labels = rng.normal(size=(2, 10, 10)).astype(np.float32)
    soft = eqd.DistilledSet(images, labels, l2=0.1)
    params = eqx.filter(soft, eqx.is_inexact_array)
    optimiser = eqd.whitened(optax.sgd(0.1), train, damping=0.02, scale=3.0)
    updates, _ = optimiser.update(params, optimiser.init(params), params)
    np.testing.assert_allclose(updates.labels, -0.9 * labels, rtol=1e-5)
    pixels = np.asarray(train.images, np.float64)
    moments = pixels.T @ pixels / len(pixels)
    metric = moments + 0.02 * np.trace(moments) * np.eye(10)
    want = -0.9 * np.linalg.solve(metric, images.T).T
    np.testing.assert_allclose(updates.images, want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_lbfgs_needs_fewer_steps(problem):
    plain = optax.lbfgs(learning_rate=1.0, linesearch=None)
    first, second = (
        eqd.distill(*problem, optimiser=optimiser, steps=12).history.loss[-1]
        for optimiser in (plain, eqd.whitened(plain, problem[2]))
    )
    least = eqd.distill(*problem, optimiser=plain, steps=60).history.loss[-1]
    assert least < second < least + 0.5 * (first - least)


@pytest.mark.slow
def test_line_search(problem):
    start, model, train = problem
    optimiser = eqd.whitened(optax.lbfgs(), train)
    whole = eqd.Problem(start, model, train, optimiser=optimiser)
    state, step = whole.init(), eqx.filter_jit(whole.step)
    hypergradient = eqx.filter_jit(eqx.filter_grad(eqd.outer_loss, has_aux=True))
    losses = []
    for _ in range(5):
        gradient, _ = hypergradient(whole.distilled(state), model, whole.data)
        state, metrics = step(state)
        # The search keeps its last gradient, which is not to be taken for a whitened
        # one.
        norm = jnp.linalg.norm(gradient.images)
        np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-2)
        losses.append(metrics.loss)
    assert (np.diff(losses) < 0).all()


def test_bad_input(problem):
    start, _, train = problem
    with pytest.raises(ValueError, match=r"`damping` must be positive; got 0"):
        eqd.whitened(optax.sgd(1.0), train, damping=0.0)
    with pytest.raises(ValueError, match=r"`scale` must be positive; got -1.0"):
        eqd.whitened(optax.sgd(1.0), train, scale=-1.0)
    optimiser = eqd.whitened(optax.sgd(1.0), train)
    with pytest.raises(ValueError, match=r"`images` of shape \(8, 8\).*got"):
        optimiser.init({"labels": jnp.zeros((10, 8, 8))})
    with pytest.raises(ValueError, match=r"`images` of shape \(8, 8\).*got"):
        optimiser.init({"images": jnp.zeros((10, 64))})
    params = {"images": start.images}
    state = optimiser.init(params)
    with pytest.raises(ValueError, match="must be given `params`"):
        optimiser.update(params, state)
