import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd
from eqdistill.augment import Affine, AugmentedFit

from .conftest import assert_same_bits, check_gradient


WEIGHTS = [1.0, 2.0, 3.0, 4.0]
RIDGE = eqd.linear.RidgeSolver()


class AddUniform(eqd.augment.AbstractAugmentation):
    def __call__(self, image, *, key):
        return image + jr.uniform(key, image.shape, image.dtype)


class Keep(eqd.AbstractInnerSolver):
    """Returns the set that it was given, as the model."""

    def init(self, distilled, model, *, key):
        return None

    def __call__(self, distilled, model, state, *, key):
        return eqd.Fitted(distilled, jnp.array(True), jnp.array(0.0)), state


def targets(weights=None, dtype=np.float32):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 3, 3)).astype(dtype)
    hard = eqd.DistilledSet(images, np.arange(4) % 2, l2=0.1, weights=weights)
    return hard.with_targets(2)


@jax.jit  # One program, because compilation takes most of the time.
def fit_to_copies(distilled):
    """The copies that a solver is given, a fit to them, and to their concatenation."""
    model = eqd.linear.LogisticRegression(9, 2)
    augmented = lambda inner: AugmentedFit(AddUniform(), copies=3, inner=inner)
    fit = lambda solver, x: solver(x, model, None, key=jr.key(1))[0].model
    copies = fit(augmented(Keep()), distilled)
    concatenated = eqd.DistilledSet(
        copies.images,
        jnp.tile(distilled.labels, (3, 1)),
        l2=0.1,
        loss=eqd.SquaredError(),
        weights=3 * WEIGHTS,
    )
    fits = fit(augmented(RIDGE), distilled), fit(RIDGE, concatenated)
    return copies.images, *(x.head.weight for x in fits)


def test_fit_to_the_copies():
    distilled = targets(WEIGHTS)
    images, found, wanted = fit_to_copies(distilled)
    parts = np.split(np.asarray(images - jnp.tile(distilled.images, (3, 1, 1))), 3)
    assert all(x.min() >= 0 and x.max() < 1 for x in parts)
    assert not any(np.array_equal(parts[0], x) for x in parts[1:])
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_gradient(x64):
    train = eqd.Dataset(
        np.random.default_rng(1).normal(size=(9, 3, 3)), np.arange(9) % 2
    )
    objective = eqd.Bilevel(
        eqd.linear.LogisticRegression(9, 2),
        AugmentedFit(AddUniform(), copies=2, inner=RIDGE),
    )
    start = targets(WEIGHTS, float)
    check_gradient(start, objective, train)


@pytest.mark.slow
def test_recipe_makes_a_round_trip(tmp_path):
    distilled = targets()
    solver = AugmentedFit(Affine(shift=1), copies=2, inner=RIDGE)
    test = eqd.Dataset(distilled.images, np.arange(4) % 2)
    model = eqd.linear.LogisticRegression(9, 2)
    evaluation = eqd.evaluate(distilled, model, test, inner=solver)
    path = tmp_path / "a.safetensors"
    eqd.save(path, distilled, evaluation)
    recipe = eqd.load(path).recipe
    assert recipe is not None
    assert recipe.inner == solver
    again = eqd.evaluate(distilled, recipe, test, key=evaluation.key)
    assert_same_bits(again.scores, evaluation.scores)
