import functools

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd


METHODS = {
    "noise": functools.partial(eqd.DistilledSet.from_noise, scale=0.1),
    "real": eqd.DistilledSet.from_real,
    "class means": eqd.DistilledSet.from_class_means,
    "k-means": eqd.DistilledSet.from_kmeans,
    "herding": eqd.DistilledSet.from_herding,
}
FROM_DATA = [name for name in METHODS if name != "noise"]


def rows(data, class_):
    """The images of one class of a `Dataset` or `DistilledSet`, as rows."""
    images = data.floating() if isinstance(data, eqd.Dataset) else data.images
    images = np.asarray(images).reshape(len(data), -1)
    return images[np.asarray(data.labels) == class_]


def distances(x, y):
    return np.linalg.norm(x[:, None] - y[None], axis=-1)


@pytest.mark.parametrize("name", METHODS)
def test_labels_and_key(digits, name):
    train, _ = digits
    for n in (None, 7, 23):
        distilled = METHODS[name](train, n, l2=0.3, key=jr.key(0))
        n = 10 if n is None else n
        assert distilled.images.shape == (n, 8, 8)
        assert distilled.images.dtype == jnp.float32
        assert distilled.labels.tolist() == [i % 10 for i in range(n)]
        assert distilled.l2 == pytest.approx(0.3)
    first, again, other = (
        METHODS[name](train, 30, l2=0.1, key=jr.key(seed)) for seed in (0, 0, 1)
    )
    assert eqx.tree_equal(first, again)
    assert bool(eqx.tree_equal(first, other)) is (name == "herding")


@pytest.mark.parametrize("name", ["real", "herding"])
def test_real_images_without_repeats(digits, name):
    distilled = METHODS[name](digits[0], 47, l2=0.1, key=jr.key(1))
    for class_ in range(10):
        chosen = rows(distilled, class_)
        is_equal = (chosen[:, None] == rows(digits[0], class_)[None]).all(axis=-1)
        assert is_equal.any(axis=1).all()
    # No two images of `digits` are equal.
    assert len(np.unique(distilled.images, axis=0)) == 47


def test_class_means(digits):
    train, _ = digits
    one = eqd.DistilledSet.from_class_means(train, l2=0.1, key=jr.key(0))
    several = eqd.DistilledSet.from_class_means(train, 40, l2=0.1, key=jr.key(0))
    for class_ in range(10):
        x = rows(train, class_)
        mean = x.mean(axis=0)
        np.testing.assert_allclose(rows(one, class_)[0], mean, rtol=1e-5, atol=1e-6)
        # The disjoint parts make up the class, and differ by at most one image in size.
        means = rows(several, class_)
        sizes = np.array([len(part) for part in np.array_split(np.arange(len(x)), 4)])
        np.testing.assert_allclose(sizes @ means / len(x), mean, rtol=1e-5, atol=1e-6)
        assert distances(means, means)[0, 1] > 0.1


def test_kmeans(digits):
    train, _ = digits
    one = eqd.DistilledSet.from_kmeans(train, l2=0.1, key=jr.key(0))
    several = eqd.DistilledSet.from_kmeans(train, 50, l2=0.1, key=jr.key(0))
    means = eqd.DistilledSet.from_class_means(train, 50, l2=0.1, key=jr.key(0))
    for class_ in range(10):
        x = rows(train, class_)
        np.testing.assert_allclose(
            rows(one, class_)[0], x.mean(axis=0), rtol=1e-4, atol=1e-5
        )
        # Lloyd's algorithm has converged: each centroid is the mean of the images that
        # are closest to it.
        centroids = rows(several, class_)
        nearest = distances(x, centroids).argmin(axis=1)
        for i, centroid in enumerate(centroids):
            np.testing.assert_allclose(
                centroid, x[nearest == i].mean(axis=0), rtol=1e-3, atol=1e-4
            )
        squares = [
            np.sum(distances(x, rows(method, class_)).min(axis=1) ** 2)
            for method in (several, means)
        ]
        assert squares[0] < squares[1]


def test_herding(digits):
    train, _ = digits
    k = 8
    herded = eqd.DistilledSet.from_herding(train, 10 * k, l2=0.1, key=jr.key(0))
    random = eqd.DistilledSet.from_real(train, 10 * k, l2=0.1, key=jr.key(0))
    errors = np.zeros((10, k))
    random_errors = []
    for class_ in range(10):
        x, chosen = rows(train, class_), rows(herded, class_)
        mean = x.mean(axis=0)
        # By brute force: none of the remaining images would have been better.
        for i in range(k):
            means = (chosen[:i].sum(axis=0) + x) / (i + 1)
            is_left = ~(x[:, None] == chosen[None, :i]).all(axis=-1).any(axis=1)
            best = np.linalg.norm(means - mean, axis=1)[is_left].min()
            errors[class_, i] = np.linalg.norm(chosen[: i + 1].mean(axis=0) - mean)
            assert errors[class_, i] == pytest.approx(best, rel=1e-4)
        random_errors.append(np.linalg.norm(rows(random, class_).mean(axis=0) - mean))
    assert np.mean(errors[:, -1]) < 0.7 * np.mean(random_errors)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FROM_DATA)
def test_floating_point_images(name, dtype):
    pixels = np.random.default_rng(0).normal(size=(60, 3, 2, 2))
    train = eqd.Dataset(pixels.astype(dtype), np.arange(60) % 3)
    distilled = METHODS[name](train, 6, l2=0.1, key=jr.key(0))
    assert distilled.images.shape == (6, 3, 2, 2)
    assert distilled.images.dtype == dtype
    assert jnp.abs(distilled.images).max() > 0.2  # In the units of the data.


@pytest.mark.parametrize("name", FROM_DATA)
def test_too_many_images(name):
    images = np.random.default_rng(0).normal(size=(5, 2, 2)).astype(np.float32)
    train = eqd.Dataset(images, np.array([0, 0, 0, 1, 1]), num_classes=3)
    METHODS[name](train, 2, l2=0.1, key=jr.key(0))
    with pytest.raises(ValueError, match=r"`train` has no images of class 2\."):
        METHODS[name](train, 5, l2=0.1, key=jr.key(0))
    with pytest.raises(ValueError, match=r"4 images of class 0; `train` has 3\."):
        METHODS[name](train, [4, 1, 0], l2=0.1, key=jr.key(0))
