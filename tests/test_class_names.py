"""Class names keep the labels of different sets from being mixed up."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from PIL import Image

import eqdistill as eqd

from .conftest import OneStep


NAMES = ("cat", "dog", "owl")
MODEL = eqd.linear.LogisticRegression(16, 3)
OBJECTIVE = eqd.Bilevel(MODEL, OneStep(1.0))


def write(root, names, n=4):
    """Pictures that tell the classes apart: one bright row for each."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(n):
            picture = rng.integers(60, size=(4, 4), dtype=np.uint8)
            picture[NAMES.index(name)] += 190
            Image.fromarray(picture).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def train(tmp_path):
    return eqd.datasets.from_folder(write(tmp_path / "train", NAMES))


def make_start(train, names):
    return eqd.DistilledSet(
        train.floating()[::4], np.arange(3), l2=0.1, class_names=names
    )


def test_a_test_folder_without_a_class(tmp_path, train):
    """Case C3: labels shift where a folder is missing."""
    start = eqd.DistilledSet.from_class_means(train, l2=0.01, key=jr.key(0))
    assert start.class_names == train.class_names == NAMES
    folder = write(tmp_path / "test", ("cat", "owl"))
    shifted = eqd.datasets.from_folder(folder)
    assert shifted.class_names == ("cat", "owl")
    without_names = eqd.Dataset(shifted.images, shifted.labels, 3)
    assert eqd.evaluate(start, MODEL, without_names).accuracy == 0.5
    for run in (
        lambda: eqd.evaluate(start, MODEL, shifted),
        lambda: eqd.distill(start, OBJECTIVE, shifted),
        lambda: eqd.distill(start, OBJECTIVE, eqd.Batches(shifted, 2)),
        lambda: eqd.distill(start, OBJECTIVE, lambda step: eqd.FullBatch(shifted)),
    ):
        with pytest.raises(ValueError, match=r"only `(distilled|start)` has 'dog'\. "):
            run()
    stopping = eqd.EarlyStopping(shifted)
    with pytest.raises(ValueError, match=r"held-out `data` must .* has 'dog'"):
        eqd.distill(start, OBJECTIVE, train, callbacks=[stopping])
    test = eqd.datasets.from_folder(folder, class_names=train.class_names)
    assert eqd.evaluate(start, MODEL, test).accuracy == 1


def test_what_differs(train):
    def found(*names):
        with pytest.raises(ValueError, match="same class names in the same or") as info:
            eqd.evaluate(make_start(train, names), MODEL, train)
        assert "\n" not in str(info.value)
        return str(info.value)

    assert "; class 1 is 'owl' in `distilled` and 'dog' in `test`" in found(
        "cat", "owl", "dog"
    )
    assert "; only `distilled` has 'fox', and only `test` has 'owl'" in found(
        "cat", "dog", "fox"
    )
    assert "has 'a', 'b', 'c' and 1 more, and" in found(*"abcd")


def test_names_travel(tmp_path, train):
    noise = eqd.DistilledSet.from_noise(train, 6, l2=0.1, scale=0.1, key=jr.key(0))
    packed = eqd.Packed.from_distilled(noise)
    assert packed.decode().class_names == NAMES
    assert noise.with_targets(3).class_names == NAMES
    result = eqd.distill(noise, OBJECTIVE, train, steps=1)
    assert result.distilled.class_names == NAMES
    for start in (result, packed, noise.with_targets(3)):
        eqd.save(tmp_path / "a.safetensors", start)
        loaded = eqd.load(tmp_path / "a.safetensors")
        assert loaded.distilled.class_names == NAMES
    eqd.save(tmp_path / "a.safetensors", result)
    eqd.export(tmp_path / "out", eqd.load(tmp_path / "a.safetensors"))
    again = eqd.datasets.from_folder(tmp_path / "out")
    assert again.class_names == NAMES
    np.testing.assert_array_equal(again.labels, np.sort(noise.labels))
    with np.load(tmp_path / "out" / "distilled.npz") as file:
        assert tuple(file["class_names"]) == NAMES


def test_names_must_fit():
    images = np.zeros((2, 4))
    for labels, names in (
        ([0, 2], ["a", "b"]),
        ([0, 1], ["a", "a"]),
        (np.zeros((2, 3)), ["a", "b"]),
    ):
        with pytest.raises(ValueError, match=r"`class_names` must be [23] different"):
            eqd.DistilledSet(images, labels, l2=0.1, class_names=names)
    # A class may have no image.
    few = eqd.DistilledSet(images, [0, 1], l2=0.1, class_names=NAMES)
    with pytest.raises(ValueError, match=r"4 different names, .* got 3: 'cat'"):
        few.with_targets(4)
    assert few.with_targets(3).labels.shape == (2, 3)


@pytest.mark.slow
def test_names_change_no_numbers(tmp_path, train):
    """Runs of named sets go on from each other, and from sets without names."""
    named, plain = make_start(train, NAMES), make_start(train, None)
    unnamed = eqd.Dataset(train.images, train.labels)
    run = lambda start, data, **kwargs: eqd.distill(start, OBJECTIVE, data, **kwargs)
    wanted = run(plain, unnamed, steps=4)
    assert wanted.distilled.class_names is None
    half = run(named, train, steps=2)
    for start, changes in ((named, 0), (plain, 1)):
        whole = run(start, train, steps=4, state=half)
        assert len(whole.changes) == changes
        assert all("class_names" in line for line in whole.changes)
        np.testing.assert_array_equal(whole.distilled.images, wanted.distilled.images)

    callbacks = [eqd.Checkpoints(tmp_path / "run", every=2), eqd.EarlyStopping(train)]
    run(named, train, steps=2, callbacks=callbacks)
    resumed = run(named, train, steps=4, callbacks=callbacks)
    np.testing.assert_array_equal(resumed.distilled.images, wanted.distilled.images)
    assert resumed.callbacks[1].distilled.class_names == NAMES

    problem = eqd.Problem(named, OBJECTIVE, optimiser=optax.adam(0.02))
    starts = jax.tree.map(lambda x: jnp.stack([x, x]), named)
    states = jax.vmap(problem.init)(starts, key=jr.split(jr.key(0)))
    step = eqx.filter_jit(eqx.filter_vmap(problem.step, in_axes=(0, None)))
    states, metrics = step(states, eqd.FullBatch(train))
    np.testing.assert_allclose(metrics["loss"], wanted.history.loss[0], rtol=1e-5)


def test_a_class_without_real_images(train, caplog):
    """Case C12: `distill` names it. The initialisers refuse it."""
    rows = np.flatnonzero(np.asarray(train.labels) != 1)
    few = eqd.Dataset(train.images[rows], train.labels[rows], class_names=NAMES)
    data = eqd.Batches(few, 4)
    eqd.distill(make_start(train, None), OBJECTIVE, data, steps=1)
    warnings = lambda: [x.message for x in caplog.records if "images of" in x.message]
    message = "`data` has no images of class 1 ('dog'), but `start` does."
    assert warnings() == [message]
    caplog.clear()
    start = eqd.DistilledSet.from_real(few, [1, 0, 1], l2=0.1, key=jr.key(0))
    eqd.distill(start, OBJECTIVE, few, steps=1)
    assert warnings() == []
