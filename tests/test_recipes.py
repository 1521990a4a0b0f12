"""Evaluation and recipes, against scikit-learn and plain loops over Optax's steps."""

import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import sklearn.linear_model
import sklearn.metrics
from hypothesis import given, settings, strategies as st

import eqdistill as eqd
from eqdistill import nn, recipes

from .conftest import evaluation, OneStep, subset


# Without normalisation: the bias before a normalisation has a gradient of zero, and
# Adam divides its rounding error by itself.
make = functools.partial(nn.ConvNet, (8, 8), 10, widths=(4, 6), norm=None)
draw = lambda recipe: recipe.models.draw(None, key=jr.key(1))
RATES = {"learning_rates": (0.03, 0.01, 0.02), "batch_size": 5}


def sequential(*, key):
    first, last = jr.split(key)
    hidden = [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(64, 16, key=first)]
    norm = [eqx.nn.LayerNorm(16), eqx.nn.Lambda(jax.nn.relu)]
    return eqx.nn.Sequential([*hidden, *norm, eqx.nn.Linear(16, 10, key=last)])


def with_dropout(*, key):
    return eqx.nn.Sequential([eqx.nn.Dropout(0.2), *sequential(key=key)])


class Untrained(OneStep):
    def __call__(self, distilled, model, state, *, key):
        return eqd.Fitted(model, jnp.array(True), jnp.array(0.0)), None


@pytest.fixture(scope="module")
def real(digits):
    return eqd.DistilledSet.from_real(digits[0], l2=0.1, key=jr.key(0))


@pytest.mark.parametrize("loss", [eqd.CrossEntropy(), eqd.SquaredError()])
def test_linear_model_is_as_by_scikit_learn(real, digits, loss):
    x, x_test = (np.reshape(d, (-1, 64)) for d in (real.images, digits[1].floating()))
    y, y_test = real.labels, digits[1].labels
    if isinstance(loss, eqd.CrossEntropy):
        # `C` is the inverse of the ridge, for a sum over the ten images.
        reference = sklearn.linear_model.LogisticRegression(
            C=1 / (10 * 0.1), fit_intercept=False, tol=1e-6, max_iter=1000
        )
        logits = reference.fit(x, y).decision_function(x_test)
    else:
        reference = sklearn.linear_model.Ridge(alpha=10 * 0.1, fit_intercept=False)
        logits = reference.fit(x, np.eye(10)[y] - 0.1).predict(x_test) / 0.2
    distilled = eqd.DistilledSet(real.images, y, l2=0.1, loss=loss)
    got = eqd.evaluate(distilled, eqd.linear.LogisticRegression(64, 10), digits[1])
    assert got.scores.shape == got.metrics["loss"].shape == (1, 1)
    wanted = sklearn.metrics.accuracy_score(y_test, logits.argmax(axis=1))
    np.testing.assert_allclose(got.accuracy, wanted, atol=1.5 / len(y_test))
    wanted = sklearn.metrics.log_loss(y_test, jax.nn.softmax(logits))
    np.testing.assert_allclose(got.loss, wanted, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "recipe"),
    [
        (sequential, recipes.zero_start),
        pytest.param(with_dropout, recipes.feature_regression, marks=pytest.mark.slow),
    ],
)
def test_own_models(real, digits, own, recipe):
    train, test = subset(digits[0], 200), subset(digits[1], 200)
    start = eqd.DistilledSet(train.floating(), train.labels, l2=1e-3)
    adam = eqd.UnrolledSolver(optax.adam, {"learning_rate": 0.01}, steps=100)
    found = eqd.evaluate(start, eqd.Fresh(own), test, inner=adam, num_models=2)
    assert found.accuracy > 0.7
    assert found.std_models > 0
    outputs = jax.vmap(eqx.nn.inference_mode(found.fitted.model))(test.floating())
    wanted = sklearn.metrics.accuracy_score(test.labels, outputs.argmax(axis=1))
    np.testing.assert_allclose(found.scores[0, 1], wanted, atol=1e-6)
    # A plain model starts from its own parameters.
    model = own(key=jr.key(0))
    found = eqd.evaluate(start, model, test, inner=Untrained())
    assert eqx.tree_equal(found.fitted.model, model)
    # One real image of each class is enough to beat chance.
    assert eqd.evaluate(real, recipe(own), test, num_models=1).accuracy > 0.2


def test_progress_bar_counts_models(real, digits, capsys):
    model = eqd.Fresh(lambda *, key: eqd.linear.LogisticRegression(64, 10))
    test = subset(digits[1], 200)
    found = eqd.evaluate(real, model, test, num_models=2, progress=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert f"accuracy={found.accuracy:.4f}" in shown


def test_output_of_nan_is_wrong():
    class Model(eqx.Module):
        weight: jax.Array

        def __call__(self, image):
            return jnp.where(image > 2, jnp.nan, self.weight * image)

    test = eqd.Dataset(np.array([[2.0, 1.0], [3.0, 1.0], [1.0, 2.0]]), [0, 0, 1], 2)
    start = eqd.DistilledSet(jnp.ones((2, 2)), jnp.arange(2), l2=0.1)
    found = eqd.evaluate(start, Model(jnp.array(1.0)), test, inner=Untrained())
    assert repr(found) == str(found) == "66.7%"


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_statistics(num_sets, num_models, seed):
    rows = np.random.default_rng(seed).random((num_sets, num_models))
    found = evaluation(recipes.Recipe(eqx.nn.Identity()))
    found = dataclasses.replace(
        found,
        metrics={"accuracy": rows, "loss": 2 * rows},
        per_class=np.stack([rows], axis=-1),
    )
    np.testing.assert_allclose([found.accuracy, found.loss / 2], rows.mean())
    models = sets = math.nan
    if num_models > 1:
        models = math.sqrt(rows.var(axis=1, ddof=1).mean())
    if num_sets > 1:
        sets = rows.mean(axis=1).std(ddof=1)
    np.testing.assert_allclose([found.std_models, found.std_sets], [models, sets])
    if num_sets == 1 and num_models > 1:
        words = f"{found.accuracy:.1%} ± {models:.1%} ({num_models} models)"
        assert repr(found) == words


def train(network, optimiser, losses):
    state = optimiser.init(eqx.filter(network, eqx.is_inexact_array))
    for loss in losses:
        gradient = eqx.filter_jit(eqx.filter_grad(loss))(network)
        updates, state = optimiser.update(gradient, state)
        network = eqx.apply_updates(network, updates)
    return network


def cosine(peak, warm_up=0):
    decay = lambda t: 0.99 * 0.5 * (1 + jnp.cos(jnp.pi * t / (10 - warm_up))) + 0.01
    rise = lambda t: t / max(warm_up, 1)
    return lambda t: peak * jnp.where(t < warm_up, rise(t), decay(t - warm_up))


def assert_close(got, wanted, rtol=1e-4, atol=2e-5):
    got, wanted = (jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (got, wanted))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


OPTIMISERS = {
    "dc": optax.sgd(lambda t: jnp.where(jnp.less(t, 5), 0.01, 0.001), momentum=0.9),
    "frepo": optax.adam(cosine(3e-4, 5)),
    "zero_start": optax.adam(cosine(1e-3)),
    "feature_regression": optax.adam(cosine(3e-4)),
}


slow = lambda x: pytest.param(x, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name", ["dc", *map(slow, ("feature_regression", "frepo", "zero_start"))]
)
def test_training_is_as_by_hand(real, name):
    recipe = getattr(recipes, name)(make, updates=10)
    targets = np.eye(10)[np.asarray(real.labels)] - 0.1

    def loss(network):
        z = jax.vmap(network)(real.images)
        if name != "dc":
            return 0.5 * jnp.mean(jnp.sum((z - targets) ** 2, axis=1))
        weights = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
        decay = 2.5e-4 * sum(jnp.sum(x**2) for x in weights)
        return decay - jnp.mean(jnp.sum((targets + 0.1) * jax.nn.log_softmax(z), 1))

    wanted = train(draw(recipe), OPTIMISERS[name], 10 * [loss])
    got = eqd.fit(recipe.prepare(real, 10), draw(recipe), recipe.inner).model
    if name != "feature_regression":
        return assert_close(got, wanted)
    features = jax.vmap(eqd.linear.last_layer(wanted).features)(real.images)
    # The ridge is 1e-3 for features whose mean squared norm is the number of images.
    features = np.asarray(features, np.float64) * 10 / np.linalg.norm(features)
    ridge = sklearn.linear_model.Ridge(alpha=10 * 1e-3, fit_intercept=False)
    wanted = ridge.fit(features, targets).predict(features)
    assert_close(jax.vmap(got)(real.images), jnp.array(wanted), 1e-3, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("adam", [True, slow(False)])
def test_learned_rates_are_used_in_turn(real, adam):
    recipe = recipes.learned_rates(make, **RATES, momentum=0.8, adam=adam, seed=4)
    network = draw(recipe)
    assert eqx.tree_equal(network, make(key=jr.key(4)))
    schedule = lambda step: jnp.array(RATES["learning_rates"])[step]
    by_adam = optax.adam(schedule, b1=0.8, eps_root=1e-8)
    optimiser = by_adam if adam else optax.sgd(schedule, momentum=0.8)
    rows = lambda x: eqd.DistilledSet(real.images[x], real.labels[x], l2=0.1)
    batches = [slice(5), slice(5, 10), slice(5)]
    losses = [functools.partial(eqd.inner_loss, rows(x)) for x in batches]
    got = eqd.fit(recipe.prepare(real, 10), network, recipe.inner).model
    assert_close(got, train(network, optimiser, losses))


def test_models_are_drawn_as_the_recipe_says():
    # The first bias and the last weight: LeCun's biases are zero, PyTorch's are not.
    zeros = {"dc": [], "frepo": [0], "zero_start": [1], "feature_regression": [0, 1]}
    for name, wanted in zeros.items():
        layers = draw(getattr(recipes, name)(make)).layers
        arrays = layers[1].bias, layers[-1].weight
        assert [i for i in (0, 1) if not arrays[i].any()] == wanted


def test_labels_become_targets(real):
    logits = 2 * jnp.eye(10)
    soft = eqd.DistilledSet(real.images, logits, l2=0.1)
    learned = eqd.DistilledSet(real.images, logits, l2=0.1, loss=eqd.SquaredError())
    prepare = recipes.frepo(make).prepare
    assert_close(prepare(soft, 10).labels, jax.nn.softmax(logits) - 0.1)
    assert_close(prepare(learned, 10).labels, logits, 0, 0)
    assert prepare(soft, 10).l2 == 0
    assert_close(recipes.dc(make).prepare(real, 10).l2, jnp.array(5e-4))


def test_scores_are_as_in_the_paper():
    score = recipes.label_robust_score
    best = score(hard_label_recovery=-1.0, improvement_over_random=1.0)
    worst = score(hard_label_recovery=1.0, improvement_over_random=-1.0)
    np.testing.assert_allclose([best, worst], [1.0, 0.0])
    # alpha is 0.5 * 0.3 - 0.5 * 0.1.
    labels = score(hard_label_recovery=0.1, improvement_over_random=0.3)
    augmentation = recipes.augmentation_robust_score(
        improvement_with=0.0, improvement_without=0.4, weight=0.75
    )
    wanted = (math.exp(0.1) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    np.testing.assert_allclose([labels, augmentation], wanted)


@pytest.mark.slow
def test_models_differ_and_are_the_same_for_all_sets(real, digits):
    recipe = recipes.zero_start(make, updates=10)
    found = eqd.evaluate([real, real], recipe, digits[1])
    assert found.scores.shape == (2, 5)
    np.testing.assert_array_equal(*found.scores)
    assert found.std_models > 0
    one = eqd.evaluate(real, recipe, digits[1], num_models=2, key=jr.key(0))
    np.testing.assert_array_equal(one.scores, found.scores[:1, :2])


def test_bad_input(real, digits):
    test = subset(digits[1], 20)
    dc = recipes.dc(make, updates=2)
    soft = eqd.DistilledSet(real.images, 4 * jnp.eye(10), l2=0.1)
    small = eqd.DistilledSet(jnp.ones((10, 9, 9)), jnp.arange(10), l2=0.1)
    nine = eqd.DistilledSet(real.images[:9], real.labels[:9], l2=0.1)
    linear = eqd.linear.LogisticRegression(64, 9)
    for match, distilled, recipe, keywords in [
        (r"class indices.*\(10, 10\)", soft, dc, {}),
        (r"`test` and `distilled`.*\(8, 8\).*\(9, 9\)", small, dc, {}),
        ("10 classes or targets of `test`; got 9", nine, linear, {}),
        ("`inner` must be left out", real, dc, {"inner": Untrained()}),
    ]:
        with pytest.raises((TypeError, ValueError), match=match):
            eqd.evaluate(distilled, recipe, test, **keywords)
