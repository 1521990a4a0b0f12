"""What is exported is read rightly by others: NumPy, Pillow and loaders of folders."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import eqdistill as eqd


RNG = np.random.default_rng(0)


def grey(n=4, *, scale=1.0, labels=None):
    images = scale * RNG.normal(size=(n, 5, 4)).astype(np.float32)
    return eqd.DistilledSet(images, np.arange(n) if labels is None else labels, l2=0.03)


def read(folder):
    """As those who know nothing but the documentation."""
    with np.load(folder / "distilled.npz", allow_pickle=False) as file:
        return dict(file)


def recover(folder, mode="L"):
    """The values of all pictures, and what the first one says."""
    paths = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    images = [Image.open(path) for path in paths]
    assert {image.mode for image in images} == {mode}
    low, high = (float(images[0].info[name]) for name in ("low", "high"))
    levels = np.stack([np.asarray(image.convert(mode)) for image in images])
    return low + (high - low) * (levels / 255), low, high


@pytest.mark.parametrize(
    ("shape", "mode", "scale"),
    [
        ((5, 4), "L", 1e-4),
        ((5, 4), "L", 1e3),
        ((1, 5, 4), "L", 1.0),
        ((5, 4, 1), "L", 1.0),
        ((1, 4), "L", 1.0),
        ((3, 5, 4), "RGB", 1.0),
        ((5, 4, 3), "RGB", 1.0),
    ],
)
def test_pixels_are_recovered(tmp_path, shape, mode, scale):
    images = scale * RNG.normal(size=(11, *shape)).astype(np.float32)
    distilled = eqd.DistilledSet(images, np.arange(11), l2=0.03)
    folder = tmp_path / "new" / "folder"
    eqd.export(folder, distilled)
    pictures, low, high = recover(folder, mode)
    assert (low, high) == (images.min(), images.max())
    wanted = np.moveaxis(images, 1, 3) if shape == (3, 5, 4) else images
    error = np.abs(pictures - wanted.reshape(pictures.shape)).max()
    assert error <= 0.5001 * (high - low) / 255
    exported = read(folder)
    np.testing.assert_array_equal(exported["images"], images)
    np.testing.assert_allclose(exported["l2"], 0.03, rtol=1e-6)
    assert exported["low"] == low
    assert exported["high"] == high
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{y:02}" for y in range(11)),
        "distilled.npz",
    ]


def test_images_like_real_ones_are_shown_as_they_are(tmp_path):
    pixels = RNG.integers(1, 255, size=(6, 5, 4, 3), dtype=np.uint8)
    labels = np.array([2, 0, 1, 2, 0, 1])
    images = np.moveaxis(pixels, 3, 1) / np.float32(255)
    names = ("ant", "bee", "cat")
    eqd.export(tmp_path, eqd.DistilledSet(images, labels, l2=0.1), class_names=names)
    got = eqd.datasets.from_folder(tmp_path)
    assert got.class_names == names
    order = np.argsort(labels, kind="stable")
    np.testing.assert_array_equal(got.labels, labels[order])
    np.testing.assert_array_equal(got.images, np.moveaxis(pixels, 3, 1)[order])
    exported = read(tmp_path)
    np.testing.assert_array_equal(exported["labels"], labels)
    np.testing.assert_array_equal(exported["targets"], np.eye(3)[labels])
    assert tuple(exported["class_names"]) == names


@pytest.mark.parametrize("kind", [eqd.Standardisation, eqd.ZCA])
def test_preprocessing_is_undone(tmp_path, kind):
    pixels = RNG.integers(256, size=(60, 5, 4), dtype=np.uint8)
    real = eqd.Dataset(pixels, np.arange(60) % 3)
    preprocessing = kind.fit(real)
    mapped = real.map(preprocessing)
    distilled = eqd.DistilledSet(mapped.images[:3], np.arange(3), l2=0.1)
    path = tmp_path / "a.safetensors"
    model = eqd.LogisticRegression(20, 3)
    eqd.save(path, distilled, model, preprocessing=preprocessing)
    eqd.export(tmp_path / "out", eqd.load(path))
    pictures, low, high = recover(tmp_path / "out")
    assert (low, high) == (0, 1)
    np.testing.assert_allclose(255 * pictures, pixels[:3], atol=1e-4)
    exported = read(tmp_path / "out")
    # The documented way back to what was learned.
    centred = pictures - exported["mean"]
    if kind is eqd.ZCA:
        units = (centred.reshape(3, -1) @ exported["whitening"].T).reshape(3, 5, 4)
    else:
        units = centred / exported["deviation"]
    np.testing.assert_allclose(units, exported["images"], atol=1e-4)


def test_soft_labels(tmp_path):
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], np.float32)
    zeros = np.zeros((2, 3, 3), np.float32)
    eqd.export(tmp_path, eqd.DistilledSet(zeros, np.log(p), l2=0.1))
    pictures, *_ = recover(tmp_path)
    assert not pictures.any()
    exported = read(tmp_path)
    np.testing.assert_allclose(exported["targets"], p, rtol=1e-6)
    np.testing.assert_array_equal(exported["labels"], [0, 2])
    assert (tmp_path / "2" / "1.png").is_file()


def test_targets(tmp_path):
    loss = eqd.SquaredError(0.5)
    distilled = eqd.DistilledSet(
        grey().images, np.array([0, 1, 2, 0]), l2=0.1, loss=loss
    )
    eqd.export(tmp_path, distilled)
    exported = read(tmp_path)
    wanted = np.eye(3)[[0, 1, 2, 0]] - 1 / 3
    np.testing.assert_allclose(exported["targets"], wanted, atol=1e-6)
    np.testing.assert_allclose(exported["temperature"], 0.5, rtol=1e-6)
    assert exported["loss"] == "SquaredError"
    assert "half the squared distance" in str(exported["recipe"])


def test_claim_and_recipe_in_words(tmp_path):
    distilled = grey(3)
    recipe = eqd.recipes.dc(eqd.nn.MLP, updates=7)
    evaluations = eqd.recipes.Evaluations(np.array([[0.5, 0.7]]))
    path = tmp_path / "a.safetensors"
    eqd.save(path, distilled, recipe, evaluations, dataset="digits")
    eqd.export(tmp_path / "out", eqd.load(path))
    exported = read(tmp_path / "out")
    np.testing.assert_allclose(exported["claimed_accuracy"], 0.6)
    np.testing.assert_allclose(exported["claimed_deviation"], np.sqrt(0.02))
    # The weight decay of the recipe, and not the ridge of the set.
    np.testing.assert_allclose(exported["l2"], 5e-4, rtol=1e-5)
    assert exported["dataset"] == "digits"
    words = str(exported["recipe"])
    for part in ("a momentum of 0.9", "updates=7", "MLP"):
        assert part in words


def test_names_of_the_dataset(tmp_path):
    images = np.asarray(RNG.random((10, 3, 32, 32)), np.float32)
    distilled = eqd.DistilledSet(images, np.arange(10), l2=0.1)
    path = tmp_path / "a.safetensors"
    eqd.save(path, distilled, eqd.LogisticRegression(3072, 10), dataset="cifar10")
    eqd.export(tmp_path / "out", eqd.load(path))
    assert (tmp_path / "out" / "truck" / "9.png").is_file()


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("a", "b", "c"), "each of the 4 classes, all different; got 3"),
        (("a", "b", "c", "c"), "all different; got 4"),
        (("a", "b", "c", "../d"), "names of folders.*got '../d'"),
        (("a", "b", "c", ".."), "do not begin with a dot; got '..'"),
        (("a", "b", "c", ""), "names of folders"),
    ],
)
def test_refuses_names(tmp_path, names, match):
    with pytest.raises(ValueError, match=match):
        eqd.export(tmp_path / "out", grey(), class_names=names)
    assert not (tmp_path / "out").exists()


def test_refuses_a_folder_of_another_set(tmp_path):
    eqd.export(tmp_path, grey(4))
    eqd.export(tmp_path, grey(4))
    match = r"`folder` must have no PNGs of another set .*3.3\.png"
    with pytest.raises(FileExistsError, match=match):
        eqd.export(tmp_path, grey(3))


@pytest.mark.parametrize("shape", [(5,), (2, 5, 4), (1, 1, 5), (2, 2, 2, 2)])
def test_refuses_shapes(tmp_path, shape):
    distilled = eqd.DistilledSet(jnp.ones((2, *shape)), np.arange(2), l2=0.1)
    with pytest.raises(ValueError, match="`distilled` must have grey images") as info:
        eqd.export(tmp_path, distilled)
    assert str(shape) in str(info.value)


def test_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install 'eqdistill"):
        eqd.export(tmp_path, grey())
