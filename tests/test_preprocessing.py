import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.decomposition
import sklearn.preprocessing

import eqdistill as eqd
from eqdistill.datasets import Standardisation, ZCA


RNG = np.random.default_rng(0)
# Neighbouring pixels are correlated, and there are more images than fit into a chunk.
BYTES = np.clip(
    100 + 20 * RNG.normal(size=(1100, 3, 4, 5)).cumsum(-1) + [[[[1]], [[9]], [[30]]]],
    0,
    255,
).astype(np.uint8)
COLOUR = eqd.Dataset(BYTES, np.arange(1100) % 3)
GREY = eqd.Dataset(BYTES[:, 0], np.arange(1100) % 3)


@pytest.mark.parametrize("train", [COLOUR, GREY], ids=["colour", "grey"])
def test_standardisation(train):
    standardisation = Standardisation.fit(train)
    images = np.asarray(train.images, np.float64) / 255
    axes = (0, 2, 3) if images.ndim == 4 else None
    np.testing.assert_allclose(standardisation.mean.ravel(), images.mean(axes), 1e-6)
    np.testing.assert_allclose(
        standardisation.deviation.ravel(), images.std(axes), 1e-6
    )
    standard = train.map(standardisation)
    assert standard.shape == train.shape
    np.testing.assert_array_equal(standard.labels, train.labels)
    np.testing.assert_allclose(standard.images.mean(axes), 0.0, atol=1e-5)
    np.testing.assert_allclose(standard.images.std(axes), 1.0, rtol=1e-5)
    back = standard.map(standardisation.inverse)
    np.testing.assert_allclose(back.images, images, atol=1e-6)


def test_columns_of_a_table_are_standardised_one_by_one():
    x = RNG.normal(size=(50, 5)) * [1, 1e-8, 1e5, 1, 1] + [0, 1e-8, 1e7, 0, 0]
    x[:, 3] = 0.1  # Constant, and up to rounding.
    x[:, 4] = 1000 * (1 + np.arange(50) % 2 * 1e-7)
    train = eqd.Dataset(x.astype(np.float32), np.arange(50) % 2)
    standardisation = Standardisation.fit(train)
    assert standardisation.mean.shape == standardisation.deviation.shape == (5,)
    scaler = sklearn.preprocessing.StandardScaler().fit(train.images[:, :4])
    scale = np.append(np.asarray(scaler.scale_), 1)
    np.testing.assert_allclose(standardisation.deviation[:4], scale[:4], 1e-6)
    shift = (standardisation.mean[:4] - np.asarray(scaler.mean_)) / scale[:4]
    np.testing.assert_allclose(shift, 0, atol=1e-5)
    assert standardisation.deviation[4] == 1
    standard = train.map(standardisation)
    wanted = scaler.transform(train.images[:, :4])
    np.testing.assert_allclose(standard.images[:, :4], wanted, atol=1e-4)
    np.testing.assert_allclose(standard.images[:, 4], 0, atol=1e-3)
    back = standard.map(standardisation.inverse).images
    np.testing.assert_allclose((back - train.images) / scale, 0, atol=1e-3)
    other = eqd.Dataset(x[:, :1].astype(np.float32), np.arange(50) % 2)
    with pytest.raises(ValueError, match="`image` must have the"):
        other.map(standardisation)
    constant = eqd.Dataset(np.full((4, 2), 0.1), np.arange(4))
    with pytest.raises(ValueError, match=r"`train` must have .* a column that varies"):
        Standardisation.fit(constant)


def test_zca_against_numpy(x64):
    zca = ZCA.fit(COLOUR, regularisation=0.1)
    rows = np.asarray(COLOUR.floating()).reshape(1100, -1)
    covariance = np.cov(rows.T, bias=True)
    p = rows.shape[1]
    regularised = covariance + 0.1 * np.trace(covariance) / p * np.eye(p)
    # The symmetric positive definite inverse square root is unique.
    whitening = np.asarray(zca.whitening)
    np.testing.assert_allclose(whitening, whitening.T, atol=1e-10)
    assert np.linalg.eigvalsh(whitening)[0] > 0
    np.testing.assert_allclose(
        whitening @ regularised @ whitening, np.eye(p), atol=1e-10
    )
    whitened = COLOUR.map(zca)
    wanted = (rows - rows.mean(0)) @ whitening
    np.testing.assert_allclose(whitened.images, wanted.reshape(BYTES.shape), atol=1e-10)
    back = whitened.map(zca.inverse)
    np.testing.assert_allclose(back.images, COLOUR.floating(), atol=1e-10)


def test_zca_without_regularisation_against_scikit_learn(x64):
    rows = np.asarray(GREY.floating()).reshape(1100, -1)
    pca = sklearn.decomposition.PCA(whiten=True, svd_solver="full").fit(rows)
    wanted = pca.transform(rows) @ pca.components_ * np.sqrt(1100 / 1099)
    whitened = GREY.map(ZCA.fit(GREY, regularisation=0)).images
    np.testing.assert_allclose(whitened.reshape(1100, -1), wanted, atol=1e-8)


def test_map_may_change_the_shape():
    padded = GREY.map(lambda image: jnp.pad(image, 1))
    assert padded.shape == (6, 7)
    assert padded.num_classes == 3
    np.testing.assert_allclose(padded.images[:, 1:-1, 1:-1], BYTES[:, 0] / 255, 1e-6)
    with pytest.raises(ValueError, match="`images` must be finite"):
        GREY.map(lambda image: image / 0)


def test_bad_arguments():
    constant = eqd.Dataset(np.ones((4, 2, 2, 2), np.float32), np.arange(4))
    few = eqd.Dataset(BYTES[:20], np.arange(20))
    for train, regularisation in ((constant, 0.1), (few, 0.0)):
        match = rf"`regularisation` must be larger.*got {regularisation}"
        with pytest.raises(ValueError, match=match):
            ZCA.fit(train, regularisation=regularisation)
    for fit in (Standardisation.fit, ZCA.fit):
        for one, other in ((GREY, COLOUR), (COLOUR, GREY)):
            with pytest.raises(ValueError, match="`image` must have the"):
                other.map(fit(one))
