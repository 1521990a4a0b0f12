"""Real data that are read while they are used."""

import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd
from eqdistill.datasets import Accumulated, Stream

from .conftest import ADAM, assert_same_bits, hypergradient
from .test_data import scalar, tree


class Rows:
    """Batches of rows of arrays in memory."""

    def __init__(self, train, size, changes=None):
        self.images, self.labels = map(np.asarray, (train.floating(), train.labels))
        self.size, self.changes = size, changes or {}

    def __getitem__(self, step):
        if step in self.changes:
            return self.changes[step]()
        first = step * self.size % (len(self.labels) - self.size + 1)
        rows = slice(first, first + self.size)
        return self.images[rows], self.labels[rows]


def broken():
    raise OSError("the disk is gone")


@pytest.fixture
def run(logistic):
    start, objective, train = logistic

    def distil(steps, changes=None, callbacks=()):
        stream = Stream(Rows(train, 40, changes), 10)
        return eqd.distill(
            start, objective, stream, optimiser=ADAM, steps=steps, callbacks=callbacks
        )

    return distil


def test_a_run_resumes_with_the_batches_of_its_step(run, tmp_path):
    checkpoints = eqd.Checkpoints(tmp_path, every=4)
    run(7, callbacks=[checkpoints])
    resumed = run(15, callbacks=[checkpoints])
    whole = run(15)
    assert_same_bits(resumed.distilled, whole.distilled)
    np.testing.assert_array_equal(resumed.history.loss, whole.history.loss)


def test_batches_are_read_ahead_by_a_thread(logistic):
    seen = []

    class Seen(Rows):
        def __getitem__(self, step):
            seen.append(step)
            return super().__getitem__(step)

    stream = Stream(Seen(logistic[2], 40), 10, ahead=2)
    batch = stream(3)
    stream(4)
    stream(9)  # Steps that a run has left are read no more.
    stream(9)
    assert seen[:3] == [3, 4, 5]
    assert set(seen) <= {3, 4, 5, 6, 9, 10, 11}
    np.testing.assert_array_equal(batch.images, logistic[2].floating()[120:160])


ZEROS, LABELS = np.zeros((40, 8, 8), np.float32), np.zeros(40, int)
NAN = (ZEROS + np.nan, LABELS)


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (broken, "the disk is gone"),
        (lambda: NAN, "`images` must be finite"),
        (lambda: (ZEROS, LABELS + 10), r"`labels` must be in \[0, 10\)"),
        (lambda: ZEROS, r"`source\[6\]` must be a pair"),
    ],
)
def test_a_bad_batch_stops_the_run(run, bad, cause):
    with pytest.raises(eqd.DistillationError, match="at step 6: `data` raised") as info:
        run(15, {6: bad})
    assert re.search(cause, str(info.value.__cause__))
    good = info.value.distillation
    assert len(good.history) == 6
    # The last update has not proved good.
    assert_same_bits(good.distilled, run(5).distilled)


@pytest.mark.parametrize("fn", [scalar, tree])
def test_accumulated_batches_are_one_large_batch(fn):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (42, 2, 3), np.uint8)
    train = eqd.Dataset(images, np.arange(42) % 3)
    model = rng.normal(size=(3, 6)).astype(np.float32)

    def value_and_grad(data):
        def total(model):
            mean = data.mean(fn, model, jnp.array(0), key=jr.key(0))
            return sum(jnp.sum(x) for x in jax.tree.leaves(mean))

        return jax.jit(jax.value_and_grad(total))(model)

    accumulated = Accumulated(Rows(train, 7), 6, 3, chunk_bytes=200)(0)
    wanted = value_and_grad(eqd.FullBatch(train))
    for x, y in zip(wanted, value_and_grad(accumulated), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_accumulated_batches_in_a_run(logistic):
    start, objective, train = logistic
    rows = Rows(train, 40)
    wanted = hypergradient(start, objective, train)
    found = hypergradient(start, objective, Accumulated(rows, 5, 10)(0))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1].images, wanted[1].images, rtol=1e-4, atol=1e-7)
    for bad, cause in (
        (broken, "the disk is gone"),
        (lambda: NAN, r"images of `source\[7\]` must be finite"),
        (lambda: (ZEROS[:3], LABELS[:3]), r"must have the shapes.*`source\[0\]`"),
    ):
        data = Accumulated(Rows(train, 40, {7: bad}), 5, 10)
        with pytest.raises(
            eqd.DistillationError, match="at step 1: `data` raised"
        ) as info:
            eqd.distill(start, objective, data, steps=2, optimiser=ADAM)
        assert re.search(cause, str(info.value.__cause__))
        assert_same_bits(info.value.distillation.distilled, start)


def test_bad_sources_are_refused():
    with pytest.raises(TypeError, match="`source` must have items"):
        Stream(lambda step: None, 10)
    with pytest.raises(ValueError, match="`images` must be finite"):
        Accumulated([NAN], 1, 10)


def test_grain(logistic):
    import grain

    start, objective, train = logistic
    pairs = list(zip(np.asarray(train.images), np.asarray(train.labels), strict=True))
    dataset = grain.MapDataset.source(pairs).shuffle(seed=0).repeat().batch(40)
    stream = Stream(dataset, 10)
    result = eqd.distill(start, objective, stream, steps=12, optimiser=ADAM)
    assert result.history.loss[-1] < result.history.loss[0]
