"""Finite training runs against the same steps by hand and central differences."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import eqdistill as eqd
from eqdistill import adjoints
from eqdistill.linear import LogisticRegression

from .conftest import check_gradient, hypergradient, subset


def with_momentum(learning_rate, decay):
    return optax.sgd(learning_rate, momentum=decay)


KEY = jr.key(0)
RATE = {"learning_rate": 0.5}
SGD = {"make": with_momentum, "hyperparameters": {"learning_rate": 0.5, "decay": 0.9}}


@pytest.fixture
def problem(small_perceptron):
    return small_perceptron


def gradient(problem, solver, **kwargs):
    start, network, train = problem
    return hypergradient(start, eqd.Bilevel(network, solver), train, **kwargs)[1]


def test_steps_are_as_by_hand(problem):
    start, network, _ = problem
    fitted = eqd.fit(start, network, eqd.UnrolledSolver(**SGD, steps=10))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def loss(params):
        logits = jax.vmap(eqx.combine(params, static))(start.images)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, start.labels
        )
        return jnp.mean(losses) + 0.005 * optax.tree.norm(params, squared=True)

    @jax.jit
    def step(params, velocity):
        g = jax.grad(loss)(params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, g)
        return jax.tree.map(lambda w, v: w - 0.5 * v, params, velocity), velocity, g

    velocity = g = jax.tree.map(jnp.zeros_like, params)
    for _ in range(10):
        params, velocity, g = step(params, velocity)
    got = eqx.filter(fitted.model, eqx.is_inexact_array)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fitted.gradient_norm, optax.tree.norm(g), rtol=1e-4)
    assert fitted.converged


@pytest.mark.usefixtures("x64")
def test_derivative_agrees_with_central_differences(problem):
    start, network, train = problem
    solver = eqd.UnrolledSolver(**SGD, steps=20)
    check_gradient(start, eqd.Bilevel(network, solver), train)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "adjoint",
    [adjoints.DirectAdjoint(), adjoints.RecursiveCheckpointAdjoint(3)],
)
def test_derivative_in_hyperparameters_agrees_with_central_differences(
    problem, adjoint
):
    start, network, _ = problem
    solver = eqd.UnrolledSolver(**SGD, steps=8, adjoint=adjoint)

    @jax.jit
    def loss(logs, images):
        inner = eqx.tree_at(lambda s: s.log_hyperparameters, solver, logs)
        distilled = eqx.tree_at(lambda d: d.images, start, images)
        fitted, _ = inner(distilled, network, None, key=KEY)
        return jnp.mean(jax.vmap(fitted.model)(start.images) ** 2)

    images = jnp.asarray(start.images, float)
    modes = ["fwd", "rev"] if isinstance(adjoint, adjoints.DirectAdjoint) else ["rev"]
    check_grads(loss, (solver.log_hyperparameters, images), 1, modes, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_adam_needs_eps_root_to_be_differentiated(problem):
    start, network, train = problem
    # The gradient of the first layer is zero for the first pixel.
    start = eqx.tree_at(lambda d: d.images, start, start.images.at[:, 0, 0].set(0.0))
    network = eqx.tree_at(
        lambda n: n.layers[1].layers[0].weight,
        network,
        replace_fn=lambda x: x.at[:, 0].set(0.0),
    )
    make = functools.partial(optax.adam, eps_root=1e-8)
    solver = eqd.UnrolledSolver(make, {"learning_rate": 0.02}, 20)
    check_gradient(start, eqd.Bilevel(network, solver), train)
    solver = eqd.UnrolledSolver(optax.adam, {"learning_rate": 0.02}, 20)
    assert eqd.fit(start, network, solver).converged
    with pytest.raises(ValueError, match=r"`make` must .* differentiable.*`eps_root`"):
        gradient((start, network, train), solver)


@pytest.mark.slow
def test_last_steps(problem):
    start, network, train = problem
    run = lambda network, steps, window=None: (
        gradient(
            (start, network, train),
            eqd.UnrolledSolver(optax.sgd, RATE, steps, window=window),
        ).images
    )
    whole = run(network, 6)
    np.testing.assert_array_equal(run(network, 6, adjoints.LastSteps(6)), whole)
    # By hand: differentiate two steps that start where four steps end.
    prefix = eqd.fit(start, network, eqd.UnrolledSolver(optax.sgd, RATE, 4)).model
    got, wanted = run(network, 6, adjoints.LastSteps(2)), run(prefix, 2)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6)
    assert not np.allclose(got, whole, rtol=0.1)


@pytest.mark.slow
def test_random_windows(problem):
    def ends(window):
        solver = eqd.UnrolledSolver(optax.sgd, RATE, 6, window=window)
        fit = lambda seed: eqd.fit(*problem[:2], solver, key=jr.key(seed))
        return [int(fit(seed).stats["steps"]) for seed in range(40)]

    assert set(ends(adjoints.RandomWindow(2))) == {2, 3, 4, 5, 6}
    assert ends(adjoints.GradientWindow(2, power=300.0)).count(2) > 35
    assert ends(adjoints.GradientWindow(2, power=-300.0)).count(6) > 35


@pytest.mark.slow
def test_step_sizes_are_learned(problem):
    start, network, train = problem
    where = lambda o: o.inner.log_hyperparameters
    args = {"learn": lambda s: (), "learn_objective": where, "steps": 10}
    objective = eqd.Bilevel(network, eqd.UnrolledSolver(**SGD, steps=5))
    result = eqd.distill(start, objective, train, optimiser=optax.adam(0.05), **args)
    names = (f"objective.inner.log_hyperparameters.{x}" for x in SGD["hyperparameters"])
    assert set(result.learned) == {*names}
    assert result.history.loss[-1] < result.history.loss[0]


def test_batches_use_each_image_once_an_epoch(digits):
    # For squared error, an epoch of tiny steps equals one step on all images.
    train = subset(digits[0], 12)
    start = eqd.DistilledSet(
        train.floating(), train.labels, l2=1e-6, loss=eqd.SquaredError()
    )

    def weight(batch_size, rate, seed=0):
        steps = 12 // (batch_size or 12)
        solver = eqd.UnrolledSolver(
            optax.sgd, {"learning_rate": rate}, steps, batch_size=batch_size
        )
        model = LogisticRegression(64, 10)
        return eqd.fit(start, model, solver, key=jr.key(seed)).model.head.weight

    np.testing.assert_allclose(weight(4, 1e-4), weight(None, 3e-4), 1e-2, 1e-7)
    assert not jnp.array_equal(weight(4, 1.0), weight(4, 1.0, seed=1))
    solver = eqd.UnrolledSolver(**SGD, steps=1, batch_size=13)
    with pytest.raises(ValueError, match=r"`batch_size` must be at most 12.*got 13"):
        eqd.fit(start, LogisticRegression(64, 10), solver)


def test_dropout_is_on_only_in_training(problem):
    start, _, train = problem
    below = [eqx.nn.Lambda(jnp.ravel), eqx.nn.Dropout(0.5)]
    network = eqx.nn.Sequential([*below, eqx.nn.Linear(64, 10, key=KEY)])
    solver = eqd.UnrolledSolver(optax.sgd, RATE, 3)
    fits = [eqd.fit(start, network, solver, key=jr.key(i)).model for i in (0, 0, 1)]
    weights = [x.layers[2].weight for x in fits]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.allclose(weights[0], weights[2], rtol=1e-3)
    # The outer loss is deterministic.
    objective = eqd.Bilevel(network, solver)
    losses = [hypergradient(start, objective, train)[0] for _ in range(2)]
    assert losses[0] == losses[1]


def test_images_are_augmented(problem):
    start, network, _ = problem
    make = lambda augmentation: eqd.UnrolledSolver(
        optax.sgd, {"learning_rate": 0.1}, 2, augmentation=augmentation
    )
    plain, shifted = make(None), make(eqd.augment.Affine(shift=3.0))
    weight = lambda solver, seed: (
        eqd.fit(start, network, solver, key=jr.key(seed)).model[1].layers[0].weight
    )
    assert not np.allclose(weight(shifted, 0), weight(plain, 0), rtol=1e-5)
    assert not np.allclose(weight(shifted, 0), weight(shifted, 1), rtol=1e-5)
    np.testing.assert_array_equal(weight(shifted, 0), weight(shifted, 0))


def test_a_diverging_run_does_not_converge(problem):
    solver = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 1e20}, 5)
    assert not eqd.fit(*problem[:2], solver, throw=False).converged
