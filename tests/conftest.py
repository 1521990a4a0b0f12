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
from eqdistill._outer._evaluate import Evaluation


def pytest_configure(config):
    # Compiling takes most of the suite's time, and many programs are the same.
    cache = getattr(config, "cache", None)  # Missing with `-p no:cacheprovider`.
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
    """A start, a smooth network, and real data, which compile quickly."""
    train = subset(digits[0], 60)
    start = eqd.DistilledSet.from_noise(train, l2=0.01, scale=0.3, key=jr.key(0))
    network = eqx.nn.Sequential(
        [
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(64, 10, 5, 1, jax.nn.softplus, key=jr.key(1)),
        ]
    )
    return start, network, train


@pytest.fixture(scope="session")
def logistic(digits):
    """A start, an objective with a quick inner solver, and real data: the problem of
    most tests of the outer loop, which share its programs."""
    train = subset(digits[0], 200)
    start = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.02, key=jr.key(0))
    model = eqd.linear.LogisticRegression(64, 10)
    return start, eqd.Bilevel(model, OneStep()), train


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
    """One step of gradient descent: an inner solver that compiles quickly, for tests of
    everything else."""

    learning_rate: float = 10.0

    def init(self, distilled, model, *, key):
        return None

    def __call__(self, distilled, model, state, *, key):
        params, static = eqx.partition(model, eqd.nn.parameters(model))
        loss = lambda params: eqd.inner_loss(distilled, eqx.combine(params, static))
        gradient = jax.grad(loss)(params)
        params = optax.tree.add_scale(params, -self.learning_rate, gradient)
        return eqd.Fitted(
            model=eqx.combine(params, static),
            converged=jnp.array(True),
            gradient_norm=optax.tree.norm(gradient),
        ), state


class Recorder(eqd.AbstractCallback[tuple]):
    """Keeps what it is given, and reports when it is closed."""

    every: int = 1
    stop_at: int | None = None
    closed: list = eqx.field(default_factory=list)

    def init(self, problem, state, steps):
        return ()

    def __call__(self, problem, state, history, own):
        step = int(state.step)
        seen = (step, len(history), problem.distilled(state))
        return (*own, seen), step == self.stop_at

    def close(self, own):
        self.closed.append(len(own))


# One object each: JAX would recompile the step for a second one.
ADAM = optax.adam(0.05)
LBFGS = optax.lbfgs(learning_rate=1.0, linesearch=None)
SGD = optax.sgd(1.0)


@functools.cache  # One object for each learning rate, as above.
def exact(learning_rate: float = 0.1) -> eqd.ArgminSolver:
    """An inner solver that is exact to rounding.

    It has no line search: comparing values cannot tell points apart whose gradients are
    below the square root of the machine precision.
    """
    return eqd.ArgminSolver(
        solver=optx.OptaxMinimiser(
            optax.sgd(learning_rate, momentum=0.95), rtol=1e-13, atol=1e-13
        ),
        adjoint=optx.ImplicitAdjoint(eqd.adjoints.DampedCG(rtol=1e-12)),
        max_steps=100_000,
    )


def hypergradient(start, objective, dataset, *, state=None, step=0, key=None):
    """The loss of an objective on all of a dataset, and its gradient in `start`, by one
    compiled program. A model stands for `Bilevel` of it, as in `distill`; `dataset` may
    also be an `AbstractData`."""
    if not isinstance(objective, eqd.AbstractObjective):
        objective = eqd.Bilevel(objective)
    if isinstance(dataset, eqd.Dataset):
        dataset = eqd.FullBatch(dataset)
    key = jr.key(0) if key is None else key
    return _hypergradient(start, objective, dataset, state, jnp.asarray(step), key)


@eqx.filter_jit
def _hypergradient(start, objective, data, state, step, key):
    if state is None:
        state = objective.init(start.decode(), key=key)

    @eqx.filter_value_and_grad
    def loss(start):
        return objective(start.decode(), data, state, step=step, key=key)[0]

    return loss(start)


def check_gradient(start, objective, dataset, *, rtol=1e-6, **kwargs):
    """Checks the gradient in every array of `start` against central differences. Needs
    double precision, and compiles one program."""
    _, gradient = hypergradient(start, objective, dataset, **kwargs)
    leaves, structure = jax.tree.flatten(gradient)
    assert all(np.any(x) for x in leaves)
    rng = np.random.default_rng(0)
    for i, leaf in enumerate(leaves):
        # One array at a time, since their gradients differ in size.
        direction = rng.normal(size=leaf.shape)
        direction /= np.linalg.norm(direction)

        def loss_at(t, i=i, direction=direction):
            moves = [np.zeros_like(x) for x in leaves]
            moves[i] = t * direction
            moved = eqx.apply_updates(start, jax.tree.unflatten(structure, moves))
            return hypergradient(moved, objective, dataset, **kwargs)[0]

        slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
        wanted = np.vdot(leaf, direction)
        np.testing.assert_allclose(slope, wanted, rtol=rtol, atol=1e-9)


def bits(x):
    if eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jr.key_data(x)
    return np.asarray(x)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = bits(x), bits(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def evaluation(recipe, accuracies=(0.5, 0.7), key=None):
    """An evaluation that nobody has measured."""
    accuracies = np.array([accuracies])
    fitted = eqd.Fitted(None, jnp.array(True), jnp.array(0.0))
    key = jr.key(3) if key is None else key
    metrics = {"accuracy": accuracies, "loss": accuracies}
    return Evaluation(metrics, accuracies[..., None], recipe, fitted, key)


def small_noise(train: eqd.Dataset, n: int | None = None, *, l2=0.1, seed=0):
    """A start for logistic regression."""
    scale = 1 / math.prod(train.shape)
    return eqd.DistilledSet.from_noise(train, n, l2=l2, scale=scale, key=jr.key(seed))


def subset(data: eqd.Dataset, n: int) -> eqd.Dataset:
    return eqd.Dataset(data.images[:n], data.labels[:n], data.num_classes)
