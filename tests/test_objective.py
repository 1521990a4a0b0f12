"""What is minimised over the distilled set."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.special

import eqdistill as eqd

from .conftest import check_gradient, hypergradient, OneStep


KEY = jr.key(3)


def toy(loss):
    """Soft labels or targets, a network, and real data: small and smooth."""
    rng = np.random.default_rng(0)
    start = eqd.DistilledSet(
        rng.normal(size=(4, 5)), rng.normal(size=(4, 3)), l2=0.1, loss=loss
    )
    network = eqx.nn.MLP(5, 3, 4, 1, jnp.tanh, key=KEY)
    return start, network, eqd.Dataset(rng.normal(size=(20, 5)), np.arange(20) % 3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make_loss", [lambda: eqd.CrossEntropy(0.7), eqd.SquaredError])
def test_hypergradient_agrees_with_central_differences(make_loss):
    start, network, real = toy(make_loss())
    check_gradient(start, eqd.Bilevel(network, OneStep(0.5)), real)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("of_fit", "of_real", "temperature"),
    [(0.7, None, 0.7), (None, None, 0.2), (None, 3.0, 3.0)],
)
def test_the_loss_on_real_data(of_fit, of_real, temperature):
    inner_loss = eqd.SquaredError() if of_fit is None else eqd.CrossEntropy(of_fit)
    outer_loss = None if of_real is None else eqd.CrossEntropy(of_real)
    start, network, real = toy(inner_loss)
    inner = OneStep(0.5)
    loss, _ = hypergradient(start, eqd.Bilevel(network, inner, outer_loss), real)
    model = eqd.fit(start, network, inner).model
    logits = np.asarray(jax.vmap(model)(real.images)) / temperature
    of_labels = logits[np.arange(20), real.labels]
    wanted = np.mean(scipy.special.logsumexp(logits, axis=1) - of_labels)
    np.testing.assert_allclose(loss, wanted, rtol=1e-10)


class Hinge(eqd.AbstractLoss):
    """A custom outer loss with an array."""

    margin: jax.Array

    def __call__(self, outputs, labels):
        of_labels = jnp.take_along_axis(outputs, labels[:, None], axis=1)
        return jnp.mean(jax.nn.softplus(self.margin + outputs - of_labels))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["log_temperature", "margin"])
def test_arrays_of_the_outer_loss_are_learned(name):
    loss = Hinge(jnp.array(0.5)) if name == "margin" else eqd.CrossEntropy(0.7)
    start, network, real = toy(eqd.CrossEntropy())
    of = lambda loss: eqd.Bilevel(network, OneStep(0.5), loss)
    learn = {"learn": lambda s: (), "learn_objective": lambda o: getattr(o.loss, name)}
    args = {"optimiser": optax.sgd(1.0), "steps": 1}
    result = eqd.distill(start, of(loss), real, **learn, **args)
    assert result.learned == (f"objective.loss.{name}",)
    np.testing.assert_array_equal(result.distilled.images, start.images)
    value = getattr(loss, name)
    # The step of gradient descent is the derivative.
    found = value - getattr(result.objective.loss, name)
    at = lambda t: hypergradient(
        start, of(eqx.tree_at(lambda x: getattr(x, name), loss, value + t)), real
    )[0]
    np.testing.assert_allclose(found, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-6)


class Scripted(eqd.AbstractObjective):
    """Returns any state."""

    first: object
    second: object = None
    failures: tuple[str, ...] = ()

    def init(self, distilled, *, key):
        return self.first

    def __call__(self, distilled, data, state, *, step, key):
        loss = jnp.sum(distilled.images)
        return loss, eqd.Outcome(self.second, jnp.array(0), {})


def test_states_that_are_no_arrays_or_change_are_refused(logistic):
    start, _, train = logistic
    pairs = (
        ("text", None),
        (jnp.zeros(2), jnp.zeros(3)),
        (jnp.zeros(2), (jnp.zeros(2),)),
    )
    for first, second in pairs:
        with pytest.raises((TypeError, ValueError)):
            eqd.distill(start, Scripted(first, second), train)


class Count(eqd.AbstractObjective[jax.Array]):
    """The sum of the images plus the number of its earlier calls. It fails at a call of
    choice."""

    failures: tuple[str, ...] = ()
    name: str = "calls"
    fails_at: int = 100

    def init(self, distilled, *, key):
        return jnp.array(0)

    def __call__(self, distilled, data, state, *, step, key):
        calls = state.astype(float)
        failure = jnp.where(state == self.fails_at, len(self.failures), 0)
        outcome = eqd.Outcome(state + 1, failure, {self.name: calls})
        return jnp.sum(distilled.images) + calls, outcome


def test_in_turn_follows_its_order(logistic):
    start, _, train = logistic
    objective = eqd.InTurn(Count(name="a"), Count(name="b"), order=[1, 0, 1])
    result = eqd.distill(start, objective, train, optimiser=optax.sgd(0.0), steps=7)
    calls = np.array([0, 0, 1, 2, 1, 3, 4])
    is_b = np.array([True, False, True, True, False, True, True])
    losses = np.sum(start.images) + calls
    np.testing.assert_allclose(result.history.loss, losses, rtol=1e-5)
    for name, is_own in (("a", ~is_b), ("b", is_b)):
        wanted = np.where(is_own, calls, np.nan)
        np.testing.assert_array_equal(result.history.metrics[name], wanted)


def test_in_turn_reports_the_failure_of_a_member(logistic):
    start, _, train = logistic
    first = Count(failures=("out of luck", "out of paper"))
    second = Count(failures=("out of ink", "out of time"), fails_at=1)
    objective = eqd.InTurn(first, second)
    match = "stopped at step 3: out of time"
    with pytest.raises(eqd.DistillationError, match=match) as error:
        eqd.distill(start, objective, train, optimiser=optax.sgd(0.0))
    assert len(error.value.distillation.history) == 3


def test_in_turn_gives_the_losses_of_its_members(logistic):
    start, linear, train = logistic
    members = linear, eqd.Bilevel(linear.models.model, OneStep(1.0))
    found = hypergradient(start, eqd.InTurn(*members), train, step=1)
    wanted = hypergradient(start, members[1], train)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1].images, wanted[1].images, rtol=1e-4, atol=1e-7)
