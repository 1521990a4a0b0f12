"""What is saved is what is loaded; what is not as it was saved is refused."""

import dataclasses
import functools
import json
import os
import pickle
import re
import runpy
import subprocess
import sys

import equinox as eqx
import hypothesis as hp
import hypothesis.extra.numpy as hpn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import safetensors
import safetensors.numpy

import eqdistill as eqd
from eqdistill import nn
from eqdistill._data._sources import SOURCES

from .conftest import OneStep


C = 3
KEY = jax.random.key(0)


def small(soft: bool = False, dtype: type = np.float32, loss=eqd.CrossEntropy()):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 2, 3)).astype(dtype)
    labels = rng.normal(size=(4, C)).astype(dtype) if soft else np.array([0, 1, 2, 0])
    return eqd.DistilledSet(images, labels, l2=0.03, loss=loss)


class Pairs(eqx.Module):
    """A model that is not of this package."""

    weights: jax.Array

    def __call__(self, image):
        return jnp.sum(jnp.tanh(image @ self.weights), axis=0)


def claim(accuracy):
    fitted = eqd.Fitted(None, jnp.array(True), jnp.array(0.0))
    return eqd.Evaluation(jnp.array(0.5), jnp.array(accuracy), fitted)


@pytest.fixture
def path(tmp_path):
    """A good file."""
    path = tmp_path / "good.safetensors"
    model = eqd.LogisticRegression(6, C)
    eqd.save(path, small(), model, claim(0.75), dataset="mnist", seed=7)
    return path


def read(path):
    with safetensors.safe_open(path, "numpy") as file:
        return safetensors.numpy.load_file(path), file.metadata()


def change(path, tensors=None, **metadata):
    """Changes tensors and metadata of a file; `None` removes."""
    old_tensors, old_metadata = read(path)
    new_tensors = old_tensors | (tensors or {})
    texts = {k: x if x is None else json.dumps(x) for k, x in metadata.items()}
    safetensors.numpy.save_file(
        {k: np.asarray(x) for k, x in new_tensors.items() if x is not None},
        path,
        {k: x for k, x in (old_metadata | texts).items() if x is not None},
    )


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@st.composite
def distilled_sets(draw):
    # Few, since JAX compiles for each.
    shape = draw(st.sampled_from([(1, 1), (4, 3), (3, 1, 2, 2)]))
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    images = draw(hpn.arrays(np.float32, shape, elements=floats))
    if draw(st.booleans()):
        labels = draw(hpn.arrays(np.float32, (shape[0], C), elements=floats))
    else:
        dtype = draw(st.sampled_from([np.int32, np.uint8, np.int16]))
        labels = draw(hpn.arrays(dtype, shape[0], elements=st.integers(0, C - 1)))
    loss = draw(
        st.one_of(
            st.just(eqd.CrossEntropy()),
            st.floats(1e-30, 1e30).map(eqd.SquaredError),
        )
    )
    return eqd.DistilledSet(images, labels, l2=draw(st.floats(1e-30, 1e30)), loss=loss)


@hp.settings(deadline=None, max_examples=20)
@hp.given(distilled_sets(), st.booleans())
def test_round_trip(tmp_path_factory, distilled, use_intercept):
    path = tmp_path_factory.mktemp("round") / "trip.safetensors"
    in_features = distilled.images[0].size
    model = eqd.LogisticRegression(
        in_features, C, use_intercept=use_intercept, dtype=jnp.float32
    )
    eqd.save(path, distilled, model)
    artifact = eqd.load(path)
    assert_same(artifact.distilled, distilled)
    assert type(artifact.distilled.loss) is type(distilled.loss)
    assert_same(artifact.model, model)
    assert os.listdir(path.parent) == [path.name]


def test_what_is_said_of_it(path):
    artifact = eqd.load(path)
    assert artifact.accuracy == 0.75
    assert artifact.dataset == "mnist"
    assert artifact.sha256 == SOURCES["mnist"].sha256
    assert artifact.learned is None
    assert artifact.seed == 7
    assert not artifact.x64
    assert artifact.versions["jax"] == jax.__version__
    assert artifact.inner == eqd.AutoSolver()
    text = "LogisticRegression(in_features=6, num_classes=3, use_intercept=False)"
    assert artifact.classifier_description == text


def test_nothing_more_need_be_said(tmp_path):
    path = tmp_path / "a.safetensors"
    eqd.save(path, small(soft=True), eqd.LogisticRegression(6, C))
    artifact = eqd.load(path)
    assert artifact.accuracy is artifact.dataset is artifact.seed is None
    assert artifact.learned is None
    assert artifact.sha256 == {}


def test_a_result_tells_what_was_learned(tmp_path):
    model = eqd.LogisticRegression(6, C)
    real = eqd.Dataset(small().images, small().labels, C)
    result = eqd.distill(
        small(), model, real, inner=OneStep(), steps=1, learn=(True, False)
    )
    path = tmp_path / "a.safetensors"
    eqd.save(path, result, model)
    artifact = eqd.load(path)
    assert artifact.learned == ("images", "log_l2")
    assert_same(artifact.distilled, result.distilled)


@pytest.mark.parametrize(
    "inner",
    [
        eqd.SpanSolver(),
        eqd.SpanSolver(1e-3, 0.0, 9),
        eqd.RidgeSolver(),
        eqd.ArgminSolver(max_steps=5),
    ],
)
def test_inner_solver_is_rebuilt(path, inner):
    eqd.save(path, small(), eqd.LogisticRegression(6, C), inner=inner)
    assert eqx.tree_equal(eqd.load(path).inner, inner)


def test_solver_that_no_file_may_ask_for_is_described(path):
    inner = eqd.SpanSolver(max_steps=10**7)
    eqd.save(path, small(), eqd.LogisticRegression(6, C), inner=inner)
    artifact = eqd.load(path)
    assert artifact.inner is None
    assert "max_steps=10000000" in artifact.inner_description


def test_what_cannot_be_rebuilt_is_described(path):
    inner = eqd.ArgminSolver(optx.BFGS(rtol=1e-4, atol=1e-4))
    eqd.save(path, small(), Pairs(jnp.ones((3, 3))), inner=inner)
    artifact = eqd.load(path)
    assert artifact.model is artifact.inner is None
    assert artifact.classifier_description.endswith(
        "test_artifact.Pairs(num_classes=3)"
    )
    assert "BFGS" in artifact.inner_description
    assert "rtol=0.0001" in artifact.inner_description


@pytest.mark.parametrize("kind", [eqd.Standardisation, eqd.ZCA])
def test_preprocessing_travels(path, kind):
    real = eqd.Dataset(small().images, small().labels)
    preprocessing = kind.fit(real)
    args = small(), eqd.LogisticRegression(6, C)
    eqd.save(path, *args, preprocessing=preprocessing)
    assert_same(eqd.load(path).preprocessing, preprocessing)
    change(path, {"preprocessing.mean": np.full((7,), 1.0)})
    with pytest.raises(ValueError, match=r"`preprocessing.mean` must have shape \("):
        eqd.load(path)
    change(path, {"preprocessing.mean": np.array(np.inf)})
    with pytest.raises(ValueError, match=r"`preprocessing\.mean` must be finite"):
        eqd.load(path)
    change(path, preprocessing={"type": "Own"})
    with pytest.raises(ValueError, match="`preprocessing` must be null, or the set"):
        eqd.load(path)

    class Own(eqd.AbstractPreprocessing):
        def __call__(self, image):
            return image

        def inverse(self, image):
            return image

    with pytest.raises(TypeError, match=r"`preprocessing` must be a `Standard.*`Own`"):
        eqd.save(path, *args, preprocessing=Own())


RECIPES = [
    eqd.recipes.dc(
        functools.partial(nn.ConvNet, widths=(4,), size=8, norm_last=True), updates=7
    ),
    eqd.recipes.frepo(functools.partial(nn.MLP, widths=(5,)), updates=7),
    eqd.recipes.learned_rates(
        functools.partial(nn.MLP, widths=(5,)),
        learning_rates=[0.1, 0.2],
        batch_size=2,
        momentum=0.5,
        adam=True,
        seed=3,
    ),
    eqd.recipes.learned_rates(nn.MLP, learning_rates=[0.1, 0.2], batch_size=2),
    eqd.recipes.zero_start(nn.LeNet, updates=7),
    eqd.recipes.feature_regression(nn.LeNet, updates=7),
    eqd.recipes.dc(nn.AlexNet, updates=7, augment=True),
    eqd.recipes.dc(functools.partial(nn.VGG11, norm=nn.group_norm), updates=7),
    eqd.recipes.dc(functools.partial(nn.ResNet18, activation=jax.nn.gelu), updates=7),
]


@pytest.mark.parametrize(
    "recipe",
    [*RECIPES[:3], *(pytest.param(x, marks=pytest.mark.slow) for x in RECIPES[3:])],
)
def test_recipe_is_rebuilt(path, recipe):
    evaluations = eqd.recipes.Evaluations(np.array([[0.5, 0.7]]), KEY)
    eqd.save(path, small(), recipe, evaluations)
    artifact = eqd.load(path)
    np.testing.assert_allclose(artifact.accuracy, 0.6)
    np.testing.assert_allclose(artifact.deviation, np.sqrt(0.02))
    assert artifact.fits == 2
    assert jnp.array_equal(artifact.key, KEY)
    assert artifact.inner is None
    assert artifact.model is None
    rebuilt = artifact.recipe
    assert rebuilt is not None
    assert rebuilt.name == recipe.name
    assert eqx.tree_equal(rebuilt.inner, recipe.inner)
    make = lambda recipe: eqx.filter_eval_shape(recipe.make, (2, 3), C, key=KEY)
    network, wanted = make(rebuilt), make(recipe)
    assert network.settings == wanted.settings


def test_recipe_of_another_network_is_named(path):
    own = lambda shape, num_classes, *, key: eqx.nn.Sequential(
        [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(6, num_classes, key=key)]
    )
    eqd.save(path, small(), eqd.recipes.dc(own))
    artifact = eqd.load(path)
    assert artifact.recipe is None
    assert "dc" in artifact.classifier_description
    two = eqd.recipes.Evaluations(np.full((2, 3), 0.5))
    with pytest.raises(ValueError, match=r"`evaluation` must be of one.*got 2"):
        eqd.save(path, small(), eqd.recipes.dc(own), two)
    with pytest.raises(ValueError, match="must have hard labels"):
        eqd.save(path, small(soft=True), eqd.recipes.dc(own))
    for model, evaluation in (
        (eqd.recipes.dc(own), claim(0.5)),
        (eqd.LogisticRegression(6, C), two),
    ):
        with pytest.raises(TypeError, match=r"`evaluation` must be of.*got an `Eval"):
            eqd.save(path, small(), model, evaluation)


@pytest.mark.parametrize(
    "change",
    [
        {"initialise": lambda network, *, key: nn.zero_head(network)},
        {"prepare": lambda distilled, num_classes: distilled},
        {"inner": eqd.UnrolledSolver(optax.sgd, {"learning_rate": 1.0}, 7)},
    ],
)
def test_a_recipe_that_was_changed_is_named(path, change):
    recipe = dataclasses.replace(RECIPES[0], **change)
    eqd.save(path, small(), recipe)
    assert eqd.load(path).recipe is None


def test_command_refuses_another_preprocessing(tmp_path, monkeypatch, capsys):
    # A matrix of whitening could hold the weights of a model.
    train, test = eqd.datasets.load("digits")
    distilled = eqd.DistilledSet.from_class_means(train, l2=0.1, key=KEY)
    model = eqd.LogisticRegression(64, 10)
    path = tmp_path / "a.safetensors"
    standardisation = eqd.Standardisation.fit(train)
    args = {"dataset": "digits", "preprocessing": standardisation}
    evaluation = eqd.evaluate(distilled, model, test.map(standardisation))
    eqd.save(path, distilled, model, evaluation, **args)
    assert run(monkeypatch, capsys, path)[0] == 0
    change(path, {"preprocessing.mean": np.ones((1, 1), np.float32)})
    status, _, err = run(monkeypatch, capsys, path)
    assert status == 2
    assert "is not the one that is fitted to the training data" in err


def test_double_precision(tmp_path):
    path = tmp_path / "a.safetensors"
    with jax.enable_x64(True):
        distilled = small(soft=True, dtype=np.float64)
        eqd.save(path, distilled, eqd.LogisticRegression(6, C))
        artifact = eqd.load(path)
        assert artifact.x64
        assert artifact.distilled.images.dtype == jnp.float64
        assert_same(artifact.distilled, distilled)
        assert artifact.model is not None
        assert artifact.model.head.weight.dtype == jnp.float64
    single = eqd.load(path)
    assert single.model is not None
    assert single.distilled.images.dtype == jnp.float32
    assert single.model.head.weight.dtype == jnp.float32
    assert_same(
        single.distilled,
        jax.tree.map(lambda x: np.asarray(x, np.float32), distilled),
    )
    # In single precision it is infinite.
    change(path, {"images": np.full((4, 2, 3), 1e300)})
    with pytest.raises(ValueError, match="`images` must be finite"):
        eqd.load(path)
    with jax.enable_x64(True):
        eqd.load(path)


def test_files_of_the_first_version(path):
    claim = {"value": 0.75, "split": "test"}
    args = {"loss": None, "learned": ["images"], "accuracy": claim}
    args["preprocessing"] = args["parameterisation"] = None
    change(path, format_version=1, **args)
    artifact = eqd.load(path)
    assert artifact.accuracy == 0.75
    assert artifact.deviation is None
    assert isinstance(artifact.distilled.loss, eqd.CrossEntropy)
    assert_same(artifact.distilled, small())
    assert artifact.learned == ("images",)


class AbsoluteError(eqd.AbstractLoss):
    def __call__(self, outputs, labels):
        return jnp.mean(abs(outputs - labels))

    def to_logits(self, outputs):
        return outputs


def test_refuses_to_save_other_losses(tmp_path):
    distilled = small(soft=True, loss=AbsoluteError())
    match = "`result` must have `CrossEntropy` or `SquaredError`.*got `AbsoluteError`"
    with pytest.raises(TypeError, match=match):
        eqd.save(tmp_path / "a.safetensors", distilled, eqd.LogisticRegression(6, C))


@pytest.mark.parametrize("value", [np.nan, np.inf, 90.0, np.zeros(1)])
def test_refuses_temperatures(tmp_path, value):
    path = tmp_path / "a.safetensors"
    eqd.save(path, small(loss=eqd.SquaredError()), eqd.LogisticRegression(6, C))
    change(path, {"log_temperature": np.asarray(value)})
    with pytest.raises(ValueError, match="`log_temperature` must be a scalar from"):
        eqd.load(path)


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        ("images", jnp.full((4, 2, 3), jnp.nan), "`images` must be finite"),
        ("images", jnp.ones((4, 2, 3), jnp.bfloat16), "`images`.*dtypes.*got 'BF16'"),
        ("log_l2", jnp.array(jnp.inf), "`log_l2` must be from -87.0 to 87.0; got inf"),
        ("log_l2", jnp.array(-90.0), "`log_l2` must be from.*got -90.0"),
        ("labels", jnp.array([0, 1, 2, 3]), r"`distilled.labels` must be in \[0, 3\)"),
    ],
)
def test_refuses_to_save(path, where, value, match):
    before = path.read_bytes()
    distilled = eqx.tree_at(lambda d: getattr(d, where), small(), value)
    with pytest.raises(ValueError, match=match):
        eqd.save(path, distilled, eqd.LogisticRegression(6, C))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_refuses_to_save_what_is_said(tmp_path):
    args = small(), eqd.LogisticRegression(6, C)
    path = tmp_path / "a.safetensors"
    for name in ("a.npz", "safetensors", "a.safetensors.txt"):
        with pytest.raises(ValueError, match=r"`path` must end in '.safetensors'; got"):
            eqd.save(tmp_path / name, *args)
    with pytest.raises(FileNotFoundError, match=r"`path`.*folder that exists; got '.*"):
        eqd.save(tmp_path / "no" / "a.safetensors", *args)
    for accuracy in (1.5, np.nan):
        with pytest.raises(ValueError, match=f"`accuracy` must be.*{accuracy}"):
            eqd.save(path, *args, claim(accuracy))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"labels": None}, r"must be images, labels, log_l2; got \['images', 'log_l2'"),
        ({"weights": np.zeros(3)}, r"must be images, labels, log_l2; got.*'weights'"),
        ({"images": np.zeros((4, 2, 3), np.float16)}, "`images`.*got 'F16'"),
        ({"images": np.zeros((4, 2, 3), np.int32)}, "`images`.*got 'I32'"),
        ({"images": np.full((4, 2, 3), -np.inf)}, "`images` must be finite"),
        ({"images": np.zeros((5, 2, 3))}, r"`labels` must have shape \(5,\)"),
        ({"images": np.zeros((4, 0, 3))}, r"`images`.*none of them empty.*4, 0, 3"),
        ({"images": np.zeros((0, 2, 3)), "labels": np.zeros(0, int)}, "none of them"),
        ({"images": np.zeros((4, *[1] * 9))}, "`images` must have at most 8 axes"),
        ({"images": np.zeros(4)}, r"`images` must have shape \(n, ...\); got \(4,\)"),
        ({"images": np.zeros((4, 2, 2))}, "`in_features` = 4.*got 6"),
        ({"labels": np.zeros(4)}, r"`labels` must have shape \(4, 3\); got \(4,\)"),
        ({"labels": np.zeros((4, 2))}, r"`labels` must have shape \(4, 3\)"),
        ({"labels": np.full((4, 3), np.nan)}, "`labels` must be finite"),
        ({"labels": np.zeros(4, bool)}, "`labels`.*got 'BOOL'"),
        ({"labels": np.array([0, 1, 2, -1])}, "got values from -1 to 2"),
        ({"labels": np.array([0, 1, 2, 2**32])}, "values from 0 to 4294967296"),
        ({"log_l2": np.zeros(1)}, r"`log_l2` must be a scalar; got shape \(1,\)"),
        ({"log_l2": np.array(np.nan)}, "`log_l2` must be from.*got nan"),
        ({"log_l2": np.array(1e308)}, "`log_l2` must be from.*got inf"),
    ],
)
def test_refuses_tensors(path, tensors, match):
    change(path, tensors)
    with pytest.raises(ValueError, match=match) as info:
        eqd.load(path)
    assert str(info.value).startswith(f"Cannot load {path}: ")


CLAIM = {
    "value": 0.5,
    "split": "test",
    "deviation": None,
    "fits": 1,
    "key": None,
}
NETWORK = {
    "architecture": "ConvNet",
    "widths": [4],
    "norm": None,
    "norm_last": False,
    "activation": "relu",
    "pool": "max_pool",
    "size": None,
}
RECIPE = {
    "type": "Recipe",
    "name": "dc",
    "num_classes": 3,
    "updates": 5,
    "augment": False,
    "network": NETWORK,
}


def network(**settings):
    return {**RECIPE, "network": {**NETWORK, **settings}}


LOGISTIC = {"type": "LogisticRegression", "num_classes": 3, "use_intercept": False}
SPAN = {"type": "SpanSolver", "rtol": None, "atol": None}


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"format": None}, "`format` must be 'eqdistill'; got None"),
        ({"format": "pt"}, "`format` must be 'eqdistill'; got 'pt'"),
        ({"format_version": 5}, "`format_version` must be from 1 to 4.*got 5"),
        ({"format_version": True}, "`format_version` must be from 1 to 4.*got True"),
        ({"loss": None}, "must have the keys.*'loss'"),
        ({"loss": "HingeLoss"}, "`loss` must be one of CrossEntropy, SquaredError"),
        ({"loss": ["CrossEntropy"]}, "`loss` must be one of"),
        ({"loss": "SquaredError"}, "tensors must be images.*log_temperature; got"),
        ({"seed": None}, "must have the keys.*'seed'"),
        ({"code": "print(1)"}, "must have the keys.*got.*'code'"),
        ({"seed": 1.5}, "`seed` must be null or an integer of 64 bits; got 1.5"),
        ({"x64": 1}, "`x64` must be"),
        ({"versions": {"jax": 1}}, "`versions` must be"),
        ({"learned": "images"}, "`learned` must be null, or a list of names"),
        ({"learned": ["x" * 201]}, "`learned` must be"),
        ({"learned": [["images"]]}, "`learned` must be"),
        ({"learned": ["images", "images"]}, "`learned` must be"),
        ({"accuracy": 0.5}, "`accuracy` must be"),
        ({"accuracy": {**CLAIM, "value": 1.1}}, "`accuracy` must be.*1.1"),
        ({"accuracy": {**CLAIM, "value": np.nan}}, "`accuracy` must be.*nan"),
        ({"accuracy": {**CLAIM, "split": "train"}}, "`accuracy` must be.*'train'"),
        ({"accuracy": {**CLAIM, "deviation": -1}}, "`accuracy` must be.*-1"),
        ({"accuracy": {**CLAIM, "fits": 0}}, "`accuracy` must be.*'fits': 0"),
        ({"accuracy": {**CLAIM, "deviation": 1.0}}, "`accuracy` must be.*1.0"),
        ({"accuracy": {**CLAIM, "fits": 2}}, "`accuracy` must be.*'fits': 2"),
        ({"accuracy": {**CLAIM, "key": [1, 2**32]}}, "`accuracy` must be.*'key'"),
        ({"seed": 2**63}, "`seed` must be null or an integer of 64 bits"),
        ({"model": {**RECIPE, "name": "x"}}, "`model` must be"),
        ({"model": {**RECIPE, "updates": 10**9}}, "`model` must be"),
        ({"model": {**RECIPE, "network": {}}}, "`model` must be"),
        ({"model": network(widths=[10**6])}, "`model` must be"),
        ({"model": network(widths=8 * [9] + [9])}, "`model` must be"),
        ({"model": network(size=10**6)}, "`model` must be"),
        ({"model": network(norm="os.system")}, "`model` must be"),
        ({"model": network(architecture="eval")}, "`model` must be"),
        ({"dataset": "mnist"}, "`dataset` must be"),
        ({"dataset": {"name": "mnist", "sha256": {"a": 1}}}, "`dataset` must be"),
        ({"model": "LogisticRegression"}, "`model` must be"),
        ({"model": LOGISTIC}, "`model` must be"),
        ({"model": LOGISTIC | {"in_features": 6.0}}, "`model` must be"),
        ({"model": LOGISTIC | {"in_features": 10**9}}, "`in_features` = 6.*got 1"),
        (
            {"model": LOGISTIC | {"in_features": 6, "num_classes": 10**6}},
            "its model would take 28000000 bytes, where 16.* are allowed for a",
        ),
        (
            {"model": {"type": "a.B", "num_classes": 10**9}},
            "its labels would take 16000000000 bytes",
        ),
        (
            {"parameterisation": {"type": "Packed", "shape": [2000, 3000]}},
            "its images would take .* bytes, where 16",
        ),
        (
            {"parameterisation": {"type": "Packed", "shape": [4, 6, 3]}},
            "`shape` must be that of a small image",
        ),
        ({"model": LOGISTIC | {"in_features": 7}}, "`in_features` = 6.*got 7"),
        ({"inner": SPAN}, "`inner` must be"),
        ({"inner": SPAN | {"max_steps": 0}}, "`inner` must be"),
        ({"inner": SPAN | {"max_steps": 10**7}}, "`inner` must be.*in their ranges"),
        ({"inner": SPAN | {"max_steps": None}}, "`inner` must be"),
        ({"inner": SPAN | {"max_steps": 9, "atol": 1.1}}, "`inner` must be"),
        ({"inner": SPAN | {"max_steps": 1, "rtol": np.inf}}, "`inner` must be"),
        ({"inner": {"type": "os.system", "args": "true"}}, "`inner` must be"),
        ({"inner": ["os.system"]}, "`inner` must be"),
    ],
)
def test_refuses_metadata(path, metadata, match):
    change(path, **metadata)
    with pytest.raises(ValueError, match=match) as info:
        eqd.load(path)
    assert str(path) in str(info.value)


def test_refuses_metadata_that_are_not_json(path):
    tensors, metadata = read(path)
    for text in ("", "7 7", "[" * 100_000, "9" * 5000, '{"value": 1, "value": 1}'):
        safetensors.numpy.save_file(tensors, path, metadata | {"seed": text})
        with pytest.raises(ValueError, match="its metadata 'seed' is not JSON"):
            eqd.load(path)


def framed(header):
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "too short for a safetensors file: 0 bytes"),
        (b"\1\0\0", "too short"),
        (pickle.dumps({"images": np.zeros(3)}), "not a safetensors file"),
        (b"\xff" * 100, "its header would have 18446744073709551615 bytes"),
        (framed(b" " * 2**20 + b"{}"), "at most 1048576 are allowed"),
        ((99).to_bytes(8, "little") + b"{}", "would have 99 bytes.*2 are there"),
        (framed(b"\xff\xfe"), "its header is not JSON"),
        (framed(b"[" * 200_000), "its header is not JSON"),
        (framed(b"[]"), "its header must be a JSON object"),
        (framed(b"{}"), "must have metadata"),
        (framed(b'{"__metadata__": {"format": 1}}'), "map strings to strings"),
        (framed(b'{"a": 1, "a": 1}'), "it has a key twice"),
    ],
)
def test_refuses_other_files(tmp_path, data, match):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as info:
        eqd.load(path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize(
    "entry",
    [
        7,
        {},
        {"dtype": "F32", "shape": 4},
        {"dtype": ["F32"], "shape": [4, 2, 3], "data_offsets": [0, 96]},
        {"dtype": "F32", "shape": [-4, -2, 3], "data_offsets": [0, 96]},
        {"dtype": "F32", "shape": [2**62, 2, 3], "data_offsets": [0, 96]},
        {"dtype": "F32", "shape": [2**30, 2**30, 2**30], "data_offsets": [0, 96]},
        {"dtype": "F32", "shape": [4, 2, 3], "data_offsets": [0, 2**63]},
        {"dtype": "F32", "shape": [4, 2, 3], "data_offsets": [96, 0]},
        {"dtype": "F32", "shape": [4, 2, 3], "data_offsets": [16, 112]},
        {"dtype": "F32", "shape": [4, 2, 3], "data_offsets": "all"},
        {"dtype": "F32", "shape": [4, 2, 3]},
    ],
)
def test_refuses_hostile_entries(path, entry):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"images": entry}
    path.write_bytes(framed(json.dumps(header).encode()) + data[end:])
    with pytest.raises(ValueError, match="Cannot load"):
        eqd.load(path)


def test_refuses_what_is_no_file(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="`path` must be a file that exists"):
        eqd.load(tmp_path / "no.safetensors")
    for other in (tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="not a regular file"):
            eqd.load(other)
    os.truncate(path, 2**30 + 1)  # Sparse: takes no room on the disk.
    with pytest.raises(ValueError, match="must have at most 1073741824 bytes"):
        eqd.load(path)


@hp.settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[hp.HealthCheck.function_scoped_fixture],
)
@hp.given(data=st.data())
def test_spoilt_files_are_loaded_or_refused(path, data):
    good = path.read_bytes()
    spoilt = bytearray(good)
    places = st.integers(0, len(good) - 1)
    for place, byte in data.draw(
        st.lists(st.tuples(places, st.integers(0, 255)), max_size=3)
    ):
        spoilt[place] = byte
    if data.draw(st.booleans()):
        del spoilt[data.draw(places) :]
    bad = path.with_name("bad.safetensors")
    bad.write_bytes(spoilt)
    try:
        artifact = eqd.load(bad)
    except ValueError as e:
        assert str(e).startswith(f"Cannot load {bad}: ")  # noqa: PT017
        return
    # Then it is one that could have been saved.
    distilled = artifact.distilled
    assert jnp.isfinite(distilled.images).all()
    assert jnp.isfinite(distilled.l2)
    assert distilled.labels.shape == distilled.images.shape[:1]
    if artifact.model is not None:
        eqd.save(path.with_name("again.safetensors"), distilled, artifact.model)


@pytest.fixture(scope="module")
def published(tmp_path_factory, digits):
    """A file with a true claim."""
    train, test = digits
    _, first = np.unique(train.labels, return_index=True)
    distilled = eqd.DistilledSet(train.floating()[first], train.labels[first], l2=0.1)
    model = eqd.LogisticRegression(64, 10)
    evaluation = eqd.evaluate(distilled, model, test)
    assert evaluation.accuracy > 0.5
    path = tmp_path_factory.mktemp("published") / "digits.safetensors"
    eqd.save(path, distilled, model, evaluation, dataset="digits")
    return path


def run(monkeypatch, capsys, *args):
    """The command, in this process: a fresh one takes seconds to start."""
    monkeypatch.setattr(sys, "argv", ["eqdistill", "check", *map(str, args)])
    with pytest.raises(SystemExit) as info:
        runpy.run_module("eqdistill", run_name="__main__")
    return info.value.code, *capsys.readouterr()


@pytest.mark.slow
def test_command_in_a_fresh_process(published):
    result = subprocess.run(
        [
            *(sys.executable, "-W", "error::RuntimeWarning"),
            *("-m", "eqdistill", "check", str(published), "--dataset", "digits"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    accuracy = f"{eqd.load(published).accuracy:.3%}"
    assert f"claimed {accuracy}, measured {accuracy}" in result.stdout


@pytest.mark.slow
def test_command_retrains_by_the_recipe(tmp_path, monkeypatch, capsys):
    train, test = eqd.datasets.load("digits")
    distilled = eqd.DistilledSet.from_class_means(train, l2=0.1, key=KEY)
    make = functools.partial(nn.ConvNet, widths=(4,), norm=None)
    recipe = eqd.recipes.dc(make, updates=20)
    found = eqd.recipes.evaluate(
        distilled, recipe, test, num_networks=2, key=jax.random.key(3)
    )
    path = tmp_path / "recipe.safetensors"
    eqd.save(path, distilled, recipe, found, dataset="digits", seed=3)
    status, out, _ = run(monkeypatch, capsys, path)
    assert status == 0
    assert "difference 0.000 points" in out
    assert f"tolerance {100 * found.deviation_of_networks:.3g}" in out


def test_command_finds_a_false_claim(published, tmp_path, monkeypatch, capsys):
    path = tmp_path / "false.safetensors"
    path.write_bytes(published.read_bytes())
    true = eqd.load(path).accuracy
    assert true is not None
    claim = {**CLAIM, "value": true + 0.01}
    change(path, accuracy=claim)
    status, out, _ = run(monkeypatch, capsys, path)
    assert status == 1
    assert f"claimed {true + 0.01:.3%}, measured {true:.3%}, difference 1.000" in out
    status, _, _ = run(monkeypatch, capsys, path, "--tolerance", "0.02")
    assert status == 0
    assert jnp.result_type(float) == jnp.float32


@pytest.mark.parametrize(
    ("args", "metadata", "match"),
    [
        (["--dataset", "mnist"], {}, "is of the dataset 'digits', but --dataset says"),
        (["--tolerance", "-1"], {}, "--tolerance: must be from 0 to 1; got -1"),
        (["--tolerance", "nan"], {}, "--tolerance: must be from 0 to 1; got nan"),
        (["--tolerance", "few"], {}, "--tolerance: invalid"),
        (["--data-dir"], {}, "--data-dir: expected one argument"),
        ([], {"seed": "\x1b[31m"}, "`seed` must be"),
        ([], {"accuracy": "null"}, "claims no accuracy"),
        ([], {"dataset": "null"}, "names no dataset: give one by --dataset"),
        ([], {"dataset": {"name": "x", "sha256": {}}}, "`name` must be one of"),
        (
            [],
            {"dataset": {"name": "mnist", "sha256": {"a": "b"}}},
            "other files of 'mnist'",
        ),
        ([], {"model": {"type": "a.B", "num_classes": 10}}, "model of"),
        ([], {"inner": {"type": "a.B", "text": "B()"}}, r"inner of.*'B\(\)'"),
    ],
)
def test_command_refuses(
    published, tmp_path, monkeypatch, capsys, args, metadata, match
):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(published.read_bytes())
    tensors, old = read(path)
    texts = {k: x if x == "null" else json.dumps(x) for k, x in metadata.items()}
    safetensors.numpy.save_file(tensors, path, old | texts)
    status, out, err = run(monkeypatch, capsys, path, *args)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert re.search(match, err)


@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError(), KeyboardInterrupt()]
)
def test_command_ends_with_two_whatever_happens(published, monkeypatch, capsys, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(eqd.datasets, "load", fail)
    status, out, err = run(monkeypatch, capsys, published)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1


def test_command_refuses_what_is_no_file(tmp_path, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, tmp_path / "no.safetensors")
    assert status == 2
    assert "`path` must be a file that exists" in err
    assert err.count("\n") == 1
