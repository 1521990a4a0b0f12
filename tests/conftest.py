import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import pytest

import eqdistill as eqd


def pytest_configure(config):
    # Most of what the tests do is to compile, and much of it several times over.
    cache = getattr(config, "cache", None)  # Not there with `-p no:cacheprovider`.
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture
def x64():
    """Double precision, for tests in which precision is the point."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def mnist():
    return eqd.datasets.load("mnist")


@pytest.fixture(scope="session")
def digits():
    return eqd.datasets.load("digits")


@pytest.fixture
def small_perceptron(digits):
    """A start, a smooth network, and real data: soon compiled."""
    train = subset(digits[0], 60)
    start = eqd.DistilledSet.from_noise(train, l2=0.01, scale=0.3, key=jr.key(0))
    network = eqx.nn.Sequential(
        [
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(64, 10, 5, 1, jax.nn.softplus, key=jr.key(1)),
        ]
    )
    return start, network, train


class MLP(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, in_size, width, activation, *, key):
        self.mlp = eqx.nn.MLP(in_size, 10, width, 1, activation, key=key)

    def __call__(self, image):
        return self.mlp(image.reshape(-1))


class CNN(eqx.Module):
    conv: eqx.nn.Conv2d
    linear: eqx.nn.Linear

    def __init__(self, *, key):
        conv_key, linear_key = jr.split(key)
        self.conv = eqx.nn.Conv2d(1, 4, 3, key=conv_key)
        self.linear = eqx.nn.Linear(4 * 6 * 6, 10, key=linear_key)

    def __call__(self, image):
        return self.linear(jax.nn.softplus(self.conv(image[None])).reshape(-1))


class OneStep(eqd.AbstractInnerSolver[None]):
    """One step of gradient descent: an inner solver that is soon compiled, for tests of
    all else."""

    learning_rate: float = 10.0

    def init(self, distilled, model, *, key):
        return None

    def __call__(self, distilled, model, state, *, key):
        params, static = eqx.partition(model, eqd.parameters(model))
        loss = lambda params: eqd.inner_loss(distilled, eqx.combine(params, static))
        gradient = jax.grad(loss)(params)
        params = optax.tree.add_scale(params, -self.learning_rate, gradient)
        return eqd.Fitted(
            model=eqx.combine(params, static),
            converged=jnp.array(True),
            gradient_norm=optax.tree.norm(gradient),
        ), state


# One of each, as an optimiser that is made anew is compiled anew.
ADAM = optax.adam(0.05)
LBFGS = optax.lbfgs(learning_rate=1.0, linesearch=None)
SGD = optax.sgd(1.0)


@functools.cache  # A solver that is made anew is compiled anew.
def exact(learning_rate: float = 0.1) -> eqd.ArgminSolver:
    """An inner solver that is exact to rounding.

    A line search, which compares values, cannot tell points apart whose gradients are
    below the square root of the machine's precision: so this has none.
    """
    return eqd.ArgminSolver(
        solver=optx.OptaxMinimiser(
            optax.sgd(learning_rate, momentum=0.95), rtol=1e-13, atol=1e-13
        ),
        adjoint=optx.ImplicitAdjoint(eqd.DampedCG(rtol=1e-12)),
        max_steps=100_000,
    )


@eqx.filter_jit
def hypergradient(start, model, data, inner=eqd.AutoSolver(), **kwargs):
    """The outer loss and its gradient, in one program."""
    (loss, _), gradient = eqx.filter_value_and_grad(eqd.outer_loss, has_aux=True)(
        start, model, data, inner, **kwargs
    )
    return loss, gradient


def check_gradient(start, model, data, inner=eqd.AutoSolver(), *, rtol=1e-6):
    """Checks the hypergradient in all of `start` against a central difference, in one
    program, in double precision."""
    _, gradient = hypergradient(start, model, data, inner)
    leaves, structure = jax.tree.flatten(gradient)
    assert all(np.any(x) for x in leaves)
    rng = np.random.default_rng(0)
    # Of unit length in each array, so that each counts, however small its gradient.
    directions = [rng.normal(size=x.shape) for x in leaves]
    directions = [x / np.linalg.norm(x) for x in directions]
    for i, direction in enumerate(directions):
        move = jax.tree.unflatten(
            structure, [1e-5 * (j == i) * x for j, x in enumerate(directions)]
        )
        losses = [
            hypergradient(eqx.apply_updates(start, sign(move)), model, data, inner)
            for sign in (lambda x: x, lambda x: jax.tree.map(jnp.negative, x))
        ]
        slope = (losses[0][0] - losses[1][0]) / 2e-5
        wanted = np.vdot(leaves[i], direction)
        np.testing.assert_allclose(slope, wanted, rtol=rtol, atol=1e-9)


def small_noise(train: eqd.Dataset, n: int | None = None, *, l2=0.1, seed=0):
    """A start for logistic regression."""
    scale = 1 / math.prod(train.shape)
    return eqd.DistilledSet.from_noise(train, n, l2=l2, scale=scale, key=jr.key(seed))


def subset(data: eqd.Dataset, n: int) -> eqd.Dataset:
    return eqd.Dataset(data.images[:n], data.labels[:n], data.num_classes)
