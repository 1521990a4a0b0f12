"""Outer steps in rounds, which share a network and the features of a real batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd


def make(*, key):
    first, last = jr.split(key)
    layers = [eqx.nn.Linear(4, 6, key=first), eqx.nn.Lambda(jnp.tanh)]
    return eqx.nn.Sequential([*layers, eqx.nn.Linear(6, 3, key=last)])


rng = np.random.default_rng(0)
REAL = eqd.Dataset(rng.normal(size=(30, 4)), np.arange(30) % 3, weights=rng.random(30))
START = eqd.DistilledSet(
    rng.normal(size=(3, 4)), rng.normal(size=(3, 3)), l2=0.1, loss=eqd.SquaredError()
)
BILEVEL = eqd.Bilevel(eqd.Pool(make, size=2, max_age=3))
BATCHES = eqd.Batches(REAL, 8, chunk_bytes=500)


def rounds(steps, examples=8):
    return eqd.Rounds(BILEVEL, steps=steps, examples=examples)


def distil(objective, data, **kwargs):
    settings = {"steps": 7, "optimiser": optax.adam(0.1), **kwargs}
    return eqd.distill(START, objective, data, learn=lambda s: s, **settings)


@pytest.mark.slow
def test_rounds_of_one_step_are_the_objective_itself():
    wanted, found = distil(BILEVEL, BATCHES), distil(rounds(1), REAL)
    np.testing.assert_allclose(found.history.loss, wanted.history.loss, rtol=1e-5)
    images = wanted.distilled.images
    np.testing.assert_allclose(found.distilled.images, images, rtol=1e-4, atol=1e-5)


def test_all_steps_of_a_round_share_network_and_real_images():
    key = jr.key(2)
    of_bilevel = BILEVEL.init(START, key=key)
    state = rounds(3).init(START, key=key)

    @eqx.filter_jit
    def both(images, state, of_bilevel):
        # Each of the three steps is compared with step 0 of the objective.
        fn = lambda images, objective, state: objective(
            eqx.tree_at(lambda s: s.images, START, images),
            BATCHES,
            state,
            step=jnp.array(0),
            key=key,
        )
        of = lambda *args: jax.value_and_grad(fn, has_aux=True)(images, *args)
        return of(rounds(3), state), of(BILEVEL, of_bilevel)

    images = START.images
    for _ in range(3):
        ((loss, outcome), gradient), ((wanted, _), direction) = both(
            images, state, of_bilevel
        )
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        np.testing.assert_allclose(gradient, direction, rtol=1e-3, atol=1e-6)
        assert np.abs(gradient).max() > 1e-3
        state, images = outcome.state, images + 0.1
    # The next round has another network, or other real images.
    ((loss, _), _), ((first, _), _) = both(images, state, of_bilevel)
    assert abs(loss - first) > 1e-3


@pytest.mark.slow
def test_a_run_is_continued_within_a_round():
    whole, part = distil(rounds(3), REAL), distil(rounds(3), REAL, steps=4)
    rest = distil(rounds(3), REAL, state=part.state)
    np.testing.assert_array_equal(rest.distilled.images, whole.distilled.images)


def test_bad_input():
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        rounds(0)
    with pytest.raises(TypeError, match=r"`Batches` of 8, .* got Batches of 5"):
        distil(rounds(2), eqd.Batches(REAL, 5))
    with pytest.raises(TypeError, match="got FullBatch"):
        distil(rounds(2), eqd.FullBatch(REAL))
    network = eqd.Rounds(eqd.Bilevel(eqd.Fresh(make)), steps=2, examples=8)
    with pytest.raises(TypeError, match="whose last layer alone is fitted"):
        distil(network, REAL)
