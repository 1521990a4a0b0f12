"""Each error names the argument, what came, and what was wanted."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqdistill as eqd


IMAGES = np.zeros((4, 3, 3), np.float32)
LABELS = np.array([0, 1, 2, 0])
NEVER = eqx.tree_at(lambda log: log.every, eqd.Log(), 0)
# Compiled, which an error prevents: without, each operation would be.
HYPERGRADIENT = eqx.filter_jit(eqx.filter_grad(eqd.outer_loss, has_aux=True))


@pytest.mark.parametrize(
    ("images", "labels", "l2", "match"),
    [
        (IMAGES.astype(np.uint8), LABELS, 0.1, "`images` must be floating.*uint8"),
        (IMAGES[:, 0, 0], LABELS, 0.1, r"`images` must have shape.*got shape \(4,\)"),
        (IMAGES[:0], LABELS[:0], 0.1, r"`images` must have.*got shape \(0, 3, 3\)"),
        (IMAGES + np.nan, LABELS, 0.1, "`images` must be finite"),
        (IMAGES + np.inf, LABELS, 0.1, "`images` must be finite"),
        (IMAGES, LABELS[:3], 0.1, r"`labels`.*n = 4.*got shape \(3,\)"),
        (IMAGES, LABELS - 1, 0.1, "`labels` must be non-negative"),
        (IMAGES, LABELS.astype(np.float32), 0.1, r"`labels` of dtype float32 must be"),
        (IMAGES, LABELS[:, None], 0.1, r"class indices of shape.*got shape \(4, 1\)"),
        (IMAGES, LABELS == 1, 0.1, "`labels` must be integer.*bool"),
        (IMAGES, np.full((4, 3), np.nan), 0.1, "`labels` must be.*finite"),
        (IMAGES, LABELS, -0.1, "`l2` must be positive and finite; got -0.1"),
        (IMAGES, LABELS, 0.0, "`l2` must be positive and finite; got 0.0"),
        (IMAGES, LABELS, np.inf, "`l2` must be positive and finite; got inf"),
        (IMAGES, LABELS, np.ones(4), r"`l2` must be a scalar; got shape \(4,\)"),
        ("four", LABELS, 0.1, "`images` of `DistilledSet` must be an array.*got a str"),
    ],
)
def test_distilled_set(images, labels, l2, match):
    with pytest.raises((TypeError, ValueError), match=match):
        eqd.DistilledSet(images, labels, l2=l2)


def test_distilled_set_under_jit():
    make = eqx.filter_jit(
        lambda images: eqd.DistilledSet(images, jnp.array(LABELS), l2=0.1)
    )
    make(jnp.array(IMAGES))
    with pytest.raises(RuntimeError, match="`images` must be finite"):
        make(jnp.array(IMAGES + np.nan))


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "match"),
    [
        (IMAGES.astype(np.int32), LABELS, 3, "`images` must be uint8 or.*int32"),
        (IMAGES[:0], LABELS[:0], 3, r"`images`.*got shape \(0, 3, 3\)"),
        (IMAGES, LABELS[:2], 3, r"`labels` must have one.*\(2,\)"),
        (IMAGES, LABELS.astype(float), 3, "`labels` must be integer.*float64"),
        (IMAGES, LABELS, 2, r"`labels` must be in \[0, 2\).*from 0 to 2"),
        (IMAGES, LABELS - 1, 3, r"`labels` must be in \[0, 3\).*from -1 to 1"),
        (IMAGES + np.nan, LABELS, 3, "`images` must be finite; 36 of 36"),
    ],
)
def test_dataset(images, labels, num_classes, match):
    with pytest.raises((TypeError, ValueError), match=match):
        eqd.Dataset(images, labels, num_classes)


@pytest.mark.parametrize("names", [(), ("a", "b"), ("a", "b", "a"), tuple("abcd")])
def test_class_names(names):
    with pytest.raises(ValueError, match=r"`class_names` must have one.*each of the"):
        eqd.Dataset(IMAGES, LABELS, 3, class_names=names)


class Scalar(eqx.Module):
    weight: jax.Array = eqx.field(default_factory=lambda: jnp.ones(()))

    def __call__(self, image):
        return self.weight * image.sum()


class Parameterless(eqx.Module):
    def __call__(self, image):
        return image.reshape(-1)


class Decodes(eqx.Module):
    result: Any

    def decode(self):
        return self.result


class Parameters(eqx.Module):
    weight: jax.Array = eqx.field(default_factory=lambda: jnp.ones((3, 9)))

    def __call__(self, image):
        return self.weight @ image.reshape(-1)


def good():
    distilled = eqd.DistilledSet(IMAGES, LABELS, l2=0.1)
    return distilled, eqd.LogisticRegression(9, 3), eqd.Dataset(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (eqd.LogisticRegression(8, 3), r"applied.*\(3, 3\).*features of shape \(8,\)"),
        (Scalar(), r"must map one image to floating-point logits of shape \(c,\)"),
        (Parameterless(), "`model` must have parameters"),
        ("LogisticRegression", "`model` must be a callable.*got a str"),
    ],
)
def test_classifier(model, match):
    distilled, _, data = good()
    for call in (
        lambda: eqd.fit(distilled, model),
        lambda: eqd.outer_loss(distilled, model, data),
        lambda: eqd.evaluate(distilled, model, data),
        lambda: eqd.distill(distilled, model, data),
    ):
        with pytest.raises((TypeError, ValueError), match=f"(?s){match}"):
            call()


def test_labels_out_of_range():
    distilled, _, _ = good()
    with pytest.raises(ValueError, match=r"`distilled.labels` must be in \[0, 2\)"):
        eqd.fit(distilled, eqd.LogisticRegression(9, 2))
    with pytest.raises(RuntimeError, match=r"`distilled.labels` must be in \[0, 2\)"):
        eqx.filter_jit(eqd.fit)(distilled, eqd.LogisticRegression(9, 2))


def test_soft_labels_of_other_classes():
    distilled = eqd.DistilledSet(IMAGES, np.zeros((4, 5)), l2=0.1)
    match = r"`distilled.labels` must have a column for each of the 3.*\(4, 5\)"
    with pytest.raises(ValueError, match=match):
        eqd.fit(distilled, eqd.LogisticRegression(9, 3))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (eqd.Dataset(IMAGES[:, :2], LABELS), r"one shape; got \(2, 3\) and \(3, 3\)"),
        (eqd.Dataset(IMAGES, LABELS, 7), "each of the 7 classes of.*it has 3"),
    ],
)
def test_data(data, match):
    distilled, model, _ = good()
    for name, call in (
        ("data", lambda: eqd.outer_loss(distilled, model, data)),
        ("test", lambda: eqd.evaluate(distilled, model, data)),
        ("train", lambda: eqd.distill(distilled, model, data)),
    ):
        with pytest.raises(ValueError, match=match) as info:
            call()
        assert f"`{name}`" in str(info.value)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"steps": 0}, "`steps` must be at least 1; got 0"),
        ({"steps": 2.5}, "`steps` of `distill` must be an integer; got a float"),
        ({"key": 0}, r"`key`.*one key, as `jax.random.key\(0\)` makes it.*got an int"),
        ({"key": jax.random.PRNGKey(0)}, "`key` must be one key.*uint32"),
        ({"key": jax.random.split(jax.random.key(0))}, r"`key`.*got.*of shape \(2,\)"),
        ({"tolerance": -1.0}, "`tolerance` must not be negative; got -1.0"),
        ({"tolerance": float("nan")}, "`tolerance` must not be negative; got nan"),
        ({"optimiser": "adam"}, "`optimiser`.*`GradientTransformation`; got a str"),
        ({"optimiser": optax.adam}, "`optimiser`.*got a function"),
        ({"inner": optax.adam(0.1)}, "`inner`.*`AbstractInnerSolver`; got a Gradient"),
        ({"learn": {"images": True}}, r"`learn` must be bools.*\(start, inner\)"),
        ({"learn": (True, True, True)}, "`learn` must be bools"),
        ({"learn": (1, 0)}, r"`learn`.*`PyTree\[bool\]` or None; got a tuple"),
        ({"learn": (False, True)}, "`learn` must pick at least one"),
        (
            {"callbacks": [NEVER]},
            "`every` of a `Log` must be.*got 0",
        ),
    ],
)
def test_distill(kwargs, match):
    with pytest.raises((TypeError, ValueError), match=match):
        eqd.distill(*good(), **kwargs)


@pytest.mark.parametrize(
    ("start", "match"),
    [
        (IMAGES, "`start` must be a `DistilledSet`, or a module whose `decode`"),
        (Decodes(IMAGES), "must give a `DistilledSet`; that of a Decodes gave a nd"),
        (Decodes(eqd.DistilledSet(IMAGES, LABELS, l2=1)), "`learn` must say what is"),
    ],
)
def test_start(start, match):
    _, model, data = good()
    with pytest.raises((TypeError, ValueError), match=match):
        eqd.distill(start, model, data)


def test_batches():
    distilled, model, data = good()
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"`size` must be from 1 to 4.*got {size}"):
            eqd.Batches(data, size)
    for wrong in ("linear", eqd.Flip(), eqd.LogisticRegression(8, 3), Scalar):
        for make in (eqd.FullBatch, lambda data, x: eqd.Batches(data, 2, x)):
            with pytest.raises((TypeError, ValueError), match="`model` "):
                make(data, wrong)
    batches = eqd.Batches(data, 2)
    for call in (
        lambda: HYPERGRADIENT(distilled, model, batches),
        lambda: eqd.distill(distilled, model, batches),
    ):
        with pytest.raises(ValueError, match="`key` must be given with `Batches`"):
            call()


def test_full_batch_of_other_features():
    distilled, model, data = good()
    other = eqd.LinearClassifier(lambda image: 2 * image.reshape(-1), model.head)
    full = eqd.FullBatch(data, model)
    for wrong in (other, Parameters()):
        with pytest.raises(ValueError, match="the features that this `FullBatch` was"):
            HYPERGRADIENT(distilled, wrong, full)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n": 0}, "`n` must be at least 1; got 0"),
        ({"scale": 0.0}, "`scale` must be positive and finite; got 0.0"),
        ({"scale": float("inf")}, "`scale` must be positive and finite; got inf"),
    ],
)
def test_from_noise(kwargs, match):
    _, _, train = good()
    kwargs = {"l2": 0.1, "scale": 1.0, "key": jax.random.key(0)} | kwargs
    with pytest.raises(ValueError, match=match):
        eqd.DistilledSet.from_noise(train, **kwargs)


def test_logistic_regression():
    with pytest.raises(ValueError, match="`num_classes` must be at least 1; got 0"):
        eqd.LogisticRegression(3, 0)


def test_last_layer():
    network = eqx.nn.Sequential([eqx.nn.Identity()])
    with pytest.raises(TypeError, match=r"`where` must pick.*got a Identity"):
        eqd.last_layer(network)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_squared_error(temperature):
    with pytest.raises(ValueError, match=f"must be positive.*got {temperature}"):
        eqd.SquaredError(temperature)
    with pytest.raises(ValueError, match=r"`temperature` must be a scalar; got.*\(2,"):
        eqd.SquaredError(np.ones(2))


def test_name():
    with pytest.raises(ValueError, match=r"`name` must be one of.*got 'emnist'"):
        eqd.datasets.load("emnist")
