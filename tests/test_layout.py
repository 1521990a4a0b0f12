"""The outer loop goes over the real data in another layout, to the same result."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd
from eqdistill._layout import RowLayout
from eqdistill._linear_layout import LinearLayout

from .conftest import MLP, subset


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
    result = eqd.distill(start, classifier, train, optimiser=optax.sgd(1.0), steps=1)
    loss, gradient = eqx.filter_value_and_grad(eqd.outer_loss)(start, classifier, train)
    np.testing.assert_allclose(result.history.loss[0], loss, rtol=1e-10)
    got = start.images - result.distilled.images
    np.testing.assert_allclose(got, gradient.images, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["bytes", "constant pixels"])
def test_mean_square(digits, kind):
    train = subset(digits[0], 101)
    if kind == "constant pixels":
        images = with_constants(train.images).astype(np.float32)
        train = eqd.Dataset(images, train.labels, 10)
    want = np.mean(np.sum(np.asarray(train.floating()) ** 2, axis=(1, 2)))
    for layout in (LinearLayout.of(train), RowLayout.of(train)):
        np.testing.assert_allclose(layout.mean_square, want, rtol=1e-5)


def test_loss_of_separated_data(digits):
    # Where it is a small difference of large logits.
    train = subset(digits[0], 101)
    classifier = eqd.LogisticRegression(64, 10)
    fitted = eqd.fit(
        eqd.DistilledSet(train.floating(), train.labels, l2=1e-6), classifier
    ).classifier
    large = eqx.tree_at(lambda c: c.weights, fitted, 1e3 * fitted.weights)
    loss = LinearLayout.of(train).value(large)
    assert 0 <= loss < 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(digits, dtype):
    images = digits[0].floating()[:101].astype(dtype)
    train = eqd.Dataset(images, digits[0].labels[:101], 10)
    if dtype == jnp.bfloat16:  # The other has too small a range to fit in.
        start = eqd.DistilledSet.from_real(train, key=jr.key(0))
        mlp = MLP(64, 5, jnp.tanh, key=jr.key(1))
        assert len(eqd.distill(start, mlp, train, steps=2).history) == 2
    want = np.mean(np.sum(np.asarray(images, np.float64) ** 2, axis=(1, 2)))
    got = LinearLayout.of(train).mean_square
    np.testing.assert_allclose(np.float64(got), want, rtol=1e-2)


@pytest.mark.usefixtures("x64")
def test_single_precision_beside_double(digits):
    train = subset(digits[0], 101)
    start = eqd.DistilledSet.from_noise(train, key=jr.key(0))
    images = start.images.astype(jnp.float32)
    for l2, dtype in ((np.float32(0.1), jnp.float32), (0.1, jnp.float64)):
        start = eqd.DistilledSet(images, start.labels, l2=l2)
        classifier = eqd.LogisticRegression(64, 10, use_intercept=True, dtype=dtype)
        history = eqd.distill(start, classifier, train, steps=2).history
        assert history.loss[1] < history.loss[0]
