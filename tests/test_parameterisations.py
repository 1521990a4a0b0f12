"""Parameterisations: what is learned need not be the images themselves."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
import scipy.fft

import eqdistill as eqd

from .conftest import ADAM, OneStep


def images_of(shape, n=4):
    images = np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)
    return eqd.DistilledSet(images, np.arange(n) % 2, l2=0.1)


def test_packed():
    """Bilinear interpolation, written out in one direction."""
    column = np.array([0.0, 4.0, 8.0])
    pixels = np.tile(column, (3, 1))[None].astype(np.float32)
    small = eqd.DistilledSet(pixels, np.array([0]), l2=0.1)
    large = eqd.Packed(small, (6, 6)).decode()
    wanted = np.tile([0, 1, 3, 5, 7, 8], (6, 1))
    np.testing.assert_allclose(large.images[0], wanted, atol=1e-6)

    distilled = images_of((3, 4, 8))
    packed = eqd.Packed.from_distilled(distilled)
    assert packed.small.images.shape == (4, 3, 2, 4)
    first = distilled.images[0, 0, :2, :2].mean()
    np.testing.assert_allclose(packed.small.images[0, 0, 0, 0], first, rtol=1e-6)
    assert packed.decode().images.shape == (4, 3, 4, 8)
    assert packed.nbytes == 4 * 4 * 3 * 2 * 4 + distilled.labels.nbytes


@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 6)])
def test_frequencies_are_those_of_scipy(shape):
    distilled = images_of(shape)
    for size in (2, 5):
        found = eqd.Frequencies.from_distilled(distilled, size)
        assert found.coefficients.images.shape == (4, *shape[:-2], size, size)
        z = np.array(scipy.fft.dctn(distilled.images, axes=(-2, -1), norm="ortho"))
        z[..., size:, :] = z[..., size:] = 0
        wanted = scipy.fft.idctn(z, axes=(-2, -1), norm="ortho")
        np.testing.assert_allclose(found.decode().images, wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameterisation", "size"), [(eqd.Packed, 2), (eqd.Frequencies, 4)]
)
def test_is_learned_and_saved(digits, tmp_path, parameterisation, size):
    train, test = digits
    real = eqd.DistilledSet.from_real(train, 20, l2=1e-2, key=jr.key(0))
    start = parameterisation.from_distilled(real, size)
    model = eqd.LogisticRegression(64, 10)
    args = {"inner": OneStep(), "optimiser": ADAM, "learn": (True, False)}
    result = eqd.distill(start, model, train, **args, steps=20)
    assert result.history.loss[-1] < result.history.loss[0]
    assert result.distilled.images.shape == (20, 8, 8)
    eqd.plot.images(result.distilled)
    evaluation = eqd.evaluate(result.distilled, model, test, OneStep())
    path = tmp_path / "a.safetensors"
    eqd.save(path, result, model, evaluation, inner=OneStep())
    artifact = eqd.load(path)
    assert isinstance(artifact.start, type(result.start))
    assert artifact.start.nbytes == result.start.nbytes
    for name in ("distilled", "start"):
        pair = getattr(artifact, name), getattr(result, name)
        for x, y in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_array_equal(x, y)


def test_hostile_files(tmp_path):
    path = tmp_path / "a.safetensors"
    packed = eqd.Packed.from_distilled(images_of((4, 4)))
    eqd.save(path, packed, eqd.LogisticRegression(16, 2))
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)

    def change(value):
        new = metadata | {"parameterisation": json.dumps(value)}
        safetensors.numpy.save_file(tensors, path, new)

    for bad in ("Packed", {"type": "Packed"}, {"type": "eval", "shape": [4, 4]}):
        change(bad)
        with pytest.raises(ValueError, match="`parameterisation` must be null, or the"):
            eqd.load(path)
    change({"type": "Packed", "shape": [20000, 20000]})
    with pytest.raises(ValueError, match=r"its images would take .* bytes, where"):
        eqd.load(path)
    change({"type": "Packed", "shape": [4, 6]})
    with pytest.raises(ValueError, match=r"Cannot load .*by one number; got"):
        eqd.load(path)


def test_images_that_are_not_finite(tmp_path):
    """The coefficients are, and not what they decode to."""
    large = eqd.DistilledSet(jnp.full((2, 3, 3), 3e38), np.array([0, 1]), l2=0.1)
    start = eqd.Frequencies(large, (4, 4))
    with pytest.raises(ValueError, match="its images must be finite"):
        eqd.save(tmp_path / "a.safetensors", start, eqd.LogisticRegression(16, 2))


class Own(eqx.Module):
    """Of no type that a file knows."""

    half: eqd.DistilledSet

    def decode(self):
        return eqx.tree_at(lambda d: d.images, self.half, 2 * self.half.images)


@pytest.mark.slow
def test_of_others_the_images_are_saved(tmp_path):
    distilled = images_of((4, 4))
    result = eqd.distill(
        Own(distilled),
        eqd.LogisticRegression(16, 2),
        eqd.Dataset(distilled.images, distilled.labels),
        inner=OneStep(),
        optimiser=ADAM,
        learn=(True, False),
        steps=1,
    )
    path = tmp_path / "a.safetensors"
    eqd.save(path, result, eqd.LogisticRegression(16, 2))
    assert isinstance(eqd.load(path).start, eqd.DistilledSet)
    np.testing.assert_array_equal(
        eqd.load(path).distilled.images, 2 * result.start.half.images
    )


def test_bad_input():
    distilled = images_of((6, 4))
    for factor in (0, 3):
        with pytest.raises(ValueError, match=f"`factor` must divide.*got {factor}"):
            eqd.Packed.from_distilled(distilled, factor)
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"`size` must be from 1 to 4.*got {size}"):
            eqd.Frequencies.from_distilled(distilled, size)
    with pytest.raises(ValueError, match=r"`shape` must be.*got \(12, 12\) for \(6, 4"):
        eqd.Packed(distilled, (12, 12))
    with pytest.raises(ValueError, match=r"`coefficients` must have.*\(6, 4\)"):
        eqd.Frequencies(distilled, (8, 8))
    with pytest.raises(ValueError, match=r"the channels of an image.*\(3, 8, 8\)"):
        eqd.Frequencies(images_of((4, 4)), (3, 8, 8))
    with pytest.raises(ValueError, match=r"`shape` must be.*got \(\)"):
        eqd.Packed(distilled, ())
    with pytest.raises(ValueError, match=r"\(channels, height, width\); got \(6, 6, 3"):
        eqd.Packed.from_distilled(images_of((6, 6, 3)), 3)
    row = eqd.DistilledSet(jnp.ones((2, 5)), np.array([0, 1]), l2=0.1)
    with pytest.raises(ValueError, match="`distilled` must have images of shape"):
        eqd.Packed.from_distilled(row)
