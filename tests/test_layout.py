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
    "kind", ["constant pixels", "all constant", "network", "chunks", "bytes"]
)
def test_first_step_is_along_the_public_gradient(digits, mnist, kind):
    train = subset(digits[0], 101)
    if kind in ("chunks", "bytes"):  # More than one, the last of which is not full.
        train = subset(mnist[0], 7001)
        if kind == "chunks":
            train = eqd.Dataset(np.asarray(train.images) / 255.0, train.labels, 10)
    elif kind == "all constant":
        train = eqd.Dataset(np.full((101, 8, 8), 0.5), train.labels, 10)
    elif kind != "network":
        train = eqd.Dataset(with_constants(train.images), train.labels, 10)
    p = int(np.prod(train.shape))
    classifier = eqd.LogisticRegression(p, 10, use_intercept=p == 64)
    if kind == "network":
        classifier = MLP(p, 5, jnp.tanh, key=jr.key(1))
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=0.3, key=jr.key(0))
    result = eqd.distill(
        start, classifier, train, inner=OneStep(), optimiser=SGD, steps=1
    )
    loss, gradient = hypergradient(start, classifier, train, OneStep())
    np.testing.assert_allclose(result.history.loss[0], loss, rtol=1e-10)
    got = start.images - result.distilled.images
    np.testing.assert_allclose(got, gradient.images, rtol=1e-8, atol=1e-12)


def test_loss_of_separated_data(digits):
    # Where it is a small difference of large logits.
    train = subset(digits[0], 101)
    images, labels = train.floating(), train.labels
    classifier = eqd.LogisticRegression(64, 10)
    separates = eqd.DistilledSet(images, labels, l2=1e-6)
    head = eqd.fit(separates, classifier).classifier.head
    large = eqx.tree_at(lambda head: head.weight, head, 1e3 * head.weight)
    layout = LinearLayout(np.asarray(images).reshape(101, 64), np.asarray(labels))
    loss = layout.value(large)
    assert 0 <= loss < 1e-6


def test_half_precision(digits):
    images = digits[0].floating()[:101].astype(jnp.bfloat16)
    train = eqd.Dataset(images, digits[0].labels[:101], 10)
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0))
    mlp = MLP(64, 5, jnp.tanh, key=jr.key(1))
    history = eqd.distill(start, mlp, train, inner=OneStep(), steps=2).history
    assert history.loss[1] < history.loss[0]


@pytest.mark.usefixtures("x64")
def test_single_precision_beside_double(digits):
    train = subset(digits[0], 101)
    start = small_noise(train)
    images = start.images.astype(jnp.float32)
    for l2, dtype in ((np.float32(0.1), jnp.float32), (0.1, jnp.float64)):
        start = eqd.DistilledSet(images, start.labels, l2=l2)
        classifier = eqd.LogisticRegression(64, 10, use_intercept=True, dtype=dtype)
        history = eqd.distill(start, classifier, train, steps=2).history
        assert history.loss[1] < history.loss[0] - 0.01
