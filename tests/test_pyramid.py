import equinox as eqx
import numpy as np
import pytest

import eqdistill as eqd

from .conftest import assert_same_bits, check_gradient


def make_set(shape, n=4, dtype=np.float32):
    images = np.random.default_rng(0).normal(size=(n, *shape)).astype(dtype)
    return eqd.DistilledSet(images, np.arange(n) % 2, l2=0.1)


@pytest.mark.parametrize("shape", [(4, 2, 7), (3, 5, 6)])
def test_all_levels_reconstruct_the_images(shape):
    distilled = make_set(shape)
    pyramid = eqd.Pyramid.from_distilled(distilled)
    decoded = pyramid.decode()
    np.testing.assert_allclose(decoded.images, distilled.images, atol=1e-5)
    assert_same_bits(decoded.labels, distilled.labels)
    assert decoded.images.dtype == distilled.images.dtype
    with pytest.raises(ValueError, match="`refined` needs a pyramid without its fin"):
        pyramid.refined()


def test_levels_are_summed():
    """Against bilinear interpolation written out."""
    rows = np.array([[1.0, 0, 4, 4, 8, *np.arange(16)]], np.float32)
    levels = eqd.DistilledSet(rows, [0], l2=0.1)
    to_large = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    wanted = 1 + to_large @ np.array([[0, 4], [4, 8]]) @ to_large.T
    three = eqd.Pyramid(levels, (4, 4))
    fine = np.arange(16).reshape(4, 4)
    np.testing.assert_allclose(three.decode().images[0], wanted + fine, atol=1e-5)
    assert three.nbytes == 21 * 4 + levels.labels.nbytes
    two = eqd.Pyramid(eqx.tree_at(lambda d: d.images, levels, rows[:, :5]), (4, 4))
    np.testing.assert_allclose(two.decode().images[0], wanted, atol=1e-5)
    finer = two.refined()
    assert finer.levels.images.shape == (1, 21)
    assert_same_bits(finer.decode(), two.decode())


def test_few_levels_are_the_first_of_all():
    distilled = make_set((3, 8, 8))
    one = eqd.Pyramid.from_distilled(distilled, 1)
    assert one.levels.images.shape == (4, 3)
    assert np.ptp(one.decode().images, axis=(2, 3)).max() < 1e-6
    whole = eqd.Pyramid.from_distilled(distilled)
    np.testing.assert_allclose(whole.levels.images[:, :3], one.levels.images)


def test_colours_are_decorrelated():
    """Independent numbers give images with the covariance of the source's matrix."""
    root = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
    rows = np.random.default_rng(0).normal(size=(20_000, 3)).astype(np.float32)
    levels = eqd.DistilledSet(rows, np.arange(20_000) % 2, l2=0.1)
    images = np.asarray(eqd.Pyramid(levels, (3, 2, 2)).decode().images)
    wanted = root @ root.T / (root**2).sum(axis=0).max()
    np.testing.assert_allclose(np.cov(images[:, :, 0, 0].T), wanted, atol=0.02)


def test_gradient(x64):
    train = eqd.Dataset(make_set((3, 4, 4), 12, float).images, np.arange(12) % 2)
    start = eqd.Pyramid.from_distilled(make_set((3, 4, 4), 3, float))
    start = eqx.tree_at(lambda p: p.levels, start, start.levels.with_targets(2))
    check_gradient(start, eqd.linear.LogisticRegression(48, 2), train)


@pytest.mark.slow
def test_levels_are_learned_and_saved(tmp_path):
    start = eqd.Pyramid.from_distilled(make_set((4, 4)), 2).refined()
    data = eqd.Dataset(make_set((4, 4), 20).images, np.arange(20) % 2)
    model = eqd.linear.LogisticRegression(16, 2)
    result = eqd.distill(start, model, data, learn=lambda p: p.levels.images, steps=3)
    assert result.history.loss[-1] < result.history.loss[0]
    path = tmp_path / "a.safetensors"
    eqd.save(path, result)
    artifact = eqd.load(path)
    assert artifact.learned == ("levels.images",)
    assert_same_bits(artifact.start, result.start)
    assert_same_bits(artifact.distilled, result.distilled)


@pytest.mark.slow
def test_coarse_levels_of_large_images_are_saved(tmp_path):
    start = eqd.Pyramid.from_distilled(make_set((224, 224)), 1)
    eqd.save(tmp_path / "a.safetensors", start)
    assert_same_bits(eqd.load(tmp_path / "a.safetensors").start, start)


def test_bad_shapes():
    for shape in ((6, 6, 3), (5,)):
        with pytest.raises(ValueError, match=r"\(channels, height, width\); got "):
            eqd.Pyramid.from_distilled(make_set(shape))
    match = r"`levels` must have rows of 1, 5, 21, 46 numbers, .* got shape \(22,\)"
    with pytest.raises(ValueError, match=match):
        eqd.Pyramid(make_set((22,)), (5, 5))
