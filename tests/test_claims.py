"""What was evaluated is what is saved: `check` repeats each claim from the file, or
`save` has refused it."""

import functools
import runpy
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import sklearn.datasets

import eqdistill as eqd
from eqdistill import linear, nn, recipes

from .conftest import assert_same_bits, evaluation, MLP, subset


@pytest.fixture
def check(monkeypatch, capsys):
    """The command `check`, whose `--recipe` and `--data` call functions that are passed
    here. Returns the status and the output."""

    def check(path, *others, **functions):
        module = types.ModuleType("own_module")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, "own_module", module)
        args = [x for name in functions for x in (f"--{name}", f"own_module:{name}")]
        args = ["eqdistill", "check", *map(str, (path, *others)), *args]
        monkeypatch.setattr(sys, "argv", args)
        with pytest.raises(SystemExit) as info:
            runpy.run_module("eqdistill", run_name="__main__")
        out, err = capsys.readouterr()
        return info.value.code, out + err

    return check


def Own(*, key):
    """A network that a file cannot rebuild."""
    return MLP(64, 4, jax.nn.softplus, key=key)


def read(folder):
    with np.load(folder / "distilled.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def few(digits):
    """Digits for quick runs: real data, and a start."""
    train, test = (subset(data, 100) for data in digits)
    start = eqd.DistilledSet.from_class_means(train, l2=0.1, key=jr.key(0))
    return train, test, start


def rate_per_step(learning_rate):
    return optax.sgd(lambda step: learning_rate[step], momentum=0.9)


def learned_rates(rate=0.02, steps=3):
    rates = {"learning_rate": jnp.full(steps, rate)}
    return eqd.UnrolledSolver(rate_per_step, rates, steps, batch_size=5, shuffle=False)


@pytest.mark.slow
def test_learned_solvers_and_initial_weights_are_kept(tmp_path, few, check):
    """C1."""
    train, test, start = few
    result = eqd.distill(
        start,
        eqd.Bilevel(Own(key=jr.key(5)), learned_rates()),
        train,
        learn_objective=lambda o: o.inner.log_hyperparameters,
        steps=2,
    )
    inner, path = result.objective.inner, tmp_path / "a.safetensors"
    found = eqd.evaluate(result.distilled, result.objective.models, test, inner=inner)
    eqd.save(path, result, found)
    artifact = eqd.load(path)
    assert artifact.recipe is None
    rates = artifact.recipe_arrays["inner.log_hyperparameters.learning_rate"]
    assert_same_bits(rates, inner.log_hyperparameters["learning_rate"])
    words = "make=rate_per_step, hyperparameters=(learning_rate=["
    assert words in str(artifact.recipe_description)

    def recipe(steps=3, **kwargs):
        return recipes.Recipe(Own(key=jr.key(0)), learned_rates(0.5, steps))

    assert_same_bits(artifact.restore(recipe()), found.recipe)
    status, out = check(path, data=lambda: (train, test), recipe=recipe)
    assert (status, "difference 0.000 points" in out) == (0, True), out
    assert "model: MLP, 310 parameters" in out
    wrong = lambda: recipe(steps=4)
    status, out = check(path, data=lambda: (train, test), recipe=wrong)
    assert status == 2
    assert "learning_rate` must be as in the file, float32[3]; got float32[4]" in out
    # A claim about other training would lose the learned step sizes.
    other = evaluation(recipes.Recipe(linear.LogisticRegression(64, 10)))
    for claim in (other, None):
        with pytest.raises(ValueError, match=r"learned `objective\.inner\.log.*keeps"):
            eqd.save(path, result, claim)
    eqd.save(path, result.distilled, other)


def test_unrolled_solvers_are_saved(tmp_path, few, check):
    """C2."""
    train, test, start = few
    model = linear.LogisticRegression(64, 10)
    inner = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.5}, 10)
    result = eqd.distill(start, eqd.Bilevel(model, inner), train, steps=2)
    found = eqd.evaluate(result.distilled, model, test, inner=inner)
    assert found.accuracy != eqd.evaluate(result.distilled, model, test).accuracy
    path = tmp_path / "a.safetensors"
    eqd.save(path, result, found)
    status, out = check(path, data=lambda: (train, test))
    assert (status, "difference 0.000 points" in out) == (0, True), out
    for part in ("make=sgd", "hyperparameters=(learning_rate=0.5)", "steps=10"):
        assert part in out


def test_recipes_redraw_foreign_layers():
    """C4."""

    def make(*, key):
        network = nn.ConvNet((8, 8), 10, widths=(4,), norm=None, key=key)
        foreign = eqx.nn.Conv2d(1, 4, 3, padding=1, key=jr.key(0))
        return eqx.tree_at(lambda n: n.layers[1], network, foreign)

    models = recipes.frepo(make).models
    weights = [models.make(key=jr.key(i)).layers[1].weight for i in range(2)]
    kept = make(key=jr.key(0)).layers[1].weight
    assert not any((x == kept).any() for x in weights)
    assert not (weights[0] == weights[1]).any()


def test_settings_survive_a_custom_network(tmp_path, few, check):
    """C6."""
    train, test, start = few
    recipe = recipes.dc(Own, updates=4)
    found = eqd.evaluate(start, recipe, test, num_models=2)
    path = tmp_path / "a.safetensors"
    eqd.save(path, start, found, source="class Own: ...")
    artifact = eqd.load(path)
    assert artifact.source == "class Own: ..."
    words = str(artifact.recipe_description)
    assert words.startswith("dc(updates=4, augment=False, make=Own): The recipe of")
    assert "cross-entropy" in words
    eqd.export(tmp_path / "out", artifact)
    exported = read(tmp_path / "out")
    assert words in str(exported["recipe"])
    np.testing.assert_allclose(exported["l2"], 5e-4, rtol=1e-5)
    status, out = check(path, data=lambda: (train, test), recipe=lambda: recipe)
    assert (status, "difference 0.000 points" in out) == (0, True), out
    status, out = check(path, data=lambda: (train, test))
    assert status == 2
    assert words[:50] in out


def probe(seed):
    network = nn.MLP((8, 8), 10, widths=(6,), key=jr.key(seed))
    last = linear.last_layer(network)
    head = linear.LogisticRegression(6, 10).head
    return recipes.Recipe(linear.LinearClassifier(eqd.Cached(last.features, "x"), head))


def test_backbones_are_identified(tmp_path, few, check):
    """C20."""
    train, test, start = few
    path = tmp_path / "a.safetensors"
    eqd.save(path, start, eqd.evaluate(start, probe(0), test))
    artifact = eqd.load(path)
    (backbone,) = artifact.backbones.values()
    assert backbone.startswith("Network, SHA-256 ")
    assert not any("features" in name for name in artifact.recipe_arrays)
    status, out = check(path, data=lambda: (train, test), recipe=lambda: probe(0))
    assert (status, "difference 0.000 points" in out) == (0, True), out
    assert backbone in out
    status, out = check(path, data=lambda: (train, test), recipe=lambda: probe(1))
    assert status == 2
    assert f"must have the backbone of the file: `features` must be {backbone}" in out
    # Fresh heads on one backbone.
    models = eqd.Fresh(lambda *, key: probe(0).models.model)
    recipe = recipes.Recipe(models, eqd.AutoSolver())
    eqd.save(path, start, eqd.evaluate(start, recipe, test, num_models=1))
    assert eqd.load(path).backbones == artifact.backbones


def regression():
    x, y = sklearn.datasets.make_regression(80, 8, n_targets=2, random_state=0)[:2]
    data = [eqd.Dataset(x[i:, None], y[i:] / y.std()) for i in (0, 40)]
    start = eqd.DistilledSet.from_real(data[0], 20, l2=1e-3, key=jr.key(0))
    return *data, start


def multi_label():
    x, y = sklearn.datasets.make_multilabel_classification(
        80, 8, n_classes=3, random_state=0
    )[:2]
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    data = [eqd.Dataset(x[i:, None], y[i:]) for i in (0, 40)]
    loss = eqd.BinaryCrossEntropy()
    start = eqd.DistilledSet.from_real(data[0], 6, l2=0.01, loss=loss, key=jr.key(0))
    return *data, start


@pytest.mark.parametrize(
    ("problem", "metric"),
    [(regression, "R2"), (multi_label, "mean average precision")],
)
def test_targets(tmp_path, check, problem, metric):
    train, test, start = problem()
    columns = train.num_classes
    model = linear.LogisticRegression(8, columns, use_intercept=True)
    found = eqd.evaluate(start, model, test)
    path = tmp_path / "a.safetensors"
    eqd.save(path, start, found)
    artifact = eqd.load(path)
    assert (artifact.metric, artifact.score) == (metric, found.score)
    assert_same_bits(artifact.distilled, start)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    arrays = (train.images, train.labels, test.images, test.labels)
    np.savez(tmp_path / "data.npz", **dict(zip(names, arrays, strict=True)))
    status, out = check(path, "--data", tmp_path / "data.npz")
    assert status == 0, out
    assert (
        f"test {metric}: claimed {found.score:.6f}, measured {found.score:.6f}" in out
    )
    shifted = lambda: (train, eqd.Dataset(test.images, np.roll(test.labels, 1, 0)))
    assert check(path, data=shifted)[0] == 1

    eqd.export(tmp_path / "out", artifact)
    exported = read(tmp_path / "out")
    assert "labels" not in exported
    np.testing.assert_array_equal(exported["targets"], start.labels)
    assert exported["loss"] == type(start.loss).__name__
    assert exported["claimed_metric"] == metric
    np.testing.assert_allclose(exported["claimed_score"], found.score)
    assert "predicted class" not in str(exported["recipe"])
    files = sorted(x.name for x in (tmp_path / "out" / "images").iterdir())
    assert len(files) == len(start)
    lines = (tmp_path / "out" / "README.txt").read_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert f"{metric} on the test split: {found.score:.4g}" in " ".join(lines)


def claims():
    """Problems of all kinds: what is saved, a recipe, and whether a file can rebuild
    it."""
    digits = [subset(x, 100) for x in eqd.datasets.load("digits")]
    hard = eqd.DistilledSet.from_class_means(digits[0], l2=0.1, key=jr.key(0))
    targets = hard.with_targets(10)
    logits = 4 * jnp.eye(10)
    soft = eqx.tree_at(lambda d: d.labels, hard, logits)
    packed = eqd.Packed.from_distilled(hard, factor=2)
    weights = {"weights": list(range(1, 11)), "class_names": tuple("abcdefghij")}
    weighted = eqd.DistilledSet(hard.images, hard.labels, l2=0.1, **weights)
    model = linear.LogisticRegression(64, 10)
    intercept = linear.LogisticRegression(64, 10, use_intercept=True)
    net = functools.partial(nn.MLP, (8, 8), 10, widths=(8,))
    conv = functools.partial(nn.ConvNet, (8, 8), 10, widths=(4,), norm=None)
    adam = eqd.UnrolledSolver(optax.adam, {"learning_rate": 0.01}, 5)
    loop = eqd.UnrolledSolver(
        functools.partial(optax.sgd, momentum=0.9),
        {"learning_rate": 0.1},
        5,
        batch_size=5,
    )
    learn = {"learn_objective": lambda o: o.inner.log_hyperparameters, "steps": 2}
    run = lambda x, *args, **kwargs: eqd.distill(
        x, eqd.Bilevel(*args), digits[0], **kwargs
    )
    rates = {"learning_rates": [0.1, 0.05], "batch_size": 5}
    published = recipes.learned_rates(net, **rates)
    learned = run(hard, eqd.Fresh(net), published.inner, **learn)
    logs = learned.objective.inner.log_hyperparameters["learning_rate"]
    relearned = recipes.learned_rates(net, **rates | {"learning_rates": jnp.exp(logs)})
    pooled = run(targets, eqd.Pool(net, size=2), steps=2)
    for start, recipe in (
        (hard, model),
        (hard, intercept),
        (targets, model),
        (soft, model),
        (packed, model),
        (weighted, model),
        (weighted.with_targets(10), recipes.feature_regression(net, updates=3)),
        (hard, recipes.Recipe(model, loop)),
        (hard, recipes.Recipe(net(key=jr.key(2)), adam)),
        (hard, recipes.Recipe(eqd.Fresh(net), loop)),
        (pooled, recipes.feature_regression(net, updates=3)),
        (hard, recipes.dc(conv, updates=3)),
        (soft, recipes.zero_start(net, updates=3)),
        (hard, recipes.frepo(net, updates=3)),
        (learned, relearned),
        (eqd.DistilledSet(digits[0].floating(), digits[0].labels, l2=0.1),
         recipes.supervised(net, updates=3, batch_size=20)),
    ):  # fmt: skip
        yield digits, start, recipe, True
    for start, recipe in (
        (hard, recipes.Recipe(Own(key=jr.key(1)), learned_rates())),
        (hard, recipes.dc(Own, updates=3)),
        (hard, recipes.Recipe(eqd.Fresh(Own), learned_rates())),
        (targets, probe(0)),
        (hard, recipes.Recipe(linear.LinearClassifier(jnp.ravel, model.head))),
    ):
        yield digits, start, recipe, False
    for problem in (regression, multi_label):
        train, test, start = problem()
        columns = train.num_classes
        linear_model = linear.LogisticRegression(8, columns, use_intercept=True)
        small = functools.partial(nn.MLP, (1, 8), columns, widths=(8,))
        recipe = recipes.Recipe(eqd.Fresh(small), adam)
        yield (train, test), start, linear_model, True
        yield (train, test), start, recipe, True


@pytest.mark.slow
def test_claims_of_all_kinds(tmp_path, check):
    path, count = tmp_path / "a.safetensors", 0
    for (train, test), start, recipe, is_rebuilt in claims():
        is_result = hasattr(start, "history")
        distilled = start.distilled if is_result else start.decode()
        found = eqd.evaluate(distilled, recipe, test, num_models=2)
        eqd.save(path, start, found)
        assert (eqd.load(path).recipe is not None) == is_rebuilt
        functions = {"data": lambda data=(train, test): data}
        if not is_rebuilt:
            # With other values for the arrays that are in the file.
            blank = jax.tree.map(
                lambda x: 0 * x if eqx.is_inexact_array(x) else x,
                found.recipe,
                is_leaf=lambda x: isinstance(x, nn.Frozen),
            )
            functions["recipe"] = lambda blank=blank: blank
        status, out = check(path, **functions)
        assert (status, "difference 0.000" in out) == (0, True), out
        count += 1
    assert count > 20
