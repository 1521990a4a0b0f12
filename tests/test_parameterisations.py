import equinox as eqx
import numpy as np
import pytest

import eqdistill as eqd


def make_set(shape, n=4):
    images = np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)
    return eqd.DistilledSet(images, np.arange(n) % 2, l2=0.1)


def test_packed():
    # Bilinear interpolation in one direction, written out.
    pixels = np.tile(np.float32([0, 4, 8]), (3, 1))[None]
    small = eqd.DistilledSet(pixels, np.array([0]), l2=0.1)
    large = eqd.Packed(small, (6, 6)).decode()
    wanted = np.tile([0, 1, 3, 5, 7, 8], (6, 1))
    np.testing.assert_allclose(large.images[0], wanted, atol=1e-6)

    distilled = make_set((3, 4, 8))
    packed = eqd.Packed.from_distilled(distilled)
    assert packed.small.images.shape == (4, 3, 2, 4)
    first = distilled.images[0, 0, :2, :2].mean()
    np.testing.assert_allclose(packed.small.images[0, 0, 0, 0], first, rtol=1e-6)
    assert packed.decode().images.shape == (4, 3, 4, 8)
    assert packed.nbytes == 4 * 4 * 3 * 2 * 4 + distilled.labels.nbytes


def test_with_targets():
    distilled = make_set((2, 2), n=3)
    with_targets = distilled.with_targets(4)
    targets = np.eye(4)[[0, 1, 0]] - 1 / 4
    np.testing.assert_allclose(with_targets.labels, targets)
    assert with_targets.labels.dtype == distilled.images.dtype
    assert isinstance(with_targets.loss, eqd.SquaredError)
    assert eqx.tree_equal(with_targets.images, distilled.images)
    assert eqx.tree_equal(with_targets.log_l2, distilled.log_l2)
    with pytest.raises(ValueError, match="`with_targets` needs class indices"):
        with_targets.with_targets(4)


def test_bad_shapes():
    for shape in ((6, 6, 3), (5,)):
        with pytest.raises(ValueError, match=r"\(channels, height, width\); got "):
            eqd.Packed.from_distilled(make_set(shape))
