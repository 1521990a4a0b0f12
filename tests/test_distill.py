import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import pytest

import eqdistill as eqd

from .conftest import (
    ADAM,
    CNN,
    hypergradient,
    LBFGS,
    MLP,
    OneStep,
    SGD,
    small_noise,
    subset,
)


STEPS = 12
ONE_STEP = OneStep()
OPTIMISERS = {
    "adam": ADAM,
    "clipped, with a schedule": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.sgd(optax.cosine_decay_schedule(1.0, STEPS)),
    ),
    "lbfgs": optax.lbfgs(),
    "lbfgs without line search": LBFGS,
}


@pytest.fixture(scope="module")
def problem(digits):
    train = subset(digits[0], 300)
    return small_noise(train, l2=0.05), eqd.LogisticRegression(64, 10), train


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optax_optimiser(problem, name):
    start, model, train = problem
    # The convex solver once, and else one that is soon compiled.
    inner = eqd.AutoSolver() if name == "adam" else ONE_STEP
    result = eqd.distill(*problem, inner=inner, optimiser=OPTIMISERS[name], steps=STEPS)
    history = result.history
    assert len(history) == STEPS
    # The history is that of the public outer loss and its gradient.
    loss, gradient = hypergradient(start, model, train, inner)
    np.testing.assert_allclose(history.loss[0], loss, rtol=1e-5)
    norm = jnp.linalg.norm(gradient.images)
    np.testing.assert_allclose(history.gradient_norm[0], norm, rtol=1e-3)
    assert np.isfinite(history.inner_residual).all()
    final, _ = hypergradient(result.distilled, model, train, inner)
    assert final < history.loss[-1] + 0.05 < history.loss[0]
    # Only the images were learned.
    assert result.learned == ("images",)
    assert not jnp.array_equal(result.distilled.images, start.images)
    assert jnp.array_equal(result.distilled.labels, start.labels)
    assert jnp.array_equal(result.distilled.log_l2, start.log_l2)


def test_batches(digits):
    # At a learning rate of zero, the mean of an epoch's losses is the full loss.
    train = subset(digits[0], 60)
    start = small_noise(train, l2=0.05)
    model = eqd.LogisticRegression(64, 10)
    still = optax.sgd(0.0)
    run = lambda seed: eqd.distill(
        start,
        model,
        eqd.Batches(train, 10),
        inner=ONE_STEP,
        optimiser=still,
        steps=12,
        key=jr.key(seed),
    )
    loss = eqd.evaluate(start, model, train, ONE_STEP).loss
    losses = run(0).history.loss
    np.testing.assert_allclose(losses[:6].mean(), loss, rtol=1e-5)
    np.testing.assert_allclose(losses[6:].mean(), loss, rtol=1e-5)
    assert not np.allclose(losses[:6], losses[6:], rtol=1e-5)
    np.testing.assert_array_equal(losses, run(0).history.loss)
    assert not np.allclose(losses, run(1).history.loss, rtol=1e-5)


def test_tolerance_stops(problem):
    args = {"inner": ONE_STEP, "optimiser": LBFGS}
    result = eqd.distill(*problem, **args, steps=50, tolerance=0.25)
    assert result.converged
    norms = result.history.gradient_norm
    assert norms[-1] <= 0.25 < norms[:-1].min()
    # It stops where the gradient was measured, not a step beyond.
    _, gradient = hypergradient(result.distilled, *problem[1:], ONE_STEP)
    np.testing.assert_allclose(jnp.linalg.norm(gradient.images), norms[-1], rtol=1e-2)


def test_what_is_learned_is_a_filter(problem):
    start, model, train = problem
    start = eqd.DistilledSet(start.images, start.labels, l2=1.0)
    # Such that one step depends on the ridge.
    weight = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    model = eqx.tree_at(lambda c: c.head.weight, model, 0.1 * weight)
    nothing = jax.tree.map(lambda _: False, start)
    learn = (eqx.tree_at(lambda d: d.log_l2, nothing, True), False)
    args = {"inner": ONE_STEP, "optimiser": ADAM, "steps": STEPS}
    result = eqd.distill(start, model, train, learn=learn, **args)
    assert result.learned == ("log_l2",)
    assert jnp.array_equal(result.distilled.images, start.images)
    assert result.distilled.l2 < 0.9
    assert result.history.loss[-1] < 0.9 * result.history.loss[0]


def diverge(problem, optimiser, inner=ONE_STEP, match="Distillation stopped"):
    """What is left of a run that fails."""
    with pytest.raises(eqd.DistillationError, match=match) as info:
        eqd.distill(*problem, inner=inner, optimiser=optimiser)
    return info.value


@pytest.mark.parametrize("learning_rate", [1e25, float("inf")])
def test_divergence_returns_the_last_good_set(problem, learning_rate):
    result = diverge(problem, optax.sgd(learning_rate)).distillation
    assert np.isfinite(result.history.loss).all()
    at_end, at_start = (
        eqd.evaluate(x, *problem[1:], ONE_STEP).loss
        for x in (result.distilled, problem[0])
    )
    assert at_end <= at_start + 1e-4


def test_last_good_set_is_that_of_the_last_step(problem):
    # The learning rate is harmless for four steps.
    optimiser = optax.sgd(lambda step: jnp.where(jnp.asarray(step) < 4, 1.0, jnp.inf))
    match = "stopped at step 5: the updated distilled set is not finite"
    result = diverge(problem, optimiser, match=match).distillation
    assert len(result.history) == 5
    loss = eqd.evaluate(result.distilled, *problem[1:], ONE_STEP).loss
    np.testing.assert_allclose(loss, result.history.loss[-1], rtol=1e-5)


def test_inner_failure_returns_the_last_good_set(problem):
    inner = eqd.SpanSolver(max_steps=1)
    result = diverge(problem, ADAM, inner, "inner solver did not converge").distillation
    assert len(result.history) == 0
    assert jnp.array_equal(result.distilled.images, problem[0].images)


@pytest.mark.slow
def test_useless_adjoint_returns_the_last_good_set(problem):
    useless = eqd.DampedCG(rtol=1e-30, accept=0.0, max_residual=0.0)
    minimiser = optx.OptaxMinimiser(SGD, rtol=1e-4, atol=1e-4)
    inner = eqd.ArgminSolver(minimiser, optx.ImplicitAdjoint(useless))
    error = diverge(problem, ADAM, inner, "inner solver raised")
    assert "hypergradient is useless" in str(error.__cause__)
    images = error.distillation.distilled.images
    assert jnp.array_equal(images, problem[0].images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda key: CNN(key=key),
        lambda key: MLP(64, 32, jax.nn.softplus, key=key),
    ],
    ids=["softplus CNN", "softplus MLP"],
)
def test_networks(digits, make):
    train, test = digits
    model = make(jr.key(11))
    for l2 in (0.1, 0.01):
        # The second reuses what was compiled for the first.
        start = eqd.DistilledSet.from_noise(train, l2=l2, scale=0.3, key=jr.key(1))
        result = eqd.distill(start, model, train, steps=60)
        evaluation = eqd.evaluate(result.distilled, model, test)
        assert evaluation.accuracy >= 0.8


def test_each_part_has_its_own_optimiser(problem):
    hard, model, train = problem
    start = eqd.DistilledSet(hard.images, 3 * jnp.eye(10), l2=hard.l2)
    labels = eqx.tree_at(
        lambda d: (d.images, d.labels, d.log_l2), start, ("images", "labels", "l2")
    )
    optimiser = optax.multi_transform(
        {"images": optax.adam(0.05), "labels": optax.sgd(0.5), "l2": optax.sgd(0.0)},
        (labels, "l2"),  # There is nothing in the solver.
    )
    args = {"inner": ONE_STEP, "optimiser": optimiser, "steps": STEPS}
    result = eqd.distill(start, model, train, learn=(True, False), **args)
    assert result.learned == ("images", "labels", "log_l2")
    assert result.history.loss[-1] < result.history.loss[0]
    assert not jnp.array_equal(result.distilled.labels, start.labels)
    assert not jnp.array_equal(result.distilled.images, start.images)
    # Its steps are of length zero.
    assert jnp.array_equal(result.distilled.log_l2, start.log_l2)


@pytest.mark.slow
def test_outer_loss_needs_no_gradient(problem):
    start, linear, train = problem
    network = MLP(64, 4, jax.nn.softplus, key=jr.key(0))
    for model in (linear, network):
        loss = eqx.filter_jit(eqd.outer_loss)(start, model, train, ONE_STEP)[0]
        want = eqd.evaluate(start, model, train, ONE_STEP).loss
        np.testing.assert_allclose(loss, want, rtol=1e-5)
