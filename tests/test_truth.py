"""What a fit reports about itself: whether it is stationary, and whether it has
collapsed; and values that no array can hold."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd

from .conftest import MLP, subset


COLLAPSE = "the fit has collapsed.*ridge is too large.*`l2=1e-3` or less"


class GroupNormNet(eqx.Module):
    """Three blocks of a convolution, group normalisation, softplus and pooling."""

    layers: eqx.nn.Sequential

    def __init__(self, *, key):
        keys = jr.split(key, 4)
        layers, channels = [], 1
        for k in keys[:3]:
            layers += [
                eqx.nn.Conv2d(channels, 8, 3, padding=1, key=k),
                eqx.nn.GroupNorm(4, 8),
                eqx.nn.Lambda(jax.nn.softplus),
                eqx.nn.AvgPool2d(2, 2),
            ]
            channels = 8
        layers += [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(8, 10, key=keys[3])]
        self.layers = eqx.nn.Sequential(layers)

    def __call__(self, image):
        return self.layers(image[None])


@pytest.fixture(scope="module")
def real(digits):
    labels = np.asarray(digits[0].labels)
    first = [int(np.argmax(labels == k)) for k in range(10)]
    return digits[0].floating()[np.array(first)]


@pytest.mark.slow
def test_converged_means_stationary(real):
    # A Cauchy criterion holds for these networks at gradient norms around one.
    network = eqd.nn.fast_convolutions(GroupNormNet(key=jr.key(0)))
    inner = eqd.ArgminSolver(max_steps=600)
    for l2 in (1e-2, 1e-3, 1e-4):
        distilled = eqd.DistilledSet(real, jnp.arange(10), l2=l2)
        fitted = eqd.fit(distilled, network, inner, throw=False)
        loss = lambda model, distilled: eqd.inner_loss(distilled, model)
        gradient = eqx.filter_grad(loss)(fitted.model, distilled)
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
        np.testing.assert_allclose(fitted.gradient_norm, norm, rtol=1e-2, atol=1e-5)
        size = np.sqrt(
            sum(
                np.sum(np.square(x))
                for x in jax.tree.leaves(eqx.filter(fitted.model, eqx.is_array))
            )
        )
        assert not fitted.converged or norm <= 0.011 * l2 * size
        # The fit is useful all the same.
        assert not fitted.collapsed
        logits = jax.vmap(fitted.model)(real)
        assert (jnp.argmax(logits, axis=1) == jnp.arange(10)).all()


@pytest.mark.parametrize("l2", [0.1, 1e-3])
def test_smooth_networks_converge(real, l2):
    distilled = eqd.DistilledSet(real, jnp.arange(10), l2=l2)
    fitted = eqd.fit(distilled, MLP(64, 4, jax.nn.softplus, key=jr.key(1)))
    assert fitted.converged
    assert not fitted.collapsed
    assert 0 < fitted.gradient_norm < 1e-3


def test_a_collapse_is_reported_with_its_cause(digits):
    train = subset(digits[0], 300)
    network = MLP(64, 4, jax.nn.softplus, key=jr.key(1))
    weak = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 64, key=jr.key(0))
    fitted = eqd.fit(weak, network, throw=False)
    assert fitted.collapsed
    logits = jax.vmap(fitted.model)(weak.images)
    assert jnp.ptp(logits, axis=0).max() < 1e-4
    with pytest.raises(RuntimeError, match=COLLAPSE):
        eqd.fit(weak, network)


@pytest.mark.slow
def test_a_collapse_stops_a_distillation(digits):
    train = subset(digits[0], 300)
    network = MLP(64, 4, jax.nn.softplus, key=jr.key(1))
    weak = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 64, key=jr.key(0))
    with pytest.raises(eqd.DistillationError, match=COLLAPSE) as info:
        eqd.distill(weak, network, train, steps=2)
    result = info.value.distillation
    np.testing.assert_array_equal(result.distilled.images, weak.images)


@pytest.mark.parametrize("scale", [1 / 64, 1 / 784])
def test_a_weak_start_of_a_linear_model_is_no_collapse(digits, scale):
    start = eqd.DistilledSet.from_noise(digits[0], l2=0.1, scale=scale, key=jr.key(0))
    model = eqd.linear.LogisticRegression(64, 10)
    for inner in (eqd.linear.SpanSolver(), eqd.ArgminSolver()):
        fitted = eqd.fit(start, model, inner)
        assert fitted.converged
        assert not fitted.collapsed


def test_pixels_whose_squares_overflow(digits):
    start = eqd.DistilledSet.from_noise(digits[0], l2=0.1, scale=1e30, key=jr.key(0))
    model = eqd.linear.LogisticRegression(64, 10)
    for inner in (eqd.linear.SpanSolver(), eqd.ArgminSolver(max_steps=300)):
        fitted = eqd.fit(start, model, inner, throw=False)
        assert not fitted.converged
        with pytest.raises(RuntimeError, match="inner solver did not converge"):
            eqd.fit(start, model, inner)


def test_labels_that_do_not_fit():
    """In 32 bits, each of these would become another label."""
    images = np.ones((3, 2, 2), np.float32)
    with pytest.raises(ValueError, match="got 3 different labels from 0 to 10995"):
        eqd.Dataset(images, np.array([0, 1, 2**40]))
    with pytest.raises(ValueError, match="`num_classes` must be a number of 31 bits"):
        eqd.Dataset(images, np.array([0, 1, 2**40]), 2**41)
    with pytest.raises(ValueError, match="got 3 different labels from 1 to 3"):
        eqd.Dataset(images, np.array([1, 2, 3]))
    assert eqd.Dataset(images, np.array([1, 2, 3]), 4).num_classes == 4
    with pytest.raises(ValueError, match="`labels` must be class indices of 31 bits"):
        eqd.DistilledSet(images, np.array([0, 1, 2**32 + 1]), l2=0.1)


def test_pixels_that_do_not_fit():
    images = np.ones((3, 2, 2))
    images[0, 0, 0] = 1e300
    with pytest.raises(ValueError, match="`images` must be finite; 1 of 12"):
        eqd.Dataset(images, np.arange(3))


def test_features_of_any_size():
    """The squares of these overflow or underflow in single precision."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 3, 3)).astype(np.float32)
    outputs = []
    for scale in (1, 1e20, 1e-21):
        distilled = eqd.DistilledSet(
            scale * images, np.arange(4), l2=0.1, loss=eqd.SquaredError()
        )
        fitted = eqd.fit(
            distilled, eqd.linear.LogisticRegression(9, 4), eqd.linear.RelativeRidge()
        )
        outputs.append(jax.vmap(fitted.model)(distilled.images))
    for found in outputs[1:]:
        np.testing.assert_allclose(found, outputs[0], rtol=1e-4, atol=1e-6)


def test_cross_entropy_of_a_label_that_is_no_class():
    loss = jax.jit(jax.value_and_grad(eqd.CrossEntropy().__call__))
    for label in (-1, 3):
        value, gradient = loss(jnp.zeros((2, 3)), jnp.array([0, label]))
        assert jnp.isnan(value)
        assert jnp.isnan(gradient).any()


def test_probabilities_are_no_logits():
    with pytest.raises(ValueError, match=r"must be logits.*got probabilities"):
        eqd.DistilledSet(jnp.ones((2, 2, 2)), jnp.full((2, 4), 0.25), l2=0.1)
    targets = jnp.full((2, 4), 0.25)
    eqd.DistilledSet(jnp.ones((2, 2, 2)), targets, l2=0.1, loss=eqd.SquaredError())
