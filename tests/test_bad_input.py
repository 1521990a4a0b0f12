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
        (IMAGES.astype(np.uint16), LABELS, 3, "divide uint16 by 65535"),
    ],
)
def test_dataset(images, labels, num_classes, match):
    with pytest.raises((TypeError, ValueError), match=match):
        eqd.Dataset(images, labels, num_classes)


def test_inside_of_jit():
    run = lambda **kwargs: eqd.distill(**{**good, **kwargs}, steps=1).distilled
    model = eqd.linear.LogisticRegression(9, 3)
    good = {"start": DISTILLED, "objective": model, "data": DATA}
    state = eqd.Problem(DISTILLED, eqd.Bilevel(model), optimiser=optax.adam(0.02)).init(
        key=jax.random.key(0)
    )
    for fn, name, argument, value in (
        (lambda x: eqd.Dataset(x, LABELS), "Dataset", "images", IMAGES),
        (lambda x: eqd.Dataset(IMAGES, x), "Dataset", "labels", LABELS),
        (eqd.FullBatch, "FullBatch", "dataset", DATA),
        (lambda x: run(start=x), "distill", "start", DISTILLED),
        (lambda x: run(objective=x), "distill", "objective", model),
        (lambda x: run(data=x), "distill", "data", DATA),
        (lambda x: run(state=x), "distill", "state", state),
        (lambda x: run(), "distill", "key", 0.0),
    ):
        match = f"`{argument}` of `{name}` must not be traced.*outside of `jit`"
        with pytest.raises(TypeError, match=match):
            eqx.filter_jit(fn)(jax.tree.map(jnp.asarray, value))


def test_labels_beside_fewer_images():
    cut = lambda x: eqx.tree_at(lambda s: s.images, x, x.images[:3])
    linear = eqd.linear.LogisticRegression(9, 3)
    for model in (linear, eqd.nn.MLP((3, 3), 3, widths=(2,), key=jax.random.key(0))):
        for call in (eqd.fit, lambda *args: eqd.distill(*args, DATA)):
            with pytest.raises(
                ValueError, match=r"`distilled.labels` must .* 3 .*got 4"
            ):
                call(cut(DISTILLED), model)
    with pytest.raises(ValueError, match=r"`dataset.labels` must .* 3 images; got 4"):
        eqd.distill(DISTILLED, linear, cut(DATA))


@pytest.mark.slow
def test_half_precision():
    images = jnp.linspace(-1, 1, 36).reshape(4, 3, 3).astype(jnp.bfloat16)
    half = eqd.DistilledSet(images, LABELS, l2=0.1)
    data, model = eqd.Dataset(images, LABELS), eqd.linear.LogisticRegression(9, 3)
    for x, solver in ((half, "SpanSolver"), (half.with_targets(3), "RidgeSolver")):
        match = f"`distilled.images` must be float32.*`{solver}`.*got bfloat16"
        with pytest.raises(TypeError, match=match):
            eqd.distill(x, model, data)
    single = eqd.DistilledSet(images.astype(jnp.float32), LABELS, l2=0.1)
    result = eqd.distill(single, model, data, steps=1)
    wanted = eqd.distill(single, model, data.map(lambda x: x.astype(float)), steps=1)
    np.testing.assert_allclose(result.history.loss, wanted.history.loss, rtol=2**-8)


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
