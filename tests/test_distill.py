import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import pytest

import eqdistill as eqd

from .conftest import CNN, MLP, subset


STEPS = 12
ADAM = optax.adam(0.05)
LBFGS = optax.lbfgs(learning_rate=1.0, linesearch=None)
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
    distilled = eqd.DistilledSet.from_noise(train, l2=0.05, key=jr.key(0))
    return distilled, eqd.LogisticRegression(64, 10), train


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optax_optimiser(problem, name):
    distilled, classifier, train = problem
    result = eqd.distill(*problem, optimiser=OPTIMISERS[name], steps=STEPS)
    history = result.history
    assert len(history) == STEPS
    # The history is that of the public outer loss and its gradient.
    loss, grad = eqx.filter_value_and_grad(eqd.outer_loss)(distilled, classifier, train)
    np.testing.assert_allclose(history.loss[0], loss, rtol=1e-5)
    norm = jnp.linalg.norm(grad.images)
    np.testing.assert_allclose(history.gradient_norm[0], norm, rtol=1e-3)
    assert np.isfinite(history.inner_residual).all()
    final = eqd.outer_loss(result.distilled, classifier, train)
    assert final < history.loss[-1] + 0.05 < history.loss[0]
    # Only the images were learned.
    assert not jnp.array_equal(result.distilled.images, distilled.images)
    assert jnp.array_equal(result.distilled.labels, distilled.labels)
    assert jnp.array_equal(result.distilled.log_l2, distilled.log_l2)


def test_blocks_are_invisible(problem):
    by_block = []
    for block_size in (5, STEPS):
        seen = []
        result = eqd.distill(
            *problem,
            optimiser=ADAM,
            steps=STEPS,
            block_size=block_size,
            callback=lambda d, seen=seen: seen.append(len(d.history)),
        )
        assert seen == [*range(block_size, STEPS, block_size), STEPS]
        by_block.append(result)
    for result in by_block[1:]:
        np.testing.assert_allclose(
            result.history.loss, by_block[0].history.loss, rtol=1e-5
        )
        np.testing.assert_allclose(
            result.distilled.images, by_block[0].distilled.images, atol=1e-3
        )


def test_batches_are_drawn_without_replacement(digits):
    # At a learning rate of zero, the mean of an epoch's losses is the full loss.
    train = subset(digits[0], 60)
    distilled = eqd.DistilledSet.from_noise(train, scale=1.0, key=jr.key(0))
    classifier = eqd.LogisticRegression(64, 10)
    optimiser = optax.sgd(0.0)
    run = lambda seed: eqd.distill(
        distilled,
        classifier,
        train,
        optimiser=optimiser,
        steps=12,
        batch_size=10,
        key=jr.key(seed),
    )
    loss = eqd.outer_loss(distilled, classifier, train)
    losses = run(0).history.loss
    np.testing.assert_allclose(losses[:6].mean(), loss, rtol=1e-5)
    np.testing.assert_allclose(losses[6:].mean(), loss, rtol=1e-5)
    assert not np.allclose(losses[:6], losses[6:], rtol=1e-4)
    np.testing.assert_array_equal(losses, run(0).history.loss)
    assert not np.allclose(losses, run(1).history.loss, rtol=1e-4)


def test_batches_train(digits):
    train, test = digits
    distilled = eqd.DistilledSet.from_noise(train, key=jr.key(0))
    classifier = eqd.LogisticRegression(64, 10)
    before = eqd.evaluate(distilled, classifier, test)
    result = eqd.distill(
        distilled, classifier, train, steps=40, batch_size=128, key=jr.key(1)
    )
    after = eqd.evaluate(result.distilled, classifier, test)
    assert after.loss < before.loss - 0.5
    assert after.accuracy > 0.8


def test_callback_stops(problem):
    result = eqd.distill(
        *problem, optimiser=ADAM, steps=50, callback=lambda d: len(d.history) >= 20
    )
    assert len(result.history) == 20
    assert not result.converged


def test_tolerance_stops(problem):
    result = eqd.distill(*problem, optimiser=LBFGS, steps=50, tolerance=0.2)
    assert result.converged
    norms = result.history.gradient_norm
    assert norms[-1] <= 0.2 < norms[:-1].min()
    # It stops where the gradient was measured, not a step beyond.
    grad = eqx.filter_grad(eqd.outer_loss)(result.distilled, *problem[1:])
    np.testing.assert_allclose(jnp.linalg.norm(grad.images), norms[-1], rtol=1e-2)


def test_what_is_learned_is_a_filter(problem):
    distilled, classifier, train = problem
    nothing = jax.tree.map(lambda _: False, distilled)
    learn = eqx.tree_at(lambda d: d.log_l2, nothing, True)
    start = eqd.DistilledSet(train.floating()[:20], train.labels[:20], l2=1.0)
    result = eqd.distill(start, classifier, train, learn=learn, steps=STEPS)
    assert jnp.array_equal(result.distilled.images, start.images)
    assert result.distilled.l2 < start.l2
    assert result.history.loss[-1] < result.history.loss[0]


@pytest.mark.parametrize("learning_rate", [1e25, float("inf")])
def test_divergence_returns_the_last_good_state(problem, learning_rate):
    with pytest.raises(eqd.DistillationError, match="Distillation stopped") as info:
        eqd.distill(*problem, optimiser=optax.sgd(learning_rate))
    result = info.value.distillation
    assert np.isfinite(result.history.loss).all()
    loss = eqd.outer_loss(result.distilled, *problem[1:])
    assert loss <= eqd.outer_loss(*problem)


def test_last_good_state_is_that_of_the_last_step(problem):
    # The learning rate is harmless for four steps.
    optimiser = optax.sgd(lambda step: jnp.where(jnp.asarray(step) < 4, 1.0, jnp.inf))
    match = "stopped at step 5: the updated distilled set is not finite"
    with pytest.raises(eqd.DistillationError, match=match) as info:
        eqd.distill(*problem, optimiser=optimiser)
    result = info.value.distillation
    assert len(result.history) == 5
    loss = eqd.outer_loss(result.distilled, *problem[1:])
    np.testing.assert_allclose(loss, result.history.loss[-1], rtol=1e-5)


def test_inner_failure_returns_the_last_good_state(problem):
    inner = eqd.SpanSolver(max_steps=1)
    match = "inner solver did not converge"
    with pytest.raises(eqd.DistillationError, match=match) as info:
        eqd.distill(*problem, inner=inner, optimiser=ADAM)
    result = info.value.distillation
    assert len(result.history) == 0
    assert jnp.array_equal(result.distilled.images, problem[0].images)


def test_useless_adjoint_returns_the_last_good_state(problem):
    useless = eqd.DampedCG(rtol=1e-30, accept=0.0, max_residual=0.0)
    inner = eqd.ArgminSolver(adjoint=optx.ImplicitAdjoint(useless))
    with pytest.raises(eqd.DistillationError, match="inner solver raised") as info:
        eqd.distill(*problem, inner=inner, optimiser=ADAM)
    assert "hypergradient is useless" in str(info.value.__cause__)
    result = info.value.distillation
    assert jnp.array_equal(result.distilled.images, problem[0].images)


def test_progress_bar(problem, capsys):
    eqd.distill(*problem, optimiser=ADAM, steps=STEPS, progress=True)
    shown = capsys.readouterr().err
    assert "12/12" in shown
    assert "loss=" in shown


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
    classifier = make(jr.key(11))
    for l2 in (0.1, 0.01):
        # The second reuses what was compiled for the first.
        distilled = eqd.DistilledSet.from_noise(train, l2=l2, scale=0.3, key=jr.key(1))
        result = eqd.distill(distilled, classifier, train, steps=60)
        evaluation = eqd.evaluate(result.distilled, classifier, test)
        assert evaluation.accuracy >= 0.8


def test_each_part_has_its_own_optimiser(problem):
    hard, classifier, train = problem
    distilled = eqd.DistilledSet(hard.images, 3 * jnp.eye(10), l2=hard.l2)
    optimiser = optax.multi_transform(
        {"images": optax.adam(0.05), "labels": optax.sgd(0.5), "l2": optax.sgd(0.0)},
        eqx.tree_at(
            lambda d: (d.images, d.labels, d.log_l2),
            distilled,
            ("images", "labels", "l2"),
        ),
    )
    result = eqd.distill(
        distilled,
        classifier,
        train,
        optimiser=optimiser,
        learn=jax.tree.map(lambda _: True, distilled),
        steps=STEPS,
    )
    assert result.history.loss[-1] < result.history.loss[0]
    assert not jnp.array_equal(result.distilled.labels, distilled.labels)
    assert not jnp.array_equal(result.distilled.images, distilled.images)
    # Its steps are of length zero.
    assert jnp.array_equal(result.distilled.log_l2, distilled.log_l2)


def test_stops_early_on_held_out_data(digits):
    # So few images are soon overfitted.
    few, held_out = subset(digits[0], 150).split(2 / 3, key=jr.key(0))
    distilled = eqd.DistilledSet.from_noise(few, l2=1e-3, key=jr.key(0))
    classifier = eqd.LogisticRegression(64, 10)
    learn = eqx.tree_at(
        lambda d: (d.images, d.log_l2),
        jax.tree.map(lambda _: False, distilled),
        (True, True),
    )
    args = {"optimiser": LBFGS, "learn": learn, "steps": 100, "patience": 2}
    result = eqd.distill(distilled, classifier, few, held_out=held_out, **args)
    losses = result.held_out_loss
    assert 10 * len(losses) == len(result.history) < 100
    assert len(losses) == np.argmin(losses) + 1 + 2
    got = eqd.outer_loss(result.distilled, classifier, held_out)
    np.testing.assert_allclose(got, losses.min(), rtol=1e-6)
    # Without, it goes on: to less on what it sees, and to more on what it does not.
    blind = eqd.distill(distilled, classifier, few, **args)
    assert blind.held_out_loss.size == 0
    assert blind.history.loss[-1] < result.history.loss[-1]
    assert eqd.outer_loss(blind.distilled, classifier, held_out) > 1.5 * got
