"""Batches of real images: which are drawn, and how they are augmented."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd


KEY = jr.key(5)
LABELS = np.array([2, 0, 1, 1, 0, 2, 1, 1, 2, 1, 0, 1, 1, 2])
COUNTS = [3, 7, 4]
# The pixel of an image is its number.
NUMBERS = np.arange(14, dtype=np.float32)[:, None, None]


class Table(eqx.Module):
    """A model with logits of its own for each image, as it is and augmented."""

    logits: jax.Array

    def __call__(self, image):
        return self.logits[jnp.round(2 * image[0, 0]).astype(int)]


@eqx.filter_jit
def drawn(data, steps, key=KEY):
    """How often each image is drawn in each step, as it is and augmented: what is not
    drawn has no gradient."""
    table = Table(jnp.zeros((28, data.num_classes)))
    of_step = lambda step: jax.grad(lambda t: data.loss(t, step, key=key))(table).logits
    gradients = abs(jax.lax.map(of_step, jnp.arange(steps))).sum(2)
    counts = gradients / gradients.max(1, keepdims=True)
    return jnp.round(counts.reshape(-1, 14, 2))


def test_balanced_batches():
    data = eqd.BalancedBatches(eqd.Dataset(NUMBERS, LABELS), 2)
    found = np.asarray(drawn(data, 60))[..., 0]
    for class_, count in enumerate(COUNTS):
        mine = found[:, class_ == LABELS]
        np.testing.assert_array_equal(mine.sum(1), 2)
        # No image comes twice in an epoch, and each comes in some epoch.
        epochs = mine.reshape(-1, count // 2, count).sum(1)
        assert epochs.max() == 1
        assert epochs.sum(0).min() > 0
    assert not np.array_equal(drawn(data, 60, jr.key(6))[..., 0], found)
    np.testing.assert_array_equal(drawn(data, 60)[..., 0], found)


def test_classes_of_one_size_have_different_orders():
    data = eqd.BalancedBatches(eqd.Dataset(NUMBERS, np.arange(14) % 2), 1)
    found = np.asarray(drawn(data, 7))[..., 0]
    np.testing.assert_array_equal(found.sum(0), 1)
    assert not np.array_equal(found[:, ::2], found[:, 1::2])


class Half(eqd.AbstractAugmentation):
    """Adds a half to an image, or nothing."""

    def __call__(self, image, *, key):
        return image + 0.5 * jr.randint(key, (), 0, 2)


@pytest.mark.parametrize("kind", [eqd.Batches, eqd.BalancedBatches])
def test_augmented_batches(kind):
    size = 7 if kind is eqd.Batches else 3
    data = kind(eqd.Dataset(NUMBERS, LABELS), size, augmentation=Half())
    found = np.asarray(drawn(data, 8))
    np.testing.assert_array_equal(
        found.sum((1, 2)), size if kind is eqd.Batches else 3 * size
    )
    if kind is eqd.Batches:
        epochs = found.reshape(4, 2, 14, 2).sum((1, 3))
        np.testing.assert_array_equal(epochs, 1)
    # Each step is augmented in another way.
    augmented = found[..., 1].sum(0)
    assert 0 < augmented.sum() < found.sum()
    assert len(np.unique(found[..., 1], axis=0)) > 4


def test_bad_input():
    dataset = eqd.Dataset(NUMBERS, LABELS)
    for per_class in (0, 4):
        match = f"`per_class` must be from 1 to 3, .*of class 0.*; got {per_class}"
        with pytest.raises(ValueError, match=match):
            eqd.BalancedBatches(dataset, per_class)
    with pytest.raises(ValueError, match=r"to 0, .*of class 3 in `dataset`; got 1"):
        eqd.BalancedBatches(eqd.Dataset(NUMBERS, LABELS, 4), 1)
    with pytest.raises(ValueError, match="`key` must be given with `BalancedBatches`"):
        eqd.BalancedBatches(dataset, 1).loss(Table(jnp.zeros((28, 3))), 0, key=None)
