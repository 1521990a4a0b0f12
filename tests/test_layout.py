"""The outer loop goes over the real data in another layout, to the same result."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import MLP, subset


def with_constants(images):
    images = np.asarray(images, np.float64) / 16
    images[:, 0, :3] = 0.5
    return images


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "kind", ["constant pixels", "all constant", "network", "chunks"]
)
def test_first_step_is_along_the_public_gradient(digits, mnist, kind):
    train = subset(digits[0], 101)
    if kind == "chunks":  # More than one, the last of which is not full.
        train = subset(mnist[0], 3001)
        train = eqd.Dataset(np.asarray(train.images) / 255.0, train.labels, 10)
    elif kind == "all constant":
        train = eqd.Dataset(np.full((101, 8, 8), 0.5), train.labels, 10)
    elif kind != "network":
        train = eqd.Dataset(with_constants(train.images), train.labels, 10)
    p = int(np.prod(train.shape))
    classifier = eqd.LogisticRegression(p, 10, use_intercept=kind != "chunks")
    if kind == "network":
        classifier = MLP(p, 5, jnp.tanh, key=jr.key(1))
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=0.3, key=jr.key(0))
    result = eqd.distill(start, classifier, train, optimiser=optax.sgd(1.0), steps=1)
    loss, gradient = eqx.filter_value_and_grad(eqd.outer_loss)(start, classifier, train)
    np.testing.assert_allclose(result.history.loss[0], loss, rtol=1e-10)
    got = start.images - result.distilled.images
    np.testing.assert_allclose(got, gradient.images, rtol=1e-8, atol=1e-12)
