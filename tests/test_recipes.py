"""Recipes: what they do, written out by hand, and what they say."""

import functools
import math
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd
from eqdistill import nn, recipes

from .conftest import subset


# Without normalisation: the bias before one has a gradient of zero, and Adam divides by
# its rounding.
SMALL = functools.partial(nn.ConvNet, widths=(4, 6), norm=None)
STEPS = 10


@pytest.fixture(scope="module")
def real(digits):
    return eqd.DistilledSet.from_real(digits[0], l2=0.1, key=jr.key(0))


def weights_by_hand(recipe, network, distilled, targets, rate):
    """Ten steps in plain JAX. `rate` gives the learning rate of a step."""
    params, static = eqx.partition(network, eqx.is_inexact_array)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def loss(params):
        z = jax.vmap(eqx.combine(params, static))(distilled.images)
        if recipe != "dc":
            return 0.5 * jnp.mean(jnp.sum((z - targets) ** 2, axis=1))
        log_p = z - jax.scipy.special.logsumexp(z, axis=1, keepdims=True)
        squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        return -jnp.mean(jnp.sum(targets * log_p, axis=1)) + 2.5e-4 * squares

    def adam(m, v, t):
        m, v = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
        return m / (jnp.sqrt(v) + 1e-8)

    @jax.jit
    def step(params, m, v, t, rate):
        g = jax.grad(loss)(params)
        if recipe == "dc":
            update = m = jax.tree.map(lambda m, g: 0.9 * m + g, m, g)
        else:
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
            v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
            update = jax.tree.map(lambda m, v: adam(m, v, t), m, v)
        return jax.tree.map(lambda w, u: w - rate * u, params, update), m, v

    m, v = zeros, zeros
    for t in range(STEPS):
        params, m, v = step(params, m, v, float(t), rate(t))
    return params


def cosine(peak, warm_up):
    def rate(t):
        if t < warm_up:
            return peak * t / warm_up
        share = (t - warm_up) / (STEPS - warm_up)
        return peak * (0.99 * 0.5 * (1 + math.cos(math.pi * share)) + 0.01)

    return rate


RATES = {
    "dc": lambda t: 0.01 if t < STEPS // 2 else 0.001,
    "frepo": cosine(3e-4, STEPS // 2),
    "zero_start": cosine(1e-3, 0),
}


@pytest.mark.parametrize(
    "name",
    [
        "dc",
        pytest.param("frepo", marks=pytest.mark.slow),
        pytest.param("zero_start", marks=pytest.mark.slow),
    ],
)
def test_training_is_as_by_hand(real, digits, name):
    recipe = getattr(recipes, name)(SMALL, updates=STEPS)
    network = recipe.make((8, 8), 10, key=jr.key(1))
    one_hot = np.eye(10)[np.asarray(real.labels)]
    targets = one_hot if name == "dc" else one_hot - 0.1
    wanted = weights_by_hand(name, network, real, targets, RATES[name])
    prepared = recipe.prepare(real, 10)
    fitted = eqd.fit(prepared, network, recipe.inner)
    got = eqx.filter(fitted.model, eqx.is_inexact_array)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def test_last_layer_is_fitted_anew_to_the_features(real):
    recipe = recipes.feature_regression(SMALL, updates=STEPS)
    network = recipe.make((8, 8), 10, key=jr.key(1))
    targets = np.eye(10)[np.asarray(real.labels)] - 0.1
    found = eqd.fit(recipe.prepare(real, 10), network, recipe.inner).model

    params = weights_by_hand("frepo", network, real, targets, cosine(3e-4, 0))
    trained = eqx.combine(params, network)
    features = jax.vmap(eqd.last_layer(trained).features)(real.images)
    features = np.asarray(features, np.float64)
    # The ridge is 1e-3 for features whose mean squared norm is the number of images.
    n = len(features)
    features *= n / np.linalg.norm(features)
    kernel = features @ features.T
    wanted = kernel @ np.linalg.solve(kernel + n * 1e-3 * np.eye(n), targets)
    got = jax.vmap(found)(real.images)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adam", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_learned_rates_are_one_for_each_step(real, adam):
    rates = [0.03, 0.01, 0.02]
    recipe = recipes.learned_rates(
        SMALL, learning_rates=rates, batch_size=5, momentum=0.8, adam=adam, seed=4
    )
    network = recipe.make((8, 8), 10, key=jr.key(1))
    assert eqx.tree_equal(network, SMALL((8, 8), 10, key=jr.key(4)))
    got = eqd.fit(recipe.prepare(real, 10), network, recipe.inner).model

    schedule = lambda step: jnp.array(rates)[step]
    optimiser = (
        optax.adam(schedule, b1=0.8, eps_root=1e-8)
        if adam
        else optax.sgd(schedule, momentum=0.8)
    )
    state = optimiser.init(eqx.filter(network, eqx.is_inexact_array))
    for step in range(3):
        batch = slice(5 * (step % 2), 5 * (step % 2) + 5)
        half = eqd.DistilledSet(real.images[batch], real.labels[batch], l2=0.1)
        gradient = eqx.filter_grad(lambda x, half=half: eqd.inner_loss(half, x))(
            network
        )
        updates, state = optimiser.update(gradient, state)
        network = eqx.apply_updates(network, updates)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(network), strict=True):
        if eqx.is_array(x):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_networks_are_drawn_as_the_recipe_says():
    make = lambda recipe: recipe(SMALL).make((8, 8), 10, key=jr.key(0)).layers
    first, last = 1, -1
    assert make(recipes.dc)[first].bias.any()  # PyTorch draws biases too.
    assert make(recipes.dc)[last].weight.any()
    assert not make(recipes.frepo)[first].bias.any()
    assert make(recipes.frepo)[last].weight.any()
    assert make(recipes.zero_start)[first].bias.any()
    assert not make(recipes.zero_start)[last].weight.any()
    assert not make(recipes.feature_regression)[first].bias.any()
    assert not make(recipes.feature_regression)[last].weight.any()
    wide = eqx.filter_eval_shape(recipes.frepo().make, (28, 28), 10, key=jr.key(0))
    assert dict(wide.settings)["widths"] == (128, 256, 512)


def test_what_labels_stand_for(real):
    soft = eqd.DistilledSet(real.images, 2 * jnp.eye(10), l2=0.1)
    learned = eqd.DistilledSet(
        real.images, 2 * jnp.eye(10), l2=0.1, loss=eqd.SquaredError()
    )
    prepare = recipes.frepo(SMALL).prepare
    np.testing.assert_allclose(
        prepare(soft, 10).labels, jax.nn.softmax(2 * jnp.eye(10)) - 0.1, rtol=1e-6
    )
    np.testing.assert_array_equal(prepare(learned, 10).labels, learned.labels)
    assert prepare(soft, 10).l2 == 0
    np.testing.assert_allclose(recipes.dc(SMALL).prepare(real, 10).l2, 5e-4, rtol=1e-6)


def test_deviations_are_what_they_say():
    found = recipes.Evaluations(np.array([[0.5, 0.7], [0.8, 0.8]]))
    np.testing.assert_allclose(found.mean, 0.7)
    # Variances of 0.02 and 0 on the two sets, whose means are 0.6 and 0.8.
    np.testing.assert_allclose(found.deviation_of_networks, np.sqrt(0.01))
    np.testing.assert_allclose(found.deviation_of_sets, np.sqrt(0.02))
    one = recipes.Evaluations(np.array([[0.5]]))
    assert math.isnan(one.deviation_of_networks)
    assert math.isnan(one.deviation_of_sets)


def test_scores_are_those_of_the_paper():
    score = recipes.label_robust_score
    best = score(hard_label_recovery=-1.0, improvement_over_random=1.0)
    worst = score(hard_label_recovery=1.0, improvement_over_random=-1.0)
    np.testing.assert_allclose([best, worst], [1.0, 0.0])
    # alpha is 0.5 * 0.3 - 0.5 * 0.1.
    got = score(hard_label_recovery=0.1, improvement_over_random=0.3)
    wanted = (math.exp(0.1) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    np.testing.assert_allclose(got, wanted)
    got = recipes.augmentation_robust_score(
        improvement_with=0.0, improvement_without=0.4, weight=0.75
    )
    np.testing.assert_allclose(got, wanted)
    with pytest.raises(ValueError, match="`hard_label_recovery` must be from -1 to 1"):
        score(hard_label_recovery=37.0, improvement_over_random=0.0)


def test_networks_differ_and_are_the_same_for_all_sets(real, digits):
    test = subset(digits[1], 200)
    recipe = recipes.zero_start(SMALL, updates=STEPS)
    run = lambda sets: recipes.evaluate(
        sets, recipe, test, num_networks=3, key=jr.key(0)
    )
    found = run([real, real])
    assert found.accuracies.shape == (2, 3)
    np.testing.assert_array_equal(*found.accuracies)
    assert found.deviation_of_networks > 0
    assert found.deviation_of_sets == 0
    np.testing.assert_array_equal(run(real).accuracies, found.accuracies[:1])


@pytest.mark.slow
def test_ordinary_training_on_real_data(digits):
    train, test = digits
    real = eqd.DistilledSet(train.floating(), train.labels, l2=1.0)
    recipe = recipes.supervised(functools.partial(nn.ConvNet, widths=(8, 16)))
    found = recipes.evaluate(real, recipe, test, num_networks=1, key=jr.key(0))
    assert found.mean > 0.97


SCRIPT = """
import functools, jax.random as jr, eqdistill as eqd
train, test = eqd.datasets.load("digits")
real = eqd.DistilledSet.from_real(train, l2=0.1, key=jr.key(0))
recipe = eqd.recipes.dc(functools.partial(eqd.nn.ConvNet, widths=(4,)), updates=20)
found = eqd.recipes.evaluate(real, recipe, test, num_networks=2, key=jr.key(0))
print(found.accuracies.tobytes().hex())
"""


@pytest.mark.slow
def test_same_seed_same_figures_in_two_processes():
    run = lambda: (
        subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
        ).stdout
    )
    assert run() == run() != ""


def test_bad_input(real, digits):
    test = subset(digits[1], 20)
    evaluate = functools.partial(recipes.evaluate, num_networks=1, key=jr.key(0))
    dc = recipes.dc(SMALL, updates=2)
    soft = eqd.DistilledSet(real.images, 4 * jnp.eye(10), l2=0.1)
    with pytest.raises(ValueError, match=r"must have hard labels.*`dc`.*\(10, 10\)"):
        evaluate(soft, dc, test)
    with pytest.raises(ValueError, match="`num_networks` must be at least 1; got 0"):
        recipes.evaluate(real, dc, test, num_networks=0, key=jr.key(0))
    with pytest.raises(ValueError, match="`distilled` must hold at least one"):
        evaluate([], dc, test)
    other = eqd.DistilledSet(jnp.ones((10, 9, 9)), jnp.arange(10), l2=0.1)
    with pytest.raises(ValueError, match=r"`test` and `distilled`.*\(8, 8\).*\(9, 9\)"):
        evaluate(other, dc, test)
    for recipe in (
        recipes.dc,
        recipes.frepo,
        recipes.zero_start,
        recipes.feature_regression,
        recipes.supervised,
    ):
        with pytest.raises(ValueError, match=r"`updates` must be from 2 to.*got 1"):
            recipe(SMALL, updates=1)

    def with_batch_norm(shape, num_classes, *, key):
        layers = [
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.BatchNorm(64, "batch", mode="batch"),
            eqx.nn.Linear(64, 10, key=key),
        ]
        return eqx.nn.Sequential(layers)

    with pytest.raises(TypeError, match="`model` must not hold state"):
        evaluate(real, recipes.dc(with_batch_norm, updates=2), test)
