"""Wrong values and combinations of arguments, beyond one for each argument."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqdistill as eqd


IMAGES = np.zeros((4, 3, 3), np.float32)
LABELS = np.array([0, 1, 2, 0])
DATA = eqd.Dataset(IMAGES, LABELS)
DISTILLED = eqd.DistilledSet(IMAGES, LABELS, l2=0.1)


@pytest.mark.parametrize(
    ("images", "labels", "l2", "match"),
    [
        (IMAGES.astype(np.uint8), LABELS, 0.1, "`images` must be floating.*uint8"),
        (IMAGES[:, 0, 0], LABELS, 0.1, r"`images` must be.*with shape \(4,\)"),
        (IMAGES, LABELS[:3], 0.1, r"`labels`.*\(4,\).*with shape \(3,\)"),
        (IMAGES, LABELS[:, None], 0.1, r"class indices of shape.*with shape \(4, 1\)"),
        (IMAGES, LABELS == 1, 0.1, "`labels` must be integer.*bool"),
        (IMAGES, np.full((4, 3), np.nan), 0.1, "`labels` must be.*finite"),
        (IMAGES, LABELS, np.inf, "`l2` must be positive and finite; got inf"),
        (IMAGES, LABELS, np.ones(4), r"`l2` must be a scalar; got shape \(4,\)"),
    ],
)
def test_distilled_set(images, labels, l2, match):
    with pytest.raises((TypeError, ValueError), match=match):
        eqd.DistilledSet(images, labels, l2=l2)


def test_distilled_set_under_jit():
    build = eqx.filter_jit(
        lambda images: eqd.DistilledSet(images, jnp.array(LABELS), l2=0.1)
    )
    assert np.isfinite(build(jnp.array(IMAGES)).images).all()
    # It does not pass unnoticed: the loss is not finite either, which stops a run.
    bad = jnp.array(IMAGES).at[0, 0].set(jnp.inf)
    assert np.isnan(build(bad).images).all()


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "match"),
    [
        (IMAGES.astype(np.int32), LABELS, 3, "`images` must be uint8 or.*int32"),
        (IMAGES, LABELS.astype(float), 3, "`labels` must be integer.*float64"),
        (IMAGES, LABELS, 2, r"`labels` must be in \[0, 2\).*got 0 to 2"),
        (IMAGES + np.nan, LABELS, 3, "`images` must be finite; 36 of 36"),
    ],
)
def test_dataset(images, labels, num_classes, match):
    with pytest.raises((TypeError, ValueError), match=match):
        eqd.Dataset(images, labels, num_classes)


class Scalar(eqx.Module):
    weight: jax.Array = eqx.field(default_factory=lambda: jnp.ones(()))

    def __call__(self, image):
        return self.weight * image.sum()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (eqd.linear.LogisticRegression(8, 3), r"image.*\(3, 3\).*features of shape"),
        (eqd.linear.LogisticRegression(9, 2), r"labels` must be in \[0, 2\)|2 outputs"),
        (Scalar(), r"must map one image to floating-point outputs of shape \(c,\)"),
        (eqx.nn.Lambda(jnp.ravel), "`model` must have parameters"),
        (
            eqx.nn.BatchNorm(3, "a", mode="ema"),
            "`model` must not hold state.*GroupNorm",
        ),
    ],
)
def test_models(model, match):
    for call in (
        lambda: eqd.fit(DISTILLED, model),
        lambda: eqd.evaluate(DISTILLED, model, DATA),
        lambda: eqd.distill(DISTILLED, model, DATA),
        lambda: eqd.Problem(DISTILLED, eqd.Bilevel(model), optimiser=optax.sgd(1.0)),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            call()


def test_soft_labels_of_other_classes():
    distilled = eqd.DistilledSet(IMAGES, np.zeros((4, 5)), l2=0.1)
    match = r"`distilled.labels` must have a column for each of the 3.*\(4, 5\)"
    with pytest.raises(ValueError, match=match):
        eqd.fit(distilled, eqd.linear.LogisticRegression(9, 3))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (eqd.Dataset(IMAGES[:, :2], LABELS), r"\(2, 3\)"),
        (eqd.Dataset(IMAGES, LABELS, 7), "for each of the 7 classes"),
    ],
)
def test_data(data, match):
    model = eqd.linear.LogisticRegression(9, 3)
    with pytest.raises(ValueError, match=match) as info:
        eqd.evaluate(DISTILLED, model, data)
    assert "`test`" in str(info.value)
    for seen in (data, eqd.FullBatch(data), eqd.Batches(data, 2)):
        with pytest.raises(ValueError, match=match) as info:
            eqd.distill(DISTILLED, model, seen)
        assert "`data`" in str(info.value)
