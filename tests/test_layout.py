"""The outer loop goes over the real data in another layout, to the same result."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd
from eqdistill._outer._linear_layout import LinearLayout

from .conftest import hypergradient, MLP, OneStep, SGD, small_noise, subset


def with_constants(images):
    images = np.asarray(images, np.float64) / 16
    images[:, 0, :3] = 0.5
    return images


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "kind",
    [
        "constant pixels",
        "all constant",
        pytest.param("network", marks=pytest.mark.slow),
        "bytes",
    ],
)
def test_first_step_is_along_the_public_gradient(digits, mnist, kind):
    train = subset(digits[0], 101)
    if kind == "bytes":  # In several chunks, the last of which is not full.
        train = subset(mnist[0], 7001)
    elif kind == "all constant":
        train = eqd.Dataset(np.full((101, 8, 8), 0.5), train.labels, 10)
    elif kind != "network":
        train = eqd.Dataset(with_constants(train.images), train.labels, 10)
    p = int(np.prod(train.shape))
    model = eqd.LogisticRegression(p, 10, use_intercept=p == 64)
    if kind == "network":
        model = MLP(p, 5, jnp.tanh, key=jr.key(1))
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=0.3, key=jr.key(0))
    result = eqd.distill(
        start, model, train, inner=OneStep(), optimiser=SGD, steps=1
    )
    loss, gradient = hypergradient(start, model, train, OneStep())
    np.testing.assert_allclose(result.history.loss[0], loss, rtol=1e-10)
    got = start.images - result.distilled.images
    np.testing.assert_allclose(got, gradient.images, rtol=1e-8, atol=1e-12)


def test_loss_of_separated_data(digits):
    # Where it is a small difference of large logits.
    images = np.asarray(digits[0].floating()[:101]).reshape(101, 64)
    weight = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    logits = images @ weight.T
    labels = np.argmax(logits, axis=1)
    margins = np.diff(np.sort(logits, axis=1)[:, -2:])
    head = eqx.tree_at(
        lambda head: head.weight,
        eqd.LogisticRegression(64, 10).head,
        jnp.asarray(100 * weight / margins.min()),
    )
    loss = LinearLayout(images, labels).value(head)
    assert 0 <= loss < 1e-6


@pytest.mark.slow
def test_half_precision(digits):
    images = digits[0].floating()[:101].astype(jnp.bfloat16)
    train = eqd.Dataset(images, digits[0].labels[:101], 10)
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0))
    mlp = MLP(64, 5, jnp.tanh, key=jr.key(1))
    history = eqd.distill(start, mlp, train, inner=OneStep(), steps=2).history
    assert history.loss[1] < history.loss[0]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_single_precision_beside_double(digits):
    train = subset(digits[0], 101)
    images = np.asarray(small_noise(train).images, np.float32)
    start = eqd.DistilledSet(images, np.arange(10), l2=0.1)
    model = eqd.LogisticRegression(64, 10, use_intercept=True)
    result = eqd.distill(start, model, train, steps=2)
    assert result.history.loss[1] < result.history.loss[0] - 0.01
    assert result.distilled.images.dtype == jnp.float32
