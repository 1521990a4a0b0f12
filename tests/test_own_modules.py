"""Modules of one's own, which touch nothing inside the package."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import hypergradient, OneStep, subset


ADAM = optax.adam(0.05)


@pytest.fixture(scope="module")
def problem(digits):
    train = subset(digits[0], 200)
    start = eqd.DistilledSet.from_noise(train, l2=0.05, scale=0.1, key=jr.key(0))
    return start, eqd.LogisticRegression(64, 10), train


class Momentum(eqd.AbstractInnerSolver[eqx.nn.Linear]):
    """A few steps of gradient descent with noise, from where the last fit ended."""

    log_step: jax.Array
    steps: int = 5

    def init(self, distilled, model, *, key):
        return model.head

    def __call__(self, distilled, model, state, *, key):
        if key is None:
            raise ValueError("`key` must be given with `Momentum`.")
        noise = lambda x: x + 1e-3 * jr.normal(key, x.shape)
        with_head = lambda head: eqx.tree_at(lambda c: c.head, model, head)
        loss = lambda head: eqd.inner_loss(distilled, with_head(head))
        head = jax.tree.map(noise, state)
        for _ in range(self.steps):
            step = lambda x, g: x - jnp.exp(self.log_step) * g
            head = jax.tree.map(step, head, jax.grad(loss)(head))
        fitted = eqd.Fitted(
            model=with_head(head),
            converged=jnp.array(True),
            gradient_norm=optax.tree.norm(jax.lax.stop_gradient(jax.grad(loss)(head))),
        )
        return fitted, jax.lax.stop_gradient(head)


def test_own_solver_with_state_and_key(problem):
    solver = Momentum(jnp.array(0.0))
    args = {"inner": solver, "optimiser": ADAM, "steps": 15, "learn": (True, True)}
    run = lambda seed: eqd.distill(*problem, **args, key=jr.key(seed))
    result = run(0)
    assert result.history.loss[-1] < 0.9 * result.history.loss[0]
    assert result.learned == ("images", "log_l2", "inner.log_step")
    assert result.inner.log_step != solver.log_step
    # Its state went from step to step, and its key changed with the seed.
    assert jnp.abs(result.state.inner_state.weight).max() > 0
    np.testing.assert_array_equal(run(0).history.loss, result.history.loss)
    assert not np.array_equal(run(1).history.loss, result.history.loss)
    fitted = eqd.fit(problem[0], problem[1], result.inner, key=jr.key(0))
    assert fitted.gradient_norm > 0
    with pytest.raises(ValueError, match="`key` must be given with `Momentum`"):
        eqd.fit(problem[0], problem[1], solver)


class RandomFeatures(eqx.Module):
    """Random Fourier features."""

    frequencies: jax.Array

    def __call__(self, image):
        return jnp.cos(self.frequencies @ image.reshape(-1))


@pytest.mark.slow
def test_own_linear_classifier(problem, x64):
    start, _, train = problem
    features = RandomFeatures(0.3 * jr.normal(jr.key(1), (32, 64)))
    head = eqx.nn.Linear(32, 10, use_bias=False, key=jr.key(2))
    model = eqd.LinearClassifier(features, head)
    start = eqd.DistilledSet(
        np.asarray(train.floating()[:10], np.float64), start.labels, l2=0.01
    )
    # The convex solver for it agrees with the general one, and its derivative with
    # central differences.
    fitted = eqd.fit(start, model).model
    features_of = jax.vmap(features)(start.images)
    logits = features_of @ fitted.head.weight.T
    residual = jax.nn.one_hot(start.labels, 10) - jax.nn.softmax(logits)
    np.testing.assert_allclose(
        fitted.head.weight, residual.T @ features_of / (10 * start.l2), atol=1e-8
    )
    np.testing.assert_array_equal(
        fitted.features.module.frequencies, features.frequencies
    )
    data = eqd.FullBatch(train, model)
    loss = eqx.filter_jit(lambda d: eqd.outer_loss(d, model, data)[0])
    gradient = eqx.filter_grad(loss)(start)
    direction = jr.normal(jr.key(3), start.images.shape)
    move = lambda t: eqx.tree_at(
        lambda d: d.images, start, start.images + t * direction
    )
    slope = (loss(move(1e-5)) - loss(move(-1e-5))) / 2e-5
    np.testing.assert_allclose(slope, jnp.sum(gradient.images * direction), rtol=1e-6)
    plain, _ = hypergradient(start, model, train)
    np.testing.assert_allclose(loss(start), plain, rtol=1e-10)


class Scripted(eqd.AbstractInnerSolver):
    """Returns what it is told to."""

    returns: object
    first: object = None

    def init(self, distilled, model, *, key):
        return self.first

    def __call__(self, distilled, model, state, *, key):
        return self.returns(distilled, model, state)


def good(distilled, model, state):
    fitted, _ = OneStep()(distilled, model, None, key=None)
    return fitted, state


def wrong_outputs(distilled, model, state):
    fitted, state = good(distilled, model, state)
    scalar = lambda image: jnp.sum(image)
    return eqx.tree_at(lambda f: f.model, fitted, scalar), state


@pytest.mark.parametrize(
    ("returns", "first", "match"),
    [
        (lambda d, c, s: c, None, "must return a pair.*returned a LinearClassifier"),
        (lambda d, c, s: (c, s), None, "must return a pair.*returned a tuple"),
        (lambda d, c, s: (good(d, c, s)[0], 1.0), None, "no array, but a float"),
        (
            lambda d, c, s: (good(d, c, s)[0], jnp.zeros(3)),
            jnp.zeros(2),
            r"float32 of shape \(2,\) wanted, float32 of shape \(3,\) got",
        ),
        (
            lambda d, c, s: (good(d, c, s)[0], s.astype(int)),
            jnp.zeros(2),
            "float32 of shape.*wanted, int32",
        ),
        (good, "text", "no array, but a str"),
        (wrong_outputs, None, r"model` must map one image.*shape \(c,\)"),
    ],
)
def test_a_solver_that_breaks_the_protocol_is_refused(problem, returns, first, match):
    solver = Scripted(returns, first)
    for call in (
        lambda: eqd.distill(*problem, inner=solver, steps=1),
        lambda: eqd.outer_loss(*problem, solver),
    ):
        with pytest.raises((TypeError, ValueError), match=f"(?s){match}"):
            call()


def test_a_solver_that_lies_is_caught(problem):
    def infinite(distilled, model, state):
        fitted, state = good(distilled, model, state)
        where = lambda f: (f.converged, f.gradient_norm)
        return eqx.tree_at(where, fitted, (jnp.array(True), jnp.array(jnp.inf))), state

    fitted = eqd.fit(*problem[:2], Scripted(infinite), throw=False)
    assert not fitted.converged
    with pytest.raises(
        eqd.DistillationError, match="the inner solver did not converge"
    ):
        eqd.distill(*problem, inner=Scripted(infinite), steps=1)
