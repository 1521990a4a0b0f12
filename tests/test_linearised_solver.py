"""Networks that are linearised in their parameters, and many of them side by side."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import sklearn.linear_model

import eqdistill as eqd
from eqdistill import nn

from .conftest import hypergradient, subset


KEY = jr.key(0)
SMOOTH = functools.partial(
    nn.ConvNet, widths=(4,), norm=None, activation=jax.nn.softplus
)


def start_of(train, n=10, l2=1e-2):
    real = eqd.DistilledSet.from_real(train, n, l2=l2, key=KEY)
    return eqd.DistilledSet(real.images, real.labels, l2=l2, loss=eqd.SquaredError())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_of_a_linear_model_it_is_that_of_scikit_learn(digits):
    """From any start: the ridge is taken over the move."""
    start = start_of(digits[0])
    images = np.asarray(start.images, np.float64).reshape(10, -1)
    weight = np.random.default_rng(0).normal(size=(10, 64))
    head = eqd.LogisticRegression(64, 10)
    model = eqx.tree_at(lambda c: c.head.weight, head, jnp.asarray(weight))
    fitted = eqd.fit(start, model, eqd.LinearisedSolver())
    targets = np.eye(10)[np.asarray(start.labels)] - 0.1
    # The trace of the kernel is ten times that of one class.
    alpha = 10 * float(start.l2) * np.sum(images**2) / 100
    ridge = sklearn.linear_model.Ridge(alpha=alpha, fit_intercept=False)
    ridge.fit(images, targets - images @ weight.T)
    wanted = images @ (weight + ridge.coef_).T
    outputs = jax.vmap(fitted.model)(start.images.astype(jnp.float64))
    np.testing.assert_allclose(outputs, wanted, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_it_is_the_argmin(digits):
    """Of the inner loss of the linearised network, with the ridge scaled."""
    start = start_of(digits[0], n=4)
    start = jax.tree.map(
        lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, start
    )
    network = SMOOTH((8, 8), 10, key=KEY)
    fitted = eqd.fit(start, network, eqd.LinearisedSolver())
    params, static = eqx.partition(network, eqd.parameters(network))
    outputs = lambda params: jax.vmap(eqx.combine(params, static))(start.images)
    jacobian = jax.tree.leaves(jax.jacfwd(outputs)(params))
    trace = sum(np.sum(np.asarray(x) ** 2) for x in jacobian)
    scaled = eqx.tree_at(
        lambda d: d.log_l2, start, start.log_l2 + jnp.log(trace / (4**2 * 10))
    )
    loss = lambda model: eqd.inner_loss(scaled, model)
    gradient = eqx.filter_grad(loss)(fitted.model).tangent
    for x in jax.tree.leaves(gradient):
        np.testing.assert_allclose(x, 0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_random_features(digits):
    train = subset(digits[0], 100)
    start = start_of(train)
    solver = eqd.RandomFeatures(SMOOTH, num_classes=10, num_networks=3)
    run = lambda at: hypergradient(at, None, train, solver, key=KEY)
    _, gradient = run(start)
    fitted = eqd.fit(start, None, solver, key=KEY)
    assert fitted.model.head.in_features == 3 * 64
    rng = np.random.default_rng(0)
    move = jax.tree.map(lambda x: rng.normal(size=x.shape), gradient)
    at = lambda t: run(eqx.apply_updates(start, jax.tree.map(lambda x: t * x, move)))
    slope = (at(1e-5)[0] - at(-1e-5)[0]) / 2e-5
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(move), strict=True)
    np.testing.assert_allclose(slope, sum(np.vdot(x, y) for x, y in pairs), rtol=1e-6)


@pytest.mark.slow
def test_dropout_is_off(digits):
    start = start_of(digits[0])
    network = SMOOTH((8, 8), 10, key=KEY)
    layers = eqx.nn.Sequential([eqx.nn.Dropout(0.5), *network.layers])
    dropped = nn.Network(layers, network.architecture, network.settings)
    outputs = [
        jax.vmap(eqd.fit(start, x, eqd.LinearisedSolver()).model)(start.images)
        for x in (network, dropped)
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_bad_input(digits):
    start = start_of(digits[0])
    with pytest.raises(ValueError, match="`num_networks` must be at least 1; got 0"):
        eqd.RandomFeatures(SMOOTH, num_classes=10, num_networks=0)
    with pytest.raises(ValueError, match="`key` must be given with `RandomFeatures`"):
        eqd.fit(start, None, eqd.RandomFeatures(SMOOTH, num_classes=10))
    soft = eqd.DistilledSet.from_real(digits[0], 10, l2=0.1, key=KEY)
    linear = eqd.LogisticRegression(64, 10)
    with pytest.raises(
        TypeError, match=r"`SquaredError`.*`LinearisedSolver` minimises"
    ):
        eqd.fit(soft, linear, eqd.LinearisedSolver())
