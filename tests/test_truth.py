"""What a fit reports about itself, and values that an array cannot hold."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import MLP, subset


COLLAPSE = "the fit has collapsed.*ridge is too large.*`l2=1e-3` or less"


@pytest.fixture(scope="module")
def real(digits):
    """One image of each digit."""
    first = np.unique(np.asarray(digits[0].labels), return_index=True)[1]
    return digits[0].floating()[first]


@pytest.mark.slow
def test_converged_means_stationary(real):
    settings = {"norm": None, "activation": jax.nn.softplus}
    network = eqd.nn.ConvNet((8, 8), 10, widths=(8, 8, 8), **settings, key=jr.key(0))
    inner = eqd.ArgminSolver(max_steps=600)
    for l2 in (1e-3, 1e-4):
        distilled = eqd.DistilledSet(real, jnp.arange(10), l2=l2)
        fitted = eqd.fit(distilled, network, inner, throw=False)
        loss = lambda model, distilled: eqd.inner_loss(distilled, model)
        norm = optax.tree.norm(eqx.filter_grad(loss)(fitted.model, distilled))
        np.testing.assert_allclose(fitted.gradient_norm, norm, rtol=1e-2, atol=1e-5)
        size = optax.tree.norm(eqx.filter(fitted.model, eqx.is_array))
        assert not fitted.converged or norm <= 0.011 * l2 * size
        # The fit is useful all the same.
        assert not fitted.collapsed
        logits = jax.vmap(fitted.model)(real)
        assert (jnp.argmax(logits, axis=1) == jnp.arange(10)).all()


def test_smooth_networks_converge(real):
    network = MLP(64, 4, jax.nn.softplus, key=jr.key(1))
    for l2 in (0.1, 1e-3):
        fitted = eqd.fit(eqd.DistilledSet(real, jnp.arange(10), l2=l2), network)
        assert fitted.converged
        assert not fitted.collapsed
        assert 0 < fitted.gradient_norm < 1e-3


@pytest.fixture
def weak(digits):
    return eqd.DistilledSet.from_noise(digits[0], l2=0.1, scale=1 / 64, key=jr.key(0))


def test_a_collapse_is_reported_with_its_cause(weak):
    network = MLP(64, 4, jax.nn.softplus, key=jr.key(1))
    fitted = eqd.fit(weak, network, throw=False)
    assert fitted.collapsed
    logits = jax.vmap(fitted.model)(weak.images)
    assert jnp.ptp(logits, axis=0).max() < 1e-4
    with pytest.raises(RuntimeError, match=COLLAPSE):
        eqd.fit(weak, network)


@pytest.mark.slow
def test_a_collapse_stops_a_distillation(weak, digits):
    network = MLP(64, 4, jax.nn.softplus, key=jr.key(1))
    with pytest.raises(eqd.DistillationError, match=COLLAPSE) as info:
        eqd.distill(weak, network, subset(digits[0], 300), steps=2)
    result = info.value.distillation
    np.testing.assert_array_equal(result.distilled.images, weak.images)


@pytest.mark.parametrize(
    "inner", [eqd.linear.SpanSolver(), eqd.ArgminSolver(max_steps=300)]
)
def test_linear_models_do_not_collapse(weak, inner):
    model = eqd.linear.LogisticRegression(64, 10)
    for scale in (1, 64 / 784):
        scaled = eqx.tree_at(lambda d: d.images, weak, scale * weak.images)
        fitted = eqd.fit(scaled, model, inner)
        assert fitted.converged
        assert not fitted.collapsed
    # The squares of the larger pixels overflow.
    for scale in (1e20, 6.4e31):
        huge = eqx.tree_at(lambda d: d.images, weak, scale * weak.images)
        assert not eqd.fit(huge, model, inner, throw=False).converged


def test_a_label_that_is_no_class():
    loss = jax.jit(jax.value_and_grad(eqd.CrossEntropy().__call__))
    for label in (-1, 3):
        value, gradient = loss(jnp.zeros((2, 3)), jnp.array([0, label]))
        assert jnp.isnan(value)
        assert jnp.isnan(gradient).any()


def test_values_that_do_not_fit():
    """In 32 bits, each of these would become another value."""
    images = np.ones((3, 2, 2))
    with pytest.raises(ValueError, match=r"`labels` must be below 2\^31"):
        eqd.DistilledSet(images, np.array([0, 1, 2**32 + 1]), l2=0.1)
    with pytest.raises(ValueError, match="got 3 different labels from 0 to 10995"):
        eqd.Dataset(images, np.array([0, 1, 2**40]))
    with pytest.raises(ValueError, match="`images` must be finite; 1 of 12"):
        eqd.Dataset(images * np.eye(12)[0].reshape(3, 2, 2) * 1e300, np.arange(3))
