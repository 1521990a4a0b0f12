"""Batches that grow to all of the real images."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import MLP


LBFGS = optax.lbfgs(learning_rate=1.0, linesearch=None)


def run(train, classifier, ratio=1.0, steps=14, seed=1, **kwargs):
    start = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.1, key=jr.key(0))
    kwargs = {"optimiser": eqd.whitened(LBFGS, train), **kwargs}
    result = eqd.distill(
        start,
        classifier,
        train,
        batch_size=eqd.GrowingBatch(1 / 8, ratio=ratio),
        key=jr.key(seed),
        steps=steps,
        **kwargs,
    )
    return start, result


def test_grows_once_and_reaches_what_all_of_the_data_reach(digits):
    train, _ = digits
    classifier = eqd.LogisticRegression(64, 10)
    start, result = run(train, classifier)
    sizes = result.history.num_images
    assert set(sizes) == {168, 1347}
    assert (np.diff(sizes) >= 0).all()
    loss = eqd.outer_loss(result.distilled, classifier, train)
    whole = eqd.distill(
        start, classifier, train, optimiser=eqd.whitened(LBFGS, train), steps=14
    )
    assert loss <= eqd.outer_loss(whole.distilled, classifier, train) + 0.02
    # Once on all of the images, the loss is theirs.
    np.testing.assert_allclose(
        eqd.distill(result.distilled, classifier, train, steps=1).history.loss[0],
        loss,
        rtol=1e-5,
    )
    # A smaller ratio grows earlier, a huge one never.
    _, early = run(train, classifier, ratio=0.1)
    assert sum(early.history.num_images == 168) < sum(sizes == 168)
    _, never = run(train, classifier, ratio=1e6)
    assert (never.history.num_images == 168).all()
    # And what it starts on is drawn by the key.
    _, other = run(train, classifier, seed=2)
    assert other.history.loss[0] != result.history.loss[0]


def test_noise_is_measured_by_the_two_halves(digits):
    # At a learning rate of zero all gradients are at the start. There the noise of a
    # sample of 168 is between a tenth of the gradient and ten times it, and the batch
    # is what it was.
    train, _ = digits
    classifier = eqd.LogisticRegression(64, 10)
    sizes = {
        ratio: run(train, classifier, ratio, steps=3, optimiser=optax.sgd(0.0))[
            1
        ].history.num_images
        for ratio in (1e-3, 1e3)
    }
    np.testing.assert_array_equal(sizes[1e-3], [168, 1347, 1347])
    np.testing.assert_array_equal(sizes[1e3], [168, 168, 168])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("is_linear", [True, False])
def test_any_classifier_and_the_last_of_the_images(digits, is_linear):
    train, _ = digits
    if is_linear:
        # Over a background, with which images that only fill up would be seen.
        images = train.floating() + jnp.linspace(0, 1, 64).reshape(8, 8)
        train = eqd.Dataset(images, train.labels, 10)
        classifier = eqd.LogisticRegression(64, 10, use_intercept=True)
    else:
        classifier = MLP(64, 4, jax.nn.softplus, key=jr.key(1))
    start, result = run(
        train, classifier, ratio=1e-6, steps=2, optimiser=optax.sgd(0.0)
    )
    np.testing.assert_array_equal(result.history.num_images, [168, 1347])
    # The two halves and the others are all of them, each once.
    loss, gradient = eqx.filter_value_and_grad(eqd.outer_loss)(start, classifier, train)
    np.testing.assert_allclose(result.history.loss[1], loss, rtol=1e-5)
    norm = jnp.linalg.norm(gradient.images)
    np.testing.assert_allclose(result.history.gradient_norm[1], norm, rtol=1e-6)
    assert jnp.array_equal(result.distilled.images, start.images)


def test_grows_under_a_line_search(digits):
    # Which keeps gradients, but not the noise in them.
    train, _ = digits
    args = (train, eqd.LogisticRegression(64, 10))
    _, result = run(*args, ratio=0.5, optimiser=optax.lbfgs())
    assert set(result.history.num_images) == {168, 1347}
    assert result.history.num_images[1] == 168


def test_tolerance_is_for_all_of_the_images(digits):
    train, _ = digits
    _, result = run(train, eqd.LogisticRegression(64, 10), tolerance=0.5, ratio=1e-3)
    assert result.converged
    assert result.history.num_images[-1] == 1347


def test_bad_input(digits):
    with pytest.raises(ValueError, match=r"`fraction` must be between 0 and 1; got 1"):
        eqd.GrowingBatch(1.0)
    with pytest.raises(ValueError, match=r"`ratio` must be positive; got 0"):
        eqd.GrowingBatch(ratio=0.0)
    start = eqd.DistilledSet.from_noise(digits[0], key=jr.key(0))
    args = (start, eqd.LogisticRegression(64, 10), digits[0])
    with pytest.raises(ValueError, match="`key` must be given with `batch_size`"):
        eqd.distill(*args, batch_size=eqd.GrowingBatch())
    with pytest.raises(ValueError, match=r"`batch_size.fraction` must.*of 1347"):
        eqd.distill(*args, batch_size=eqd.GrowingBatch(1e-4), key=jr.key(0))
