"""`LinearisedSolver` against scikit-learn, its inner loss and central differences."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd
from eqdistill import nn
from eqdistill.linear import LinearisedSolver

from .conftest import check_gradient, subset


KEY = jr.key(0)
SMOOTH = functools.partial(
    nn.ConvNet, (8, 8), 10, widths=(4,), norm=None, activation=jax.nn.softplus
)


def start_of(train, n=10, l2=1e-2):
    real = eqd.DistilledSet.from_real(train, n, l2=l2, key=KEY)
    dtype = jnp.result_type(float)
    images = real.images.astype(dtype)
    return eqd.DistilledSet(images, real.labels, l2=l2, loss=eqd.SquaredError())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_is_the_argmin_of_the_inner_loss(digits):
    start, network = start_of(digits[0], n=4), SMOOTH(key=KEY)
    fitted = eqd.fit(start, network, LinearisedSolver())
    params, static = eqx.partition(network, nn.parameters(network))
    outputs = lambda params: jax.vmap(eqx.combine(params, static))(start.images)
    jacobian = jax.tree.leaves(jax.jacfwd(outputs)(params))
    trace = sum(np.sum(np.asarray(x) ** 2) for x in jacobian)
    # The ridge is relative to the kernel.
    log_l2 = start.log_l2 + jnp.log(trace / (4**2 * 10))
    scaled = eqx.tree_at(lambda d: d.log_l2, start, log_l2)
    loss = lambda model: eqd.inner_loss(scaled, model)
    for x in eqx.filter_grad(loss)(fitted.model).tangent:
        np.testing.assert_allclose(x, 0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivative_agrees_with_central_differences(digits):
    start, network = start_of(digits[0], n=4), SMOOTH(key=KEY)
    objective = eqd.Bilevel(network, LinearisedSolver())
    check_gradient(start, objective, subset(digits[0], 30))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivative_for_random_features_agrees_with_central_differences(digits):
    objective = eqd.Bilevel(eqd.RandomFeatures(SMOOTH, num_networks=3))
    check_gradient(start_of(digits[0]), objective, subset(digits[0], 30))


@pytest.mark.slow
def test_dropout_is_off(digits):
    start, network = start_of(digits[0]), SMOOTH(key=KEY).layers
    outputs = [
        jax.vmap(eqd.fit(start, x, LinearisedSolver()).model)(start.images)
        for x in (network, eqx.nn.Sequential([eqx.nn.Dropout(0.5), *network]))
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
