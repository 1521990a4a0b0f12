"""The commands `distill`, and `evaluate` and `check` on other people's files."""

import functools
import re
import runpy
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from PIL import Image

import eqdistill as eqd
from eqdistill import linear, nn, recipes
from eqdistill.datasets import Standardisation, ZCA

from .conftest import assert_same_bits, subset


MAKE = functools.partial(nn.MLP, (8, 8), 10)
N = 30


@pytest.fixture
def run(monkeypatch, capsys):
    """A command, in this process: a fresh one takes seconds to start."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["eqdistill", *map(str, args)])
        with pytest.raises(SystemExit) as info:
            runpy.run_module("eqdistill", run_name="__main__")
        return info.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def accuracy(run):
    """The accuracy that `evaluate` prints."""

    def accuracy(path, *args):
        short = ("--network", "MLP", "--num-networks", 1, "--updates", 20)
        status, out, err = run("evaluate", path, *short, *args)
        assert status == 0, err
        return float(re.findall(r"test accuracy   ([\d.]+)%\n$", out)[0])

    return accuracy


def direct(images, labels, preprocessing, test, make_recipe=recipes.dc, **kwargs):
    """The accuracy of images in the units of a preprocessing."""
    distilled = eqd.DistilledSet(images, labels, l2=0.1, **kwargs)
    test = test if preprocessing is None else test.map(preprocessing)
    found = eqd.evaluate(distilled, make_recipe(MAKE, updates=20), test, num_models=1)
    return round(100 * found.accuracy, 2)


def write_folder(folder, images, labels, names="0123456789"):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = folder / names[label] / f"{i:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)).save(file)


@pytest.mark.parametrize("kind", [Standardisation, ZCA, None])
@pytest.mark.slow
def test_exports_are_evaluated_in_their_units(tmp_path, digits, accuracy, kind):
    train, test = digits
    preprocessing = kind and kind.fit(train)
    real = train if kind is None else train.map(preprocessing)
    # The contrast is far from that of real images.
    images = 4 * real.floating()[:N] - 1
    labels = train.labels[:N] % 9  # One class has no folder.
    distilled = eqd.DistilledSet(images, labels, l2=0.1)
    path = tmp_path / "a.safetensors"
    eqd.save(path, distilled, preprocessing=preprocessing, dataset="digits")
    eqd.export(tmp_path / "out", eqd.load(path))
    wanted = direct(images, labels, preprocessing, test)
    assert accuracy(tmp_path / "out/distilled.npz") == wanted
    assert abs(accuracy(tmp_path / "out") - wanted) < 0.5


@pytest.fixture(scope="module")
def pixels(digits):
    train, _ = digits
    return np.asarray(train.images[:N]), np.asarray(train.labels[:N])


@pytest.mark.slow
def test_images_of_others(tmp_path, digits, pixels, accuracy):
    train, test = digits
    images, labels = pixels
    standard = Standardisation.fit(train)
    learned = jax.vmap(standard)(jnp.asarray(images / 255, float))
    wanted = direct(learned, labels, standard, test)
    path, digits = tmp_path / "a.npz", ("--dataset", "digits")

    def of(*args, images=images, labels=labels, **arrays):
        np.savez(path, images=images, labels=labels, **arrays)
        return accuracy(path, *digits, *args)

    assert of() == wanted
    assert of(images=images[:, None] / 255) == wanted
    assert of("--units", "standardised", images=learned[:, None]) == wanted
    one_hot = np.eye(10)[labels]
    assert of("--soft-labels", "probabilities", labels=one_hot) == wanted
    assert of(learning_rate=0.0001) < wanted - 5
    # Names decide, not their order.
    write_folder(tmp_path / "folder", images, labels)
    assert accuracy(tmp_path / "folder", *digits) == wanted
    zca = ZCA.fit(train, regularisation=0.3)
    white = jax.vmap(zca)(jnp.asarray(images / 255, float))
    args = ("--units", "zca", "--regularisation", 0.3)
    assert of(*args, images=white) == direct(white, labels, zca, test)


@pytest.mark.slow
def test_kinds_of_soft_labels(tmp_path, digits, pixels, accuracy):
    train, test = digits
    images, labels = pixels
    logits = np.random.default_rng(0).normal(size=(N, 10)) + 4 * np.eye(10)[labels]
    p = np.asarray(jax.nn.softmax(logits))
    kinds = {"logits": logits, "probabilities": p, "targets": p - 0.1}
    standard = Standardisation.fit(train)
    learned = jax.vmap(standard)(jnp.asarray(images / 255, float))
    wanted = direct(learned, logits, standard, test, recipes.zero_start)
    for kind, soft in kinds.items():
        path = tmp_path / f"{kind}.npz"
        np.savez(path, images=images, labels=soft)
        args = ("--dataset", "digits", "--soft-labels", kind)
        assert abs(accuracy(path, *args, "--recipe", "zero_start") - wanted) < 0.5


FLOATS = np.linspace(0, 1, 2 * 64).reshape(2, 8, 8)
GOOD = {"images": FLOATS, "labels": np.array([0, 1])}
DIGITS = "--dataset digits "


@pytest.mark.parametrize(
    ("changes", "args", "match"),
    [
        ({"images": 255 * FLOATS}, DIGITS, "from 0 to 255: divide by 255"),
        ({"images": 255 * FLOATS}, DIGITS + "--units pixels", "divide by 255"),
        ({"images": np.uint16(9 * FLOATS)}, DIGITS, "got uint16: divide by 65535"),
        ({"images": 3 * FLOATS - 1}, DIGITS, "from -1 to 2, in unknown units: pass --"),
        ({}, DIGITS + "--units standardised", "but standardised images have negative"),
        ({"images": np.uint8(FLOATS)}, DIGITS + "--units zca", "but zca images have"),
        ({"images": FLOATS[:, :4]}, DIGITS, r"shape of the real ones, \(8, 8\); got"),
        ({"labels": np.array([1, 10])}, DIGITS, r"class indices in \[0, 10\)"),
        ({"labels": np.ones((2, 10))}, DIGITS, "pass --soft-labels logits, prob"),
        (
            {"labels": np.ones((2, 10))},
            DIGITS + "--soft-labels probabilities",
            "each row must sum to 1",
        ),
        ({"labels": np.ones((2, 9))}, DIGITS + "--soft-labels logits", "has 9"),
        ({"class_names": np.array(["cat", "dog"])}, DIGITS, "0 to 9; got cat, dog"),
        ({"mean": np.ones((1, 1)), "deviation": np.ones((1, 1))}, DIGITS, "not fitted"),
        ({}, "", "pass --dataset or --data"),
        ({}, "--data nowhere", "--data nowhere does not exist"),
        ({}, DIGITS + "--recipe dc --learning-rate 1", "not allowed with"),
    ],
)
def test_evaluate_refuses(tmp_path, run, changes, args, match):
    path = tmp_path / "a.npz"
    np.savez(path, **(GOOD | changes))
    status, out, err = run("evaluate", path, *args.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(match, err), err


class Scaled(eqx.Module):
    """A model that `save` cannot rebuild."""

    model: eqx.Module

    def __call__(self, image):
        return self.model(image / 2)


MODULE = """
import numpy as np
import eqdistill as eqd
from tests import test_commands

def recipe():
    return eqd.recipes.Recipe(test_commands.model())

def data():
    with np.load({path!r}) as file:
        x, y, test_x, test_y = file.values()
    return eqd.Dataset(x, y), eqd.Dataset(test_x, test_y)
"""


def model():
    return Scaled(linear.LogisticRegression(64, 10))


@pytest.mark.slow
def test_check_on_own_data(tmp_path, digits, run, monkeypatch):
    train, test = (subset(data, 100) for data in digits)
    standard = Standardisation.fit(train)
    real = train.map(standard)
    distilled = eqd.DistilledSet.from_class_means(real, l2=0.1, key=jr.key(0))
    found = eqd.evaluate(distilled, model(), test.map(standard))
    file = tmp_path / "a.safetensors"
    eqd.save(file, distilled, found, preprocessing=standard)

    names = ("train_images", "train_labels", "test_images", "test_labels")
    arrays = [train.images, train.labels, test.images, test.labels]
    np.savez(tmp_path / "own.npz", **dict(zip(names, arrays, strict=True)))
    arrays[3] = (arrays[3] + 1) % 10
    np.savez(tmp_path / "other.npz", **dict(zip(names, arrays, strict=True)))
    write_folder(tmp_path / "own" / "train", train.images, train.labels)
    write_folder(tmp_path / "own" / "test", test.images, test.labels)
    text = MODULE.format(path=str(tmp_path / "own.npz"))
    (tmp_path / "own_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    npz = ("--data", tmp_path / "own.npz")
    status, _, err = run("check", file, *npz)
    assert status == 2
    assert "pass --recipe module:function" in err
    recipe = ("--recipe", "own_module:recipe")
    for data in (tmp_path / "own.npz", tmp_path / "own", "own_module:data"):
        status, out, err = run("check", file, *recipe, "--data", data)
        assert status == 0, out + err
        # The recipe in the file, and the one that was used.
        assert out.count("Scaled(") == 2
        assert f"{data} test accuracy: claimed {found.accuracy:.3%}" in out
    status, out, _ = run("check", file, *recipe, "--data", tmp_path / "other.npz")
    assert status == 1


@pytest.mark.slow
def test_check_compares_class_names(tmp_path, digits, run):
    train = subset(digits[0], 60)
    few = np.asarray(train.labels) != 3
    write_folder(tmp_path / "train", train.images, train.labels)
    write_folder(tmp_path / "test", train.images[few], train.labels[few])
    named = eqd.datasets.from_folder(tmp_path / "train")
    path = tmp_path / "test"
    test = eqd.datasets.from_folder(path, class_names=named.class_names)
    distilled = eqd.DistilledSet.from_class_means(named, l2=0.1, key=jr.key(0))
    found = eqd.evaluate(distilled, linear.LogisticRegression(64, 10), test)
    file = tmp_path / "a.safetensors"
    eqd.save(file, distilled, found)
    status, out, err = run("check", file, "--data", tmp_path)
    assert status == 0, out + err
    assert "difference 0.000 points" in out
    (tmp_path / "train" / "3").rename(tmp_path / "train" / "three")
    status, out, err = run("check", file, "--data", tmp_path)
    assert (status, out.count("accuracy")) == (2, 0)
    assert "only `distilled` has '3', and only `test` has 'three'" in err


@pytest.mark.slow
def test_distill_runs_the_program_that_it_shows(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    args = ["distill", "digits", "--ipc", 1, "--steps", 2, "--network", "MLP"]
    status, out, err = run(*args)
    assert status == 0, err
    _, program, _ = run(*args, "--output", "shown", "--show-code")
    exec(program, {})
    files = [f"{folder}/distilled.safetensors" for folder in ("output", "shown")]
    command, shown = map(eqd.load, files)
    assert_same_bits(command.start, shown.start)
    assert (command.score, command.std) == (shown.score, shown.std)
    assert command.distilled.images.shape == (10, 8, 8)
    assert f"test accuracy   {command.score:.1%}" in out
    assert run("check", files[0])[0] == 0
    assert (tmp_path / "output" / "distilled.png").exists()


def test_distill_loads_a_folder(tmp_path, monkeypatch, run, digits):
    monkeypatch.chdir(tmp_path)
    for data, part in zip(digits, ("train", "test"), strict=True):
        write_folder(tmp_path / "own" / part, data.images[:40], data.labels[:40])
    _, program, _ = run("distill", "own", "--size", 12, "--show-code")
    variables = {}
    exec(program.partition("standardisation")[0], variables)
    assert variables["train"].images.shape == (40, 12, 12)
    wanted = sorted(digits[1].labels[:40].tolist())
    assert sorted(variables["test"].labels.tolist()) == wanted


def test_distill_explains_itself(monkeypatch, run):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run("distill", "--help")
    assert status == 0
    assert len(out.splitlines()) <= 40
    for args, match in [
        ("nowhere", "'mnist'.*got 'nowhere'"),
        ("x --ipc 0", "`ipc`"),
        ("mnist --size 12", "--size .* 'mnist'"),
        (". --data-dir x", r"--data-dir .* '\.'"),
    ]:
        status, out, err = run("distill", *args.split())
        assert (status, err.count("\n")) == (2, 1)
        assert re.search(match, err)
