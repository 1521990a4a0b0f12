"""The outer loss and the hypergradient, in double precision, against JAXopt's implicit
differentiation and against central differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

import eqdistill as eqd

from .conftest import exact, MLP, subset


pytestmark = pytest.mark.usefixtures("x64")


def notebook(mnist):
    train = subset(mnist[0], 500)
    classifier = eqd.LogisticRegression(784, 10)
    distilled = eqd.DistilledSet.from_noise(train, l2=0.1, key=jr.key(0))
    return distilled, classifier, train


def loss_of_images(distilled, classifier, data):
    @jax.jit
    def loss(images):
        with_images = eqx.tree_at(lambda d: d.images, distilled, images)
        return eqd.outer_loss(with_images, classifier, data, exact())

    return loss


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_notebook_agrees_with_jaxopt(mnist):
    from jaxopt import GradientDescent, objective

    distilled, classifier, train = notebook(mnist)
    x, y = train.floating().reshape(500, 784), train.labels
    inner = GradientDescent(objective.l2_multiclass_logreg, tol=1e-8, maxiter=100_000)

    @jax.jit
    @jax.value_and_grad
    def jaxopt_loss(images):
        synthetic = (images.reshape(10, 784), distilled.labels)
        weights = inner.run(jnp.ones((784, 10)), 0.1, synthetic).params
        return objective.l2_multiclass_logreg(weights, 0.0, (x, y))

    # At the start, and where the fit is no longer close to zero.
    for scale in (1, 300):
        at = eqx.tree_at(lambda d: d.images, distilled, scale * distilled.images)
        want, want_grad = jaxopt_loss(at.images)
        loss = loss_of_images(at, classifier, train)
        got, got_grad = jax.value_and_grad(loss)(at.images)
        assert abs(got - want) <= 1e-5 * abs(want)
        error = jnp.linalg.norm(got_grad - want_grad)
        assert error <= 1e-5 * jnp.linalg.norm(want_grad)


def test_notebook_agrees_with_central_differences(mnist):
    distilled, classifier, train = notebook(mnist)
    images = 300 * distilled.images
    loss = loss_of_images(distilled, classifier, train)
    check_grads(
        loss, (images,), 1, modes=("fwd", "rev"), rtol=1e-6, atol=1e-9, eps=1e-4
    )


def test_mlp_agrees_with_central_differences(digits):
    train = subset(digits[0], 200)
    classifier = MLP(64, 16, jax.nn.softplus, key=jr.key(1))
    distilled = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.3, key=jr.key(0))
    loss = loss_of_images(distilled, classifier, train)
    check_grads(
        loss, (distilled.images,), 1, modes=("rev",), rtol=1e-5, atol=1e-8, eps=1e-5
    )


def test_composes_with_jit_and_vmap(digits):
    train = subset(digits[0], 100)
    classifier = eqd.LogisticRegression(64, 10)
    keys = jr.split(jr.key(0), 3)
    inner = exact()

    def start(key):
        return eqd.DistilledSet.from_noise(train, scale=0.3, key=key)

    @eqx.filter_jit
    def value_and_grad(distilled):
        loss = lambda d: eqd.outer_loss(d, classifier, train, inner)
        return eqx.filter_value_and_grad(loss)(distilled)

    many = jax.vmap(start)(keys)
    losses, grads = eqx.filter_vmap(value_and_grad)(many)
    fits = eqx.filter_vmap(lambda d: eqd.fit(d, classifier, inner))(many)
    for i, key in enumerate(keys):
        loss, grad = value_and_grad(start(key))
        np.testing.assert_allclose(losses[i], loss, rtol=1e-9)
        np.testing.assert_allclose(grads.images[i], grad.images, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(
            fits.classifier.weights[i],
            eqd.fit(start(key), classifier, inner).classifier.weights,
            atol=1e-9,
        )
