import equinox as eqx
import jax
import jax.random as jr
import optax
import optimistix as optx
import pytest

import eqdistill as eqd


def pytest_configure(config):
    # Most of what the tests do is to compile, and much of it several times over.
    folder = config.cache.mkdir("jax")
    jax.config.update("jax_compilation_cache_dir", str(folder))
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


def subset(data: eqd.Dataset, n: int) -> eqd.Dataset:
    return eqd.Dataset(data.images[:n], data.labels[:n], data.num_classes)
