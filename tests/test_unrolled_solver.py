"""Finite training runs, against the same steps by hand and central differences."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import check_gradient, hypergradient, subset


def with_momentum(learning_rate, decay):
    return optax.sgd(learning_rate, momentum=decay)


RATE = {"learning_rate": 0.5}
SGD = {"make": with_momentum, "hyperparameters": {"learning_rate": 0.5, "decay": 0.9}}


@pytest.fixture
def problem(small_perceptron):
    return small_perceptron


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
    got = eqx.filter(fitted.model, eqx.is_inexact_array)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
    np.testing.assert_allclose(fitted.gradient_norm, norm, rtol=1e-4)
    assert fitted.converged


@pytest.mark.usefixtures("x64")
def test_derivative_agrees_with_central_differences(problem):
    check_gradient(*problem, eqd.UnrolledSolver(**SGD, steps=20))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_exact_adjoints_agree(problem):
    adjoints = (
        eqd.DirectAdjoint(),
        eqd.RecursiveCheckpointAdjoint(),
        eqd.RecursiveCheckpointAdjoint(3),
    )
    found = [
        hypergradient(*problem, eqd.UnrolledSolver(**SGD, steps=20, adjoint=adjoint))
        for adjoint in adjoints
    ]
    for loss, gradient in found[1:]:
        np.testing.assert_allclose(loss, found[0][0], rtol=1e-12)
        leaves = zip(*map(jax.tree.leaves, (gradient, found[0][1])), strict=True)
        for x, y in leaves:
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_forward_mode_agrees_with_reverse_mode(problem):
    def of_hyperparameters(adjoint):
        solver = eqd.UnrolledSolver(**SGD, steps=20, adjoint=adjoint)

        @eqx.filter_jit
        @eqx.filter_grad
        def gradient(logs):
            inner = eqx.tree_at(lambda s: s.log_hyperparameters, solver, logs)
            return eqd.outer_loss(*problem, inner)[0]

        return gradient(solver.log_hyperparameters)

    forward, reverse = map(
        of_hyperparameters, (eqd.ForwardAdjoint(), eqd.DirectAdjoint())
    )
    for name, x in reverse.items():
        assert x != 0
        np.testing.assert_allclose(forward[name], x, rtol=1e-10)
    solver = eqd.UnrolledSolver(**SGD, steps=2, adjoint=eqd.ForwardAdjoint())
    with pytest.raises(ValueError, match="at most 100 learned numbers; got 6"):
        hypergradient(*problem, solver)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_adam_is_differentiated_with_eps_root_only(problem):
    start, network, train = problem
    # The gradient of the first layer is zero for the first pixel.
    start = eqx.tree_at(lambda d: d.images, start, start.images.at[:, 0, 0].set(0.0))
    network = eqx.tree_at(
        lambda n: n.layers[1].layers[0].weight,
        network,
        replace_fn=lambda x: x.at[:, 0].set(0.0),
    )
    make = functools.partial(optax.adam, eps_root=1e-8)
    check_gradient(
        start, network, train, eqd.UnrolledSolver(make, {"learning_rate": 0.02}, 20)
    )
    solver = eqd.UnrolledSolver(optax.adam, {"learning_rate": 0.02}, 20)
    assert eqd.fit(start, network, solver).converged
    with pytest.raises(
        ValueError, match=r"`make` must make .* derivative .*`eps_root`"
    ):
        hypergradient(start, network, train, solver)


@pytest.mark.slow
def test_windows(problem):
    start, network, train = problem
    gradient = lambda window, key=None: (
        hypergradient(
            start,
            network,
            train,
            eqd.UnrolledSolver(**SGD, steps=6, window=window),
            key=key,
        )[1].images
    )
    whole = gradient(None)
    np.testing.assert_array_equal(gradient(eqd.LastSteps(6)), whole)

    # By hand: two steps from the point that four steps reach.
    prefix = eqd.fit(start, network, eqd.UnrolledSolver(optax.sgd, RATE, 4)).model
    rest = eqd.UnrolledSolver(optax.sgd, RATE, 2)
    wanted = hypergradient(start, prefix, train, rest)[1].images
    last = eqd.UnrolledSolver(optax.sgd, RATE, 6, window=eqd.LastSteps(2))
    got = hypergradient(start, network, train, last)[1].images
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6)
    assert not np.allclose(got, whole, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "favourite"),
    [
        (eqd.RandomWindow(2), None),
        (eqd.GradientWindow(2, power=300.0), 0),
        (eqd.GradientWindow(2, power=-300.0), 4),
    ],
)
def test_where_windows_end(problem, window, favourite):
    start, network, _ = problem
    solver = eqd.UnrolledSolver(optax.sgd, RATE, 6, window=window)
    ends = [
        int(eqd.fit(start, network, solver, key=jr.key(seed)).stats["steps"])
        for seed in range(40)
    ]
    if favourite is None:
        assert set(ends) == {2, 3, 4, 5, 6}
    else:
        assert ends.count(favourite + 2) > 35
    name = type(window).__name__
    with pytest.raises(ValueError, match=f"`key` must be given with a `{name}`"):
        eqd.fit(start, network, solver)


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
    model = eqd.LogisticRegression(64, 10)

    def weight(batch_size, rate, seed=0):
        steps = 12 // (batch_size or 12)
        solver = eqd.UnrolledSolver(
            optax.sgd, {"learning_rate": rate}, steps, batch_size=batch_size
        )
        return eqd.fit(start, model, solver, key=jr.key(seed)).model.head

    whole, parts = weight(None, 3e-4).weight, weight(4, 1e-4).weight
    np.testing.assert_allclose(parts, whole, rtol=1e-2, atol=1e-7)
    assert not jnp.array_equal(weight(4, 1.0).weight, weight(4, 1.0, seed=1).weight)


def by_step(learning_rate):
    return optax.sgd(lambda step: learning_rate[step])


def test_a_sequence_of_batches_with_a_step_size_each(digits):
    # Wang et al.: each step has images and a step size of its own. In the second epoch
    # the images come again.
    train = subset(digits[0], 6)
    start = eqd.DistilledSet(train.floating(), train.labels, l2=1e-3)
    rates = jnp.array([0.1, 0.2, 0.3, 0.05])
    solver = eqd.UnrolledSolver(
        by_step, {"learning_rate": rates}, 4, batch_size=3, shuffle=False
    )
    model = eqd.LogisticRegression(64, 10)
    fitted = eqd.fit(start, model, solver).model
    weight = model.head.weight
    for i, rate in enumerate(rates):
        own = slice(0, 3) if i % 2 == 0 else slice(3, 6)
        images, labels = start.images[own].reshape(3, 64), start.labels[own]

        def loss(weight, images=images, labels=labels):
            squares = jnp.sum(weight**2)
            return eqd.cross_entropy(images @ weight.T, labels) + 5e-4 * squares

        weight = weight - rate * jax.grad(loss)(weight)
    np.testing.assert_allclose(fitted.head.weight, weight, rtol=1e-4, atol=1e-6)


class WithDropout(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, *, key):
        self.linear = eqx.nn.Linear(64, 10, key=key)
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, image, *, key=None):
        return self.linear(self.dropout(image.reshape(-1), key=key))


def test_dropout_is_drawn_in_training_only(problem):
    start, _, train = problem
    network = WithDropout(key=jr.key(0))
    solver = eqd.UnrolledSolver(optax.sgd, RATE, 3)
    fits = [
        eqd.fit(start, network, solver, key=jr.key(i)).model for i in (0, 0, 1)
    ]
    weights = [x.linear.weight for x in fits]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.allclose(weights[0], weights[2], rtol=1e-3)
    found = eqd.evaluate(start, network, train, solver, key=jr.key(0))
    logits = jax.vmap(eqx.nn.inference_mode(fits[0]))(train.floating())
    wanted = eqd.cross_entropy(logits, train.labels)
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`key` must be given .* that draws dropout"):
        eqd.fit(start, network, solver)
    off = eqx.nn.inference_mode(network)
    same = eqx.tree_at(lambda n: n.dropout, network, eqx.nn.Dropout(0.0))
    np.testing.assert_allclose(
        eqd.fit(start, off, solver).model.linear.weight,
        eqd.fit(start, same, solver, key=jr.key(0)).model.linear.weight,
        rtol=1e-5,
        atol=1e-7,
    )


def test_images_are_augmented(problem):
    start, network, _ = problem
    plain, shifted = (
        eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 2, augmentation=x)
        for x in (None, eqd.Affine(shift=3.0))
    )
    weight = lambda solver, seed: jax.tree.leaves(
        eqx.filter(
            eqd.fit(start, network, solver, key=jr.key(seed)).model, eqx.is_array
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
    match = r"`hyperparameters\['learning_rate'\]` must be.* finite; got -1.0"
    with pytest.raises(ValueError, match=match):
        eqd.UnrolledSolver(optax.sgd, {"learning_rate": -1.0}, 1)
    with pytest.raises(ValueError, match=r"`window` must have from 1 to 2 .*; got 3"):
        eqd.UnrolledSolver(**SGD, steps=2, window=eqd.LastSteps(3))
    with pytest.raises(ValueError, match="`checkpoints` must be at least 1; got 0"):
        eqd.RecursiveCheckpointAdjoint(0)
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
