"""What is saved is what is loaded; anything else is refused."""

import dataclasses
import functools
import json
import os
import re
import runpy
import sys
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import pytest
import safetensors
import safetensors.numpy

import eqdistill as eqd
from eqdistill import linear, nn, recipes
from eqdistill.datasets import Standardisation, ZCA

from .conftest import assert_same_bits, evaluation


C = 3
SHAPE = (2, 3)
NET = functools.partial(nn.ConvNet, SHAPE, C, widths=(4,), size=8)
MLP = functools.partial(nn.MLP, SHAPE, C, widths=(5,))


def small(soft: bool = False, dtype: type = np.float32, loss=eqd.CrossEntropy()):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, *SHAPE)).astype(dtype)
    labels = rng.normal(size=(4, C)).astype(dtype) if soft else np.array([0, 1, 2, 0])
    return eqd.DistilledSet(images, labels, l2=0.03, loss=loss)


def regression(inner=eqd.AutoSolver(), in_features=6, **kwargs):
    model = linear.LogisticRegression(in_features, C, **kwargs)
    return recipes.Recipe(model, inner)


@pytest.fixture
def path(tmp_path):
    """A good file."""
    path = tmp_path / "good.safetensors"
    claim = evaluation(regression(), [0.75])
    eqd.save(path, small(), claim, dataset="mnist", seed=7)
    return path


def read(path):
    with safetensors.safe_open(path, "numpy") as file:
        metadata = {k: json.loads(x) for k, x in file.metadata().items()}
    return safetensors.numpy.load_file(path), metadata


def change(path, tensors=None, **changes):
    """Changes the tensors and the JSON of a file. `None` removes a tensor."""
    old, metadata = read(path)
    new = {k: x for k, x in (old | (tensors or {})).items() if x is not None}
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = metadata
        for parent in parents:
            node = node[parent]
        node[last] = value
    texts = {k: json.dumps(x) for k, x in metadata.items()}
    new = {k: np.array(x, order="C") for k, x in new.items()}
    safetensors.numpy.save_file(new, path, texts)


# Round trips.


SETS = [
    small(),
    small(soft=True, loss=eqd.CrossEntropy(1e-30)),
    small(loss=eqd.SquaredError()),
    eqd.DistilledSet(np.float32([[-0.0, 1e-45, 3e38]]), np.uint8([2]), l2=1e-30),
]


@pytest.mark.parametrize("distilled", SETS)
def test_sets_make_a_round_trip(tmp_path, distilled):
    path = tmp_path / "trip.safetensors"
    eqd.save(path, distilled)
    artifact = eqd.load(path)
    assert_same_bits(artifact.distilled, distilled)
    assert artifact.recipe is artifact.recipe_description is artifact.score is None
    assert artifact.learned is artifact.dataset is artifact.seed is artifact.key is None
    assert (artifact.num_models, artifact.sha256) == (0, {})
    assert os.listdir(path.parent) == [path.name]


def test_rounded_images_take_half_the_bytes(tmp_path):
    path = tmp_path / "half.safetensors"
    half = jnp.asarray(small().images, jnp.float16)
    rounded = eqx.tree_at(lambda d: d.images, small(), half.astype(jnp.float32))
    eqd.save(path, rounded)
    assert_same_bits(eqd.load(path).distilled, rounded)
    tensors, _ = read(path)
    np.testing.assert_array_equal(tensors["artifact.start.images"], half, strict=True)


def test_facts_make_a_round_trip(path):
    artifact = eqd.load(path)
    assert (artifact.metric, artifact.score) == ("accuracy", 0.75)
    assert artifact.std is None
    assert (artifact.num_models, artifact.dataset, artifact.seed) == (1, "mnist", 7)
    assert len(artifact.sha256) == 4
    assert not artifact.x64
    assert artifact.versions["jax"] == jax.__version__
    words = "LogisticRegression(in_features=6, num_classes=3, use_intercept=False"
    assert words in str(artifact.recipe_description)


def test_results_tell_what_was_learned(tmp_path):
    packed, model = eqd.Packed(small(), (4, 6)), linear.LogisticRegression(24, C)
    data = eqd.Dataset(packed.decode().images, small().labels, C)
    result = eqd.distill(packed, model, data, steps=3, learn=lambda p: p.small.images)
    assert result.history.loss[-1] < result.history.loss[0]
    path = tmp_path / "a.safetensors"
    eqd.save(path, result)
    artifact = eqd.load(path)
    assert artifact.learned == result.learned
    assert_same_bits(artifact.start, result.start)
    assert_same_bits(artifact.distilled, result.distilled)


@pytest.mark.parametrize("kind", [Standardisation, ZCA])
def test_preprocessing_makes_a_round_trip(path, kind):
    preprocessing = kind.fit(eqd.Dataset(small().images, small().labels))
    eqd.save(path, small(), preprocessing=preprocessing)
    assert_same_bits(eqd.load(path).preprocessing, preprocessing)


RATE = {"learning_rate": [0.1, 0.3]}
SMOOTH_ADAM = functools.partial(optax.adam, eps_root=1e-8)
RECIPES = [
    regression(),
    regression(linear.SpanSolver(1e-3, 0.0, 9), use_intercept=True),
    regression(linear.RelativeRidge()),
    regression(eqd.ArgminSolver(max_steps=5)),
    recipes.Recipe(MLP(key=jr.key(0)), eqd.ArgminSolver(tolerance=0.5)),
    recipes.dc(functools.partial(NET, norm=None, norm_last=True), updates=7),
    recipes.dc(lambda *, key: nn.ConvNet(SHAPE, C, size=8, key=key), augment=True),
    recipes.frepo(MLP, updates=7),
    recipes.zero_start(functools.partial(nn.LeNet, SHAPE, C)),
    recipes.feature_regression(NET),
    recipes.supervised(functools.partial(NET, activation=jax.nn.gelu), batch_size=2),
    recipes.learned_rates(
        NET, learning_rates=[0.1, 0.2], batch_size=2, momentum=0.5, adam=True, seed=3
    ),
    regression(eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.5}, 10)),
    recipes.Recipe(
        NET(key=jr.key(0)),
        eqd.UnrolledSolver(SMOOTH_ADAM, RATE, 10, batch_size=2, shuffle=False),
    ),
    recipes.Recipe(eqd.Fresh(MLP), eqd.ArgminSolver(tolerance=0.5)),
    recipes.dc(functools.partial(nn.AlexNet, SHAPE, C)),
    recipes.dc(functools.partial(nn.VGG11, SHAPE, C, norm=nn.group_norm)),
    recipes.dc(functools.partial(nn.ResNet18, SHAPE, C, activation=jax.nn.silu)),
]


def first_model(recipe):
    state = recipe.models.init(small(), key=jr.key(1))
    return recipe.models.draw(state, key=jr.key(2))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_make_a_round_trip(path, recipe):
    key = jr.key(3, impl="rbg")
    eqd.save(path, small(), evaluation(recipe, key=key))
    artifact = eqd.load(path)
    np.testing.assert_allclose(artifact.score, 0.6)
    np.testing.assert_allclose(artifact.std, np.sqrt(0.02))
    assert artifact.num_models == 2
    assert_same_bits(artifact.key, key)
    assert jr.key_impl(artifact.key) == jr.key_impl(key)
    rebuilt = artifact.recipe
    assert rebuilt is not None
    assert (rebuilt.name, rebuilt.settings) == (recipe.name, recipe.settings)
    if isinstance(getattr(recipe.inner, "make", None), functools.partial):
        # Partial functions are equal only to themselves.
        assert repr(rebuilt.inner) == repr(recipe.inner)
        assert_same_bits(*(jax.tree.leaves(x.inner) for x in (rebuilt, recipe)))
    else:
        assert eqx.tree_equal(rebuilt.inner, recipe.inner)
    models = [eqx.filter_eval_shape(first_model, x) for x in (recipe, rebuilt)]
    assert eqx.tree_equal(*models)
    assert eqx.tree_equal(*(x.prepare(small(), C) for x in (recipe, rebuilt)))
    if recipe.name == "feature_regression":
        assert eqx.tree_equal(*map(first_model, (recipe, rebuilt)))


def other_network(*, key):
    return eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(6, C, key=key)])


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.dc(other_network),
        recipes.Recipe(eqd.Fresh(MLP), eqd.UnrolledSolver(optax.yogi, {}, 7)),
        recipes.Recipe(other_network(key=jr.key(0))),
        regression(eqd.ArgminSolver(optx.BFGS(rtol=1e-4, atol=1e-4))),
        dataclasses.replace(RECIPES[5], prepare=recipes.Recipe.prepare),
        dataclasses.replace(RECIPES[5], inner=eqd.ArgminSolver()),
        dataclasses.replace(RECIPES[5], models=eqd.Fresh(NET)),
        dataclasses.replace(RECIPES[0], prepare=lambda distilled, num_classes: small()),
    ],
)
def test_other_recipes_are_described(path, recipe):
    eqd.save(path, small(), evaluation(recipe))
    artifact = eqd.load(path)
    assert artifact.recipe is None
    assert str(artifact.recipe_description).startswith(("Recipe(", "dc("))
    assert artifact.num_models == 2
    assert_same_bits(artifact.restore(recipe), recipe)


def test_double_precision(tmp_path):
    path = tmp_path / "a.safetensors"
    with jax.enable_x64(True):
        distilled = small(soft=True, dtype=np.float64)
        eqd.save(path, distilled, evaluation(regression()))
        artifact = eqd.load(path)
        assert artifact.recipe is not None
        assert artifact.x64
        assert_same_bits(artifact.distilled, distilled)
        assert artifact.recipe.models.model.head.weight.dtype == jnp.float64
    single = eqd.load(path)
    assert single.recipe is not None
    assert single.recipe.models.model.head.weight.dtype == jnp.float32
    wanted = jax.tree.map(lambda x: np.asarray(x, np.float32), distilled)
    assert_same_bits(single.distilled, wanted)


# Classes of users.


class Huber(eqd.AbstractLoss):
    def __call__(self, outputs, labels):
        return jnp.mean(optax.huber_loss(outputs, labels))


class Scaled(eqd.AbstractParameterisation):
    distilled: eqd.DistilledSet
    factor: jax.Array

    def decode(self):
        images = self.factor * self.distilled.images
        return eqx.tree_at(lambda d: d.images, self.distilled, images)


def test_classes_of_users(path):
    start = Scaled(small(), jnp.array(2.0))
    eqd.save(path, start)
    assert_same_bits(eqd.load(path).start, start.decode())
    with pytest.raises(ValueError, match="`Huber`, which is not registered"):
        eqd.save(path, small(loss=Huber()))
    change(path, artifact__start__loss={"class": "Huber"})
    with pytest.raises(ValueError, match="'Huber'"):
        eqd.load(path)


# Refusals.


def test_refuses_to_save(tmp_path, path):
    before = path.read_bytes()
    for name, value in (
        ("images", jnp.full((4, 2, 3), jnp.nan)),
        ("images", jnp.ones((4, 2, 3), jnp.bfloat16)),
        ("images", jnp.ones((4, 2, 3), jnp.float16)),
        ("log_l2", jnp.array(-90.0)),
        ("labels", jnp.array([0, 1, 2, -3])),
    ):
        distilled = eqx.tree_at(lambda d, name=name: getattr(d, name), small(), value)
        with pytest.raises(ValueError, match=f"Cannot save {path}: "):
            eqd.save(path, distilled)
    with pytest.raises(FileNotFoundError, match=r"`path`.*folder that exists; got '.*"):
        eqd.save(tmp_path / "no" / "a.safetensors", small())
    claim = evaluation(regression(), [1.5])
    with pytest.raises(ValueError, match=r"accuracy' must be.*1\.5"):
        eqd.save(path, small(), claim)
    per_class = np.ones((2, 1, 1))
    metrics = {"accuracy": per_class[..., 0]}
    two = dataclasses.replace(claim, metrics=metrics, per_class=per_class)
    with pytest.raises(ValueError, match="must be of one distilled set; got 2"):
        eqd.save(path, small(), two)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


IMAGES, LABELS, LOG_L2 = (f"artifact.start.{x}" for x in ("images", "labels", "log_l2"))
BAD_TENSORS = [
    (LABELS, None, "labels` must not be"),
    ("weights", np.zeros(3), r"unexpected tensors: \['weights'\]"),
    (IMAGES, np.zeros((4, 2, 3), bool), "images`.*got bool"),
    (IMAGES, np.full((4, 2, 3), -np.inf), "images` must be finite"),
    (IMAGES, np.zeros((5, 2, 3)), "labels must have 5 rows"),
    (IMAGES, np.zeros((4, 0, 3)), "images`.*none of them empty"),
    (IMAGES, np.zeros((4, *[1] * 8)), "images` must have at most 8 axes"),
    (IMAGES, np.zeros((4, 2, 2)), "`recipe` must take an image of shape"),
    (LABELS, np.zeros(4, bool), "labels`.*got bool"),
    (LABELS, np.array([0, 1, 2, -1]), "labels must not be negative"),
    (LABELS, np.array([0, 1, 2, 2**32]), "labels` must be finite int32"),
    (LABELS, np.array([0, 1, 2, 2**30]), "would take 34359738400 bytes"),
    (LOG_L2, np.array(1e308), "log_l2` must be finite"),
]


@pytest.mark.parametrize(("name", "value", "match"), BAD_TENSORS)
def test_refuses_tensors(path, name, value, match):
    change(path, {name: value})
    with pytest.raises(ValueError, match=match) as info:
        eqd.load(path)
    assert str(info.value).startswith(f"Cannot load {path}: ")
    assert len(str(info.value)) < 600 + len(str(path))


SPAN = {"class": "SpanSolver", "rtol": None, "atol": None, "max_steps": 9}
CONV = {
    **{"class": "ConvNet", "shape": [2, 3], "num_classes": 3, "widths": [4]},
    **{"norm": {"class": "instance_norm"}, "norm_last": False, "size": 8},
    **{"activation": {"class": "relu"}, "pool": {"class": "max_pool"}},
}
DC = {"class": "dc", "updates": 5, "augment": False, "make": CONV}
NESTED = functools.reduce(
    lambda x, _: {"class": "RelativeRidge", "inner": x}, range(50), SPAN
)
BAD_JSON = {
    "code": ["print(1)"],
    "artifact": [None, {"class": "Artifact"}],
    "artifact__code": ["print(1)"],
    "artifact__seed": [1.5, 2**63],
    "artifact__x64": [1],
    "artifact__versions": [{"jax": 1}, None],
    "artifact__learned": ["images", [["images"]], [1, 1]],
    "artifact__score": [1.1, -0.1, None, np.nan],
    "artifact__metric": [None, "R3", ["accuracy"]],
    "artifact__prepare": [SPAN, {"class": "relu"}],
    "artifact__source": [7],
    "artifact__std": [-1, 0.5],
    "artifact__num_models": [0, 2],
    "artifact__key": [[1, 2**32], [1, 2, 3]],
    "artifact__generator": ["os.system"],
    "artifact__dataset": [{"name": "mnist"}],
    "artifact__sha256": [{"a": 1}],
    "artifact__start": [None, SPAN, {"class": "os.system"}],
    "artifact__start__loss": [SPAN, {"class": "dict"}],
    "artifact__start__images": [[[1.0]], {"tensor": "artifact.start.labels"}],
    "artifact__preprocessing": [SPAN],
    "recipe": [SPAN, 7],
    "recipe__inner": [NESTED],
    "recipe__models__model__in_features": [7, 6.0, 2**29],
    "recipe__models__model__dtype": ["object"],
}
BAD = {
    "rtol": [1.1, "0.5"],
    "max_steps": [0, 10**7, None],
    "updates": [10**9, None],
    "augment": ["yes"],
    "extra": [1],
    "make": [{}, SPAN],
    "widths": [[10**6], 4, 9 * [4]],
    "size": [10**6],
    "shape": [[2, 4]],
    "num_classes": [2**17],
    "norm": [SPAN],
}
for name, values in BAD.items():
    for value in values:
        bad = {name: value}
        BAD_JSON["recipe__inner"] += [SPAN | bad] if name in SPAN else []
        BAD_JSON["recipe"] += [DC | (bad if name in DC else {"make": CONV | bad})]


@pytest.mark.parametrize("name", BAD_JSON)
def test_refuses_json(path, name):
    good = path.read_bytes()
    for value in BAD_JSON[name]:
        path.write_bytes(good)
        change(path, **{name: value})
        with pytest.raises(ValueError, match=f"Cannot load {path}: "):
            eqd.load(path)


def test_recipes_of_unknown_classes_are_described(path):
    change(path, recipe=DC)
    assert eqd.load(path).recipe is not None
    change(path, recipe=DC | {"make": {"class": "MyNet", "depth": 3}})
    artifact = eqd.load(path)
    assert artifact.recipe is None
    assert str(artifact.recipe_description).startswith("Recipe(models=Fixed(")


def test_images_may_not_take_too_much_memory(path):
    eqd.save(path, eqd.Packed(small(), (4, 6)))
    assert eqd.load(path).distilled.images.shape == (4, 4, 6)
    for shape in ([2000, 3000], [2**29, 3 * 2**28], [4, 6, 3], [], [2, 4]):
        change(path, artifact__start__shape=shape)
        with pytest.raises(ValueError, match="Cannot load"):
            eqd.load(path)


def framed(header):
    return len(header).to_bytes(8, "little") + header


BAD_FILES = [
    (b"", "truncated"),
    (b"not a safetensors file", "Cannot load"),
    (framed(b" " * 2**20 + b"{}"), "at most 1048576 are allowed"),
    ((99).to_bytes(8, "little") + b"{}", "it has 10 bytes, but its header has 99"),
    (framed(b"\xff\xfe"), "Cannot load"),
    (framed(b"[" * 200_000), "recursion"),
    (framed(b"[]"), "its metadata must be"),
    (framed(b'{"__metadata__": {"artifact": 1, "recipe": 1}}'), "Cannot load"),
    (framed(b'{"a": 1, "a": 1}'), "it has a duplicate key"),
]


def test_refuses_other_files(tmp_path, path):
    for data, match in BAD_FILES:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=match) as info:
            eqd.load(path)
        assert str(path) in str(info.value)
    for other in (tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="not a regular file"):
            eqd.load(other)
    os.truncate(path, 2**30 + 1)  # Sparse: takes no space on the disk.
    with pytest.raises(ValueError, match="1073741825 bytes, more than 1073741824"):
        eqd.load(path)


def test_refuses_headers(path):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    f32 = {"dtype": "F32", "shape": [4, 2, 3]}
    entries = [7, *(f32 | {"shape": s} for s in (4, [-4, -2, 3], [2**62, 2, 3]))]
    offsets = [0, 2**63], [96, 0], [16, 112], "all", None
    entries += [f32 | {"data_offsets": x} for x in offsets]
    changes = [{IMAGES: entry} for entry in entries]
    for text in ("", "7 7", "[" * 100_000, "9" * 5000, '{"class": 1, "class": 1}'):
        changes.append({"__metadata__": header["__metadata__"] | {"artifact": text}})
    for bad in changes:
        path.write_bytes(framed(json.dumps(header | bad).encode()) + data[end:])
        with pytest.raises(ValueError, match=f"Cannot load {path}: "):
            eqd.load(path)


# The command.


@pytest.fixture(scope="module")
def class_means(digits):
    return eqd.DistilledSet.from_class_means(digits[0], l2=0.1, key=jr.key(0))


@pytest.fixture(scope="module")
def published(tmp_path_factory, digits, class_means):
    """A file with a true claim."""
    found = eqd.evaluate(class_means, linear.LogisticRegression(64, 10), digits[1])
    assert found.accuracy > 0.5
    path = tmp_path_factory.mktemp("published") / "digits.safetensors"
    eqd.save(path, class_means, found, dataset="digits")
    return path


@pytest.fixture
def copied(published, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes(published.read_bytes())
    return path


def run(monkeypatch, capsys, *args):
    """The command, in this process: a fresh one takes seconds to start."""
    monkeypatch.setattr(sys, "argv", ["eqdistill", "check", *map(str, args)])
    with pytest.raises(SystemExit) as info:
        runpy.run_module("eqdistill", run_name="__main__")
    return info.value.code, *capsys.readouterr()


@pytest.mark.slow
def test_command_trains_with_the_recipe(
    tmp_path, monkeypatch, capsys, digits, class_means
):
    make = functools.partial(nn.ConvNet, (8, 8), 10, widths=(4,), norm=None)
    recipe = recipes.dc(make, updates=20)
    args = class_means, recipe, digits[1]
    found = eqd.evaluate(*args, num_models=2, key=jr.key(3))
    path = tmp_path / "recipe.safetensors"
    eqd.save(path, class_means, found, dataset="digits", seed=3)
    status, out, _ = run(monkeypatch, capsys, path)
    assert status == 0
    assert "difference 0.000 points" in out
    assert f"tolerance {100 * found.std_models:.3g}" in out


def test_command_finds_a_false_claim(copied, monkeypatch, capsys):
    true = eqd.load(copied).score
    assert true is not None
    change(copied, artifact__score=true + 0.01)
    status, out, _ = run(monkeypatch, capsys, copied)
    assert status == 1
    assert f"claimed {true + 0.01:.3%}, measured {true:.3%}, difference 1.000" in out
    status, _, _ = run(monkeypatch, capsys, copied, "--tolerance", "0.02")
    assert status == 0
    # The claimed standard deviation is the default tolerance.
    change(copied, artifact__num_models=2, artifact__std=0.02)
    status, out, _ = run(monkeypatch, capsys, copied)
    assert status == 0
    assert out.startswith("recipe: Recipe(")
    assert "(tolerance 2)" in out


def test_command_refuses_another_preprocessing(
    tmp_path, monkeypatch, capsys, digits, class_means
):
    # A whitening matrix could hold the weights of a model.
    train, test = digits
    path = tmp_path / "a.safetensors"
    for preprocessing in (Standardisation.fit(train), ZCA.fit(train)):
        model = linear.LogisticRegression(64, 10)
        found = eqd.evaluate(class_means, model, test.map(preprocessing))
        data = {"dataset": "digits", "preprocessing": preprocessing}
        eqd.save(path, class_means, found, **data)
        assert run(monkeypatch, capsys, path)[0] == 0
        mean = np.ones(preprocessing.mean.shape, np.float32)
        change(path, {"artifact.preprocessing.mean": mean})
        status, _, err = run(monkeypatch, capsys, path)
        assert status == 2
        assert "is not fitted to the training data" in err


NO_CLAIM = {"artifact__score": None, "artifact__metric": None}
NO_CLAIM |= {"artifact__num_models": 0, "artifact__recipe_description": None}
OWN_RECIPE = {"recipe": None, "artifact__recipe_description": "A recipe\nof mine"}


@pytest.mark.parametrize(
    ("args", "changes", "match"),
    [
        ("--dataset mnist", {}, "is for 'digits', but --dataset is 'mnist'"),
        ("--tolerance nan", {}, "`tolerance` must be finite; got nan"),
        ("", {"artifact__seed": "\x1b[31m"}, "seed` must be"),
        ("", NO_CLAIM, "no score"),
        ("", {"artifact__dataset": None}, "pass --dataset or --data"),
        ("", {"artifact__dataset": "x"}, "`name` must be one of"),
        (
            "",
            {"artifact__dataset": "mnist", "artifact__sha256": {"a": "b"}},
            "not made with the files of 'mnist'",
        ),
        ("", OWN_RECIPE, r"be rebuilt.*'A recipe\\nof mine'"),
    ],
)
def test_command_refuses(copied, monkeypatch, capsys, args, changes, match):
    change(copied, **changes)
    status, out, err = run(monkeypatch, capsys, copied, *args.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "\x1b" not in err
    assert re.search(match, err)


def test_command_exits_with_two_after_any_error(published, monkeypatch, capsys):
    for error in (KeyError("x"), AssertionError(), KeyboardInterrupt()):
        fail = mock.Mock(side_effect=error)
        monkeypatch.setattr(eqd.datasets, "load", fail)
        status, out, err = run(monkeypatch, capsys, published)
        assert (status, out, err.count("\n")) == (2, "", 1)
