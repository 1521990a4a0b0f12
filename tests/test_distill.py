"""The outer loop: optimisers, what is learned, failures, results."""

import copy
import functools as ft
import logging
import pickle

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optax.contrib
import optimistix as optx
import pytest

import eqdistill as eqd

from .conftest import ADAM, hypergradient, LBFGS, SGD, subset


STEPS = 12
OPTIMISERS = {
    "adam": ADAM,
    "clipped, with a schedule": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.sgd(optax.cosine_decay_schedule(1.0, STEPS)),
    ),
    "lbfgs": optax.lbfgs(),
    "lbfgs without line search": LBFGS,
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optax_optimiser(logistic, name):
    start, objective, train = logistic
    if name == "adam":  # Once with the default solver: a model stands for `Bilevel`.
        objective = eqd.linear.LogisticRegression(64, 10)
    args = {"optimiser": OPTIMISERS[name], "steps": STEPS}
    result = eqd.distill(start, objective, train, **args)
    history = result.history
    assert isinstance(result.objective, eqd.Bilevel)
    assert len(history) == STEPS
    loss, gradient = hypergradient(start, objective, train)
    np.testing.assert_allclose(history.loss[0], loss, rtol=1e-5)
    norm = jnp.linalg.norm(gradient.images)
    np.testing.assert_allclose(history.gradient_norm[0], norm, rtol=1e-3)
    assert np.isfinite(history.metrics["inner_residual"]).all()
    final, _ = hypergradient(result.distilled, objective, train)
    assert final < history.loss[-1] + 0.05 < history.loss[0]
    assert result.learned == ("images",)
    assert not jnp.array_equal(result.distilled.images, start.images)
    assert jnp.array_equal(result.distilled.labels, start.labels)
    assert jnp.array_equal(result.distilled.log_l2, start.log_l2)


def test_each_array_has_its_own_optimiser(logistic):
    hard, objective, train = logistic
    start = eqd.DistilledSet(hard.images, 3 * jnp.eye(10), l2=0.05)
    rates = {"images": optax.adam(0.05), "labels": optax.sgd(0.5)}
    names = lambda learned: jax.tree.map_with_path(
        lambda path, _: path[-1].name, learned
    )
    optimiser = optax.multi_transform(rates | {"log_l2": optax.sgd(0.0)}, names)
    args = {"optimiser": optimiser, "steps": STEPS, "learn": lambda s: s}
    result = eqd.distill(start, objective, train, **args)
    assert result.learned == ("images", "labels", "log_l2")
    assert result.history.loss[-1] < result.history.loss[0]
    assert not jnp.array_equal(result.distilled.labels, start.labels)
    assert not jnp.array_equal(result.distilled.images, start.images)
    assert jnp.array_equal(result.distilled.log_l2, start.log_l2)


def test_a_long_compilation_is_reported(logistic, caplog, monkeypatch):
    monkeypatch.setattr("eqdistill._outer._distill._PATIENCE_SECONDS", 0.0)
    caplog.set_level(logging.WARNING, "eqdistill")
    eqd.distill(*logistic, optimiser=optax.sgd(0.1), steps=2)
    assert [text[:31] for text in caplog.messages] == [
        "Still compiling the first step."
    ]


def failed(start, objective, train, optimiser, match):
    with pytest.raises(eqd.DistillationError, match=match) as info:
        eqd.distill(start, objective, train, optimiser=optimiser)
    return info.value


@pytest.mark.parametrize(
    "case", ["linear", pytest.param("pool", marks=pytest.mark.slow)]
)
def test_rank_promotion_may_raise(digits, case):
    train = subset(digits[0], 60)
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=0.3, key=jr.key(0))
    objective, data = eqd.linear.LogisticRegression(64, 10), train
    if case == "pool":
        start = start.with_targets(10)
        make = ft.partial(eqd.nn.ConvNet, (8, 8), 10, widths=(4,))
        objective = eqd.Bilevel(eqd.Pool(make, size=2))
        data = eqd.Batches(train, 20, augmentation=eqd.augment.Affine())
    with jax.numpy_rank_promotion("raise"):
        result = eqd.distill(start, objective, data, steps=2)
    assert np.isfinite(result.history.loss).all()


def test_multi_steps(logistic):
    # With all data, two halves of an update are the update.
    run = lambda **kwargs: eqd.distill(*logistic, **kwargs).distilled.images
    twice = run(optimiser=optax.MultiSteps(SGD, 2), steps=2)
    np.testing.assert_allclose(twice, run(optimiser=SGD, steps=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "optimiser"),
    [
        ("lookahead", optax.lookahead(SGD, 5, 0.5)),
        ("sam", optax.contrib.sam(SGD, SGD)),
        ("sophia", optax.chain(optax.clip(1.0), optax.contrib.sophia(0.1))),
        ("schedule_free", optax.contrib.schedule_free(SGD, 1.0)),
        ("schedule_free", optax.contrib.schedule_free_adamw(0.1)),
    ],
)
def test_optimisers_that_are_refused(logistic, name, optimiser):
    with pytest.raises(ValueError, match=f"`optimiser` must not be `{name}`: it"):
        eqd.distill(*logistic, optimiser=optimiser)


@pytest.mark.parametrize("learning_rate", [1e25, float("inf")])
def test_divergence_returns_the_last_good_set(logistic, learning_rate):
    start, objective, train = logistic
    error = failed(*logistic, optax.sgd(learning_rate), "Distillation stopped at step")
    result = error.distillation
    assert np.isfinite(result.history.loss).all()
    at_end, at_start = (
        hypergradient(x, objective, train)[0] for x in (result.distilled, start)
    )
    assert at_end <= at_start + 1e-4


def test_an_update_that_is_not_finite_is_not_made(logistic):
    # The learning rate is harmless for four steps.
    optimiser = optax.sgd(lambda step: jnp.where(jnp.asarray(step) < 4, 1.0, jnp.inf))
    match = "at step 4: the updated distilled set is not finite"
    result = failed(*logistic, optimiser, match).distillation
    assert len(result.history) == 4
    loss, _ = hypergradient(result.distilled, *logistic[1:])
    assert loss < result.history.loss[-1]


def test_an_error_of_the_inner_solver(logistic):
    start, _, train = logistic
    model = eqd.linear.LogisticRegression(64, 10)
    objective = eqd.Bilevel(model, eqd.linear.SpanSolver(max_steps=1))
    error = failed(start, objective, train, ADAM, "inner solver did not converge")
    # Errors can be copied, and sent to another process.
    for same in (copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert str(same) == str(error)
        assert len(same.distillation.history) == 0
        assert jnp.array_equal(same.distillation.distilled.images, start.images)


@pytest.mark.slow
def test_an_adjoint_that_raises(logistic):
    start, _, train = logistic
    useless = eqd.adjoints.DampedCG(rtol=1e-30, accept=0.0, max_residual=0.0)
    minimiser = optx.OptaxMinimiser(SGD, rtol=1e-4, atol=1e-4)
    inner = eqd.ArgminSolver(minimiser, optx.ImplicitAdjoint(useless))
    objective = eqd.Bilevel(eqd.linear.LogisticRegression(64, 10), inner)
    error = failed(
        start, objective, train, ADAM, "the objective or `data` raised the error above"
    )
    assert "hypergradient is useless" in str(error.__cause__)
    assert jnp.array_equal(error.distillation.distilled.images, start.images)
