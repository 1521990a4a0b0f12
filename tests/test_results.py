"""The table of published sets, `examples/papers/results.py`."""

import functools
import runpy
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd


SCRIPT = Path(__file__).parents[1] / "examples" / "papers" / "results.py"


@pytest.mark.slow
def test_published_sets_claim_what_their_rounded_images_reach(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    train, test = eqd.datasets.load("digits")
    standardisation = eqd.datasets.Standardisation.fit(train)
    train, test = train.map(standardisation), test.map(standardisation)
    real = eqd.DistilledSet.from_real(train, 20, l2=1e-3, key=jr.key(0))
    make = functools.partial(eqd.nn.MLP, (8, 8), 10, widths=(16,))
    recipe = eqd.recipes.dc(make, updates=20)
    claim = eqd.evaluate(real, recipe, test, num_models=2, key=jr.key(1))
    made, published = tmp_path / "made.safetensors", tmp_path / "sets" / "a.safetensors"
    facts = {"preprocessing": standardisation, "dataset": "digits", "seed": 3}
    eqd.save(made, real, claim, **facts)

    script["publish"](made, published)
    assert published.stat().st_size < made.stat().st_size - real.images.nbytes // 3
    artifact = eqd.load(published)
    half = np.asarray(real.images, np.float16).astype(np.float32)
    np.testing.assert_array_equal(artifact.distilled.images, half)
    rounded = eqx.tree_at(lambda d: d.images, real, jnp.asarray(half))
    wanted = eqd.evaluate(rounded, recipe, test, num_models=5, key=jr.key(1))
    assert (artifact.score, artifact.std) == (wanted.score, wanted.std_models)
    assert (artifact.num_models, artifact.seed) == (5, 3)

    *head, row = script["table"](published.parent).splitlines()
    assert len(head) == 2
    accuracy = f"{100 * wanted.score:.1f} ± {100 * wanted.std_models:.1f}"
    size = f"{published.stat().st_size:,}"
    assert row == f"| digits | 2 | {size} | `dc`, MLP 16 | {accuracy} |  |"
