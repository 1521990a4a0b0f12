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
    start = eqd.DistilledSet.from_noise(train, l2=0.05, scale=1 / 64, key=jr.key(0))
    return start, eqd.linear.LogisticRegression(64, 10), train


def test_gradient_descent():
    """Against the formula, with soft labels that have the shape of an image."""
    rng = np.random.default_rng(0)
    train = eqd.Dataset(
        rng.normal(size=(50, 10)).astype(np.float32), np.arange(50) % 10
    )
    images, labels = rng.normal(size=(2, 10, 10)).astype(np.float32)
    start = eqd.DistilledSet(images, labels, l2=0.1)
    # What `distill` learns is a filtered pair of `start` and the objective.
    params = (eqx.filter(start, eqx.is_inexact_array), {"temperature": jnp.array(2.0)})
    optimiser = eqd.linear.whitened(optax.sgd(0.1), train, damping=0.02, scale=3.0)
    updates, _ = optimiser.update(params, optimiser.init(params), params)
    update, other = jax.tree.map(np.asarray, updates)  # pyright: ignore
    pixels = np.asarray(train.images, np.float64)
    moments = pixels.T @ pixels / len(pixels)
    metric = moments + 0.02 * np.trace(moments) * np.eye(10)
    wanted = -0.9 * np.linalg.solve(metric, images.T).T
    np.testing.assert_allclose(update.images, wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(update.labels, -0.9 * labels, rtol=1e-5)
    np.testing.assert_allclose(update.log_l2, -0.9 * start.log_l2, rtol=1e-5)
    np.testing.assert_allclose(other["temperature"], -1.8, rtol=1e-5)


@pytest.mark.slow
def test_lbfgs_needs_fewer_steps(problem):
    plain = optax.lbfgs(learning_rate=1.0, linesearch=None)
    first, second = (
        eqd.distill(*problem, optimiser=optimiser, steps=12).history.loss[-1]
        for optimiser in (plain, eqd.linear.whitened(plain, problem[2]))
    )
    least = eqd.distill(*problem, optimiser=plain, steps=60).history.loss[-1]
    assert least < second < least + 0.5 * (first - least)


@pytest.mark.slow
def test_line_search(problem):
    optimiser = eqd.linear.whitened(optax.lbfgs(), problem[2])
    losses = eqd.distill(*problem, optimiser=optimiser, steps=5).history.loss
    assert (np.diff(losses) < 0).all()


def test_learned_arrays_without_images(problem):
    start, _, train = problem
    optimiser = eqd.linear.whitened(optax.sgd(1.0), train)
    for name, shape in (("labels", (10, 8, 8)), ("images", (10, 64))):
        with pytest.raises(ValueError, match=r"`images` of shape \(8, 8\).*got"):
            optimiser.init({name: jnp.zeros(shape)})
    params = {"images": start.images}
    with pytest.raises(ValueError, match="needs `params`"):
        optimiser.update(params, optimiser.init(params))
