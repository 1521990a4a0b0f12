"""The outer loss and the hypergradient, in double precision, against JAXopt's implicit
differentiation and against central differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd

from .conftest import check_gradient, exact, hypergradient, MLP, small_noise, subset


pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_notebook_agrees_with_jaxopt(mnist):
    from jaxopt import GradientDescent, objective

    train = subset(mnist[0], 500)
    model = eqd.linear.LogisticRegression(784, 10)
    distilled = small_noise(train)
    x, y = train.floating().reshape(500, 784), train.labels
    inner = GradientDescent(objective.l2_multiclass_logreg, tol=1e-8, maxiter=100_000)

    @jax.jit
    @jax.value_and_grad
    def jaxopt_loss(images):
        synthetic = (images.reshape(10, 784), distilled.labels)
        weights = inner.run(jnp.ones((784, 10)), 0.1, synthetic).params
        return objective.l2_multiclass_logreg(weights, 0.0, (x, y))

    # At the start, and where the fit is far from zero.
    for scale in (1, 300):
        at = eqx.tree_at(lambda d: d.images, distilled, scale * distilled.images)
        wanted, wanted_gradient = jaxopt_loss(at.images)
        found, gradient = hypergradient(at, model, train)
        assert abs(found - wanted) <= 1e-5 * abs(wanted)
        error = jnp.linalg.norm(gradient.images - wanted_gradient)
        assert error <= 1e-5 * jnp.linalg.norm(wanted_gradient)


@pytest.mark.slow
def test_mlp_agrees_with_central_differences(digits):
    train = subset(digits[0], 100)
    model = MLP(64, 8, jax.nn.softplus, key=jr.key(1))
    distilled = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.3, key=jr.key(0))
    check_gradient(distilled, eqd.Bilevel(model, exact()), train, rtol=1e-5)


@pytest.mark.slow
def test_many_fits_at_once(digits):
    # With this number of unknowns, the linear solver depends on the condition number.
    images = jnp.asarray(digits[0].images[:14]) / 255.0
    labels, model = digits[0].labels[:14], eqd.linear.LogisticRegression(64, 10)
    fit = lambda l2: eqd.fit(eqd.DistilledSet(images, labels, l2=l2), model)
    fits = eqx.filter_jit(eqx.filter_vmap(fit))
    alone = fits(jnp.array([0.3, 0.3])).model.head.weight[1]
    for l2s in ([0.3, 0.01], [0.3, 1e-9]):
        fitted = fits(jnp.array(l2s))
        assert fitted.converged.all()
        assert fitted.gradient_norm.max() < 1e-12
        together = fitted.model.head.weight[0]
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-9)
