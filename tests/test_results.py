"""The table of published sets, `examples/papers/results.py`."""

import functools
import runpy
from pathlib import Path

import jax.random as jr
import pytest

import eqdistill as eqd


SCRIPT = Path(__file__).parents[1] / "examples" / "papers" / "results.py"


@pytest.mark.slow
def test_a_file_is_a_row(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    train, test = eqd.datasets.load("digits")
    standardisation = eqd.datasets.Standardisation.fit(train)
    train, test = train.map(standardisation), test.map(standardisation)
    real = eqd.DistilledSet.from_real(train, 20, l2=1e-3, key=jr.key(0))
    make = functools.partial(eqd.nn.MLP, (8, 8), 10, widths=(16,))
    recipe = eqd.recipes.dc(make, updates=20)
    claim = eqd.evaluate(real, recipe, test, num_models=2, key=jr.key(1))
    file = tmp_path / "a.safetensors"
    facts = {"preprocessing": standardisation, "dataset": "digits", "seed": 3}
    eqd.save(file, real, claim, **facts)

    *head, row = script["table"](tmp_path).splitlines()
    assert len(head) == 2
    accuracy = f"{100 * claim.score:.1f} ± {100 * claim.std_models:.1f}"
    size = f"{file.stat().st_size:,}"
    assert row == f"| digits | 2 | {size} | `dc`, MLP 16 | {accuracy} |  |"
