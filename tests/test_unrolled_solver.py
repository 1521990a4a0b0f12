"""Finite training runs, against the same steps by hand and central differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import check_gradient, subset


def with_momentum(learning_rate, decay):
    return optax.sgd(learning_rate, momentum=decay)


SGD = {"make": with_momentum, "hyperparameters": {"learning_rate": 0.5, "decay": 0.9}}


@pytest.fixture
def problem(digits):
    train = subset(digits[0], 60)
    start = eqd.DistilledSet.from_noise(train, l2=0.01, scale=0.3, key=jr.key(0))
    network = eqx.nn.Sequential(
        [
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(64, 10, 5, 1, jax.nn.softplus, key=jr.key(1)),
        ]
    )
    return start, network, train


def test_steps_are_as_by_hand(problem):
    start, network, _ = problem
    fitted = eqd.fit(start, network, eqd.UnrolledSolver(**SGD, steps=10))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def loss(params):
        logits = jax.vmap(eqx.combine(params, static))(start.images)
        squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        return eqd.cross_entropy(logits, start.labels) + 0.005 * squares

    @jax.jit
    def step(params, velocity):
        g = jax.grad(loss)(params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, g)
        return jax.tree.map(lambda w, v: w - 0.5 * v, params, velocity), velocity, g

    velocity = g = jax.tree.map(jnp.zeros_like, params)
    for _ in range(10):
        params, velocity, g = step(params, velocity)
    got = eqx.filter(fitted.classifier, eqx.is_inexact_array)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
    np.testing.assert_allclose(fitted.gradient_norm, norm, rtol=1e-4)
    assert fitted.converged


@pytest.mark.usefixtures("x64")
def test_derivative_agrees_with_central_differences(problem):
    solver = eqd.UnrolledSolver(**SGD, steps=20)
    check_gradient(*problem, solver)


@pytest.mark.slow
def test_step_sizes_are_learned(problem):
    solver = eqd.UnrolledSolver(**SGD, steps=5)
    args = {"inner": solver, "optimiser": optax.adam(0.05), "steps": 10}
    result = eqd.distill(*problem, learn=(False, True), **args)
    assert result.learned == (
        "inner.log_hyperparameters.decay",
        "inner.log_hyperparameters.learning_rate",
    )
    assert result.history.loss[-1] < result.history.loss[0]


def test_batches_see_each_image_once_an_epoch(digits):
    # A linear model and a squared error, of which one step is made by a batch: after an
    # epoch of tiny steps, the weights are those of one step of all.
    train = subset(digits[0], 12)
    start = eqd.DistilledSet(
        train.floating(), train.labels, l2=1e-6, loss=eqd.SquaredError()
    )
    classifier = eqd.LogisticRegression(64, 10)

    def weight(batch_size, rate, seed=0):
        steps = 12 // (batch_size or 12)
        solver = eqd.UnrolledSolver(
            optax.sgd, {"learning_rate": rate}, steps, batch_size=batch_size
        )
        return eqd.fit(start, classifier, solver, key=jr.key(seed)).classifier.head

    whole, parts = weight(None, 3e-4).weight, weight(4, 1e-4).weight
    np.testing.assert_allclose(parts, whole, rtol=1e-2, atol=1e-7)
    assert not jnp.array_equal(weight(4, 1.0).weight, weight(4, 1.0, seed=1).weight)


def test_images_are_augmented(problem):
    start, network, _ = problem
    plain, shifted = (
        eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 2, augmentation=x)
        for x in (None, eqd.Affine(shift=3.0))
    )
    weight = lambda solver, seed: jax.tree.leaves(
        eqx.filter(
            eqd.fit(start, network, solver, key=jr.key(seed)).classifier, eqx.is_array
        )
    )[0]
    assert not np.allclose(weight(shifted, 0), weight(plain, 0), rtol=1e-5)
    assert not np.allclose(weight(shifted, 0), weight(shifted, 1), rtol=1e-5)
    np.testing.assert_array_equal(weight(shifted, 0), weight(shifted, 0))
    with pytest.raises(ValueError, match="`key` must be given with an `UnrolledSolver"):
        eqd.fit(start, network, shifted)

    class Halved(eqd.AbstractAugmentation):
        def __call__(self, image, *, key):
            return image[::2, ::2]

    solver = eqd.UnrolledSolver(
        optax.sgd, {"learning_rate": 0.1}, 2, augmentation=Halved()
    )
    with pytest.raises(ValueError, match=r"`augmentation` must keep.*\(8, 8\).*\(4, 4"):
        eqd.fit(start, network, solver, key=jr.key(0))


def test_bad_input(problem):
    start, network, _ = problem
    with pytest.raises(ValueError, match="`steps` must be at least 1; got 0"):
        eqd.UnrolledSolver(**SGD, steps=0)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        eqd.UnrolledSolver(**SGD, steps=1, batch_size=0)
    match = "`hyperparameters` must be positive and finite; 'learning_rate' is -1.0"
    with pytest.raises(ValueError, match=match):
        eqd.UnrolledSolver(optax.sgd, {"learning_rate": -1.0}, 1)
    solver = eqd.UnrolledSolver(**SGD, steps=1, batch_size=11)
    with pytest.raises(ValueError, match=r"`batch_size` must be at most 10.*got 11"):
        eqd.fit(start, network, solver, key=jr.key(0))
    solver = eqd.UnrolledSolver(**SGD, steps=1, batch_size=5)
    with pytest.raises(ValueError, match="`key` must be given with an `UnrolledSolver"):
        eqd.fit(start, network, solver)


def test_a_run_that_diverges_is_told(problem):
    start, network, _ = problem
    solver = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 1e20}, 5)
    assert not eqd.fit(start, network, solver, throw=False).converged
    with pytest.raises(RuntimeError, match="did not converge"):
        eqd.fit(start, network, solver)
