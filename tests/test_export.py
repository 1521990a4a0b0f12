"""Exports are read by NumPy, Pillow and loaders of folders."""

import functools
import sys

import numpy as np
import pytest
from PIL import Image

import eqdistill as eqd
from eqdistill import nn, recipes
from eqdistill.datasets import Standardisation, ZCA

from .conftest import evaluation


RNG = np.random.default_rng(0)


def grey(n=4, labels=None, **kwargs):
    images = RNG.normal(size=(n, 5, 4)).astype(np.float32)
    labels = np.arange(n) if labels is None else labels
    return eqd.DistilledSet(images, labels, l2=0.03, **kwargs)


def read(folder):
    with np.load(folder / "distilled.npz", allow_pickle=False) as file:
        return dict(file)


def recover(folder, mode="L"):
    """The values of all pictures, and the text of the first one."""
    paths = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    images = [Image.open(path) for path in paths]
    assert {image.mode for image in images} == {mode}
    low, high = (float(images[0].info[name]) for name in ("low", "high"))
    levels = np.stack([np.asarray(image) for image in images])
    return low + (high - low) * (levels / 255), low, high


@pytest.mark.parametrize(
    ("shape", "mode", "scale"),
    [
        ((5, 4), "L", 1e-4),
        ((1, 5, 4), "L", 1e3),
        ((3, 5, 4), "RGB", 1.0),
        ((5, 4, 3), "RGB", 1.0),
    ],
)
def test_pixels_are_recovered(tmp_path, shape, mode, scale):
    images = scale * RNG.normal(size=(11, *shape)).astype(np.float32)
    folder = tmp_path / "new" / "folder"
    eqd.export(folder, eqd.DistilledSet(images, np.arange(11), l2=0.03))
    pictures, low, high = recover(folder, mode)
    assert (low, high) == (images.min(), images.max())
    wanted = np.moveaxis(images, 1, 3) if shape == (3, 5, 4) else images
    error = np.abs(pictures - wanted.reshape(pictures.shape)).max()
    assert error <= 0.5001 * (high - low) / 255
    exported = read(folder)
    np.testing.assert_array_equal(exported["images"], images)
    np.testing.assert_allclose(exported["l2"], 0.03, rtol=1e-6)
    assert (exported["low"], exported["high"]) == (low, high)
    names = [*(f"{y:02}" for y in range(11)), "README.txt", "distilled.npz"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_images_in_the_range_of_real_ones_keep_it(tmp_path):
    pixels = RNG.integers(1, 255, size=(6, 5, 4, 3), dtype=np.uint8)
    labels = np.array([2, 0, 1, 2, 0, 1])
    images = np.moveaxis(pixels, 3, 1) / np.float32(255)
    names = ("ant", "bee", "cat")
    named = eqd.DistilledSet(images, labels, l2=0.1, class_names=names)
    eqd.export(tmp_path, named)
    got = eqd.datasets.from_folder(tmp_path)
    assert got.class_names == names
    order = np.argsort(labels, kind="stable")
    np.testing.assert_array_equal(got.labels, labels[order])
    np.testing.assert_array_equal(got.images, np.moveaxis(pixels, 3, 1)[order])
    exported = read(tmp_path)
    np.testing.assert_array_equal(exported["targets"], np.eye(3)[labels])
    assert tuple(exported["class_names"]) == names


@pytest.mark.parametrize("kind", [Standardisation, ZCA])
def test_preprocessing_is_undone(tmp_path, kind):
    pixels = RNG.integers(256, size=(60, 5, 4), dtype=np.uint8)
    real = eqd.Dataset(pixels, np.arange(60) % 3)
    preprocessing = kind.fit(real)
    images = real.map(preprocessing).images[:3]
    path = tmp_path / "a.safetensors"
    distilled = eqd.DistilledSet(images, np.arange(3), l2=0.1)
    eqd.save(path, distilled, preprocessing=preprocessing)
    eqd.export(tmp_path / "out", eqd.load(path))
    pictures, low, high = recover(tmp_path / "out")
    assert (low, high) == (0, 1)
    np.testing.assert_allclose(255 * pictures, pixels[:3], atol=1e-4)
    exported = read(tmp_path / "out")
    # The documented way back to the learned images.
    units = pictures - exported["mean"]
    if kind is ZCA:
        units = (units.reshape(3, -1) @ exported["whitening"].T).reshape(3, 5, 4)
    else:
        units = units / exported["deviation"]
    np.testing.assert_allclose(units, exported["images"], atol=1e-4)
    words = " ".join((tmp_path / "out" / "README.txt").read_text().split())
    way = "whitening @ (x - mean)" if kind is ZCA else "x = mean + deviation * z"
    assert way in words


def test_labels_and_losses(tmp_path):
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], np.float32)
    zeros = np.zeros((2, 3, 3), np.float32)
    soft = eqd.DistilledSet(zeros, np.log(p), l2=0.1, loss=eqd.CrossEntropy(0.5))
    eqd.export(tmp_path / "soft", soft)
    assert not recover(tmp_path / "soft")[0].any()
    exported = read(tmp_path / "soft")
    np.testing.assert_allclose(exported["targets"], p, rtol=1e-6)
    np.testing.assert_allclose(exported["temperature"], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(exported["labels"], [0, 2])
    assert (tmp_path / "soft" / "2" / "1.png").is_file()
    hard = grey(labels=np.array([0, 1, 2, 0]), loss=eqd.SquaredError())
    eqd.export(tmp_path / "hard", hard)
    exported = read(tmp_path / "hard")
    wanted = np.eye(3)[[0, 1, 2, 0]] - 1 / 3
    np.testing.assert_allclose(exported["targets"], wanted, atol=1e-6)
    assert exported["loss"] == "SquaredError"
    assert "temperature" not in exported
    assert "half the squared distance" in str(exported["recipe"])


def test_targets_of_squared_error(tmp_path):
    learned = grey(3).with_targets(3)
    eqd.export(tmp_path / "a", learned)
    assert "labels" not in read(tmp_path / "a")
    assert len(list((tmp_path / "a" / "images").glob("*.png"))) == 3
    claim = evaluation(eqd.recipes.Recipe(eqd.linear.LogisticRegression(20, 3)))
    eqd.save(tmp_path / "b.safetensors", learned, claim)
    eqd.export(tmp_path / "b", eqd.load(tmp_path / "b.safetensors"))
    np.testing.assert_array_equal(read(tmp_path / "b")["labels"], [0, 1, 2])
    assert (tmp_path / "b" / "2" / "2.png").is_file()


def test_artifacts_have_an_accuracy_and_a_recipe(tmp_path):
    recipe = recipes.dc(functools.partial(nn.MLP, (5, 4), 3), updates=7)
    path = tmp_path / "a.safetensors"
    eqd.save(path, grey(3), evaluation(recipe), dataset="digits")
    eqd.export(tmp_path / "out", eqd.load(path))
    exported = read(tmp_path / "out")
    np.testing.assert_allclose(exported["claimed_score"], 0.6)
    np.testing.assert_allclose(exported["claimed_std"], np.sqrt(0.02))
    # The weight decay of the recipe instead of the ridge of the set.
    np.testing.assert_allclose(exported["l2"], 5e-4, rtol=1e-5)
    assert exported["dataset"] == "digits"
    text = (tmp_path / "out" / "README.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for part in ("momentum is 0.9", "updates=7", "MLP", "l2 is 0.0005"):
        assert part in str(exported["recipe"])
        assert part in words
    assert "dataset digits" in words
    assert "accuracy on the test split: 60.00% ± 14.14% (2 models)" in words


def test_refuses(tmp_path):
    for name in ("../d", "..", ".d", ""):
        with pytest.raises(ValueError, match="class names that are valid folder names"):
            eqd.export(tmp_path, grey(class_names=("a", "b", "c", name)))
    assert not list(tmp_path.iterdir())
    eqd.export(tmp_path, grey(4))
    eqd.export(tmp_path, grey(4))
    with pytest.raises(FileExistsError, match=r"no PNGs of another set .*3.3\.png"):
        eqd.export(tmp_path, grey(3))
    # Loaders would take pictures that are already there for those of the table.
    rows = eqd.DistilledSet(np.ones((4, 5)), np.arange(4), l2=0.1)
    with pytest.raises(FileExistsError, match="no PNGs of another set"):
        eqd.export(tmp_path, rows)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 4), (1, 1, 5), (2, 3, 4, 5)])
def test_other_shapes_have_no_pictures(tmp_path, monkeypatch, shape):
    monkeypatch.setitem(sys.modules, "PIL", None)  # Pillow is not needed.
    images = RNG.normal(size=(2, *shape)).astype(np.float32)
    eqd.export(tmp_path, eqd.DistilledSet(images, np.arange(2), l2=0.1))
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"distilled.npz", "README.txt"}
    assert "PNG" not in (tmp_path / "README.txt").read_text()
    exported = read(tmp_path)
    np.testing.assert_array_equal(exported["images"], images)
    assert not {"low", "high"} & exported.keys()
