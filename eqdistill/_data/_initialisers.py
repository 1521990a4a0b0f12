"""Functions that represent the images of one class by a few images. Each takes the
images of one class as rows, and returns `k` rows. They run once, on the host."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from .._checks import check_at_least, needs
from .._conversions import as_ints
from .._sharding import to_host
from ._dataset import Dataset


Rows = Float[np.ndarray, "_ p"]


def choose_images(
    train: Dataset, n: int | Sequence[int] | None, choose: Callable, key: PRNGKeyArray
) -> tuple[Float[np.ndarray, "n *shape"], np.ndarray]:
    """Makes images for each class from its real images, with `choose(x, k, rng)`, and
    their labels. With targets, there is one class, and each row is an image followed
    by its targets."""
    rng = np.random.default_rng(np.asarray(jr.bits(key, (4,))))
    real, real_labels = to_host(train.floating()), to_host(train.labels)
    real = real.reshape(len(train), -1)
    if train.has_targets:
        n = number_of_rows(train, n)
        rows = choose(np.concatenate([real, real_labels], axis=1), n, rng)
        images, labels = np.split(rows.astype(real.dtype), [real.shape[1]], axis=1)
        return images.reshape(-1, *train.shape), labels
    labels = class_labels(train, n)
    images = np.empty((len(labels), real.shape[1]), real.dtype)
    for class_ in np.unique(labels):
        is_here = labels == class_
        x, wanted = real[real_labels == class_], int(is_here.sum())
        if len(x) < wanted:
            raise ValueError(
                f"`n` = {n} requires {wanted} images of {train.class_name(class_)}; "
                f"`train` has {len(x)}."
            )
        images[is_here] = choose(x, wanted, rng)
    return images.reshape(-1, *train.shape), labels


def number_of_rows(train: Dataset, n: int | Sequence[int] | None) -> int:
    if not isinstance(n, int | np.integer) or not 1 <= n <= len(train):
        raise ValueError(
            f"`n` must be from 1 to {len(train)}, the number of images in `train`, "
            f"which has targets instead of classes; got {n}."
        )
    return int(n)


def class_labels(
    train: Dataset, n: int | Sequence[int] | None
) -> Int[np.ndarray, " n"]:
    """The labels of `n` images of all classes in turn, or of `n[y]` of each class."""
    if isinstance(n, Sequence):
        counts = np.asarray(as_ints("n", n))
        if len(counts) != train.num_classes or counts.min() < 0 or not counts.any():
            raise ValueError(
                "`n` must be a number of images, or one for each of the "
                f"{train.num_classes} classes; got {n}."
            )
        labels = np.repeat(np.arange(len(counts)), counts)
    else:
        n = train.num_classes if n is None else n
        check_at_least(1, n=n)
        labels = np.arange(n) % train.num_classes
    if missing := sorted({*labels.tolist()} - {*np.flatnonzero(train.class_counts)}):
        raise ValueError(
            f"`train` has no images of {train.class_name(missing[0])}. To leave a "
            "class out, pass a number of images for each class, `n=[...]`."
        )
    return labels.astype(np.int32)


def real(x: Rows, k: int, rng: np.random.Generator) -> Rows:
    """Random images, without repeats."""
    return x[rng.choice(len(x), k, replace=False)]


def class_means(x: Rows, k: int, rng: np.random.Generator) -> Rows:
    """The means of `k` random disjoint parts, equal in size to within one image."""
    parts = np.array_split(rng.permutation(len(x)), k)
    return np.stack([x[part].mean(axis=0, dtype=np.float64) for part in parts])


def kmeans(x: Rows, k: int, rng: np.random.Generator) -> Rows:
    """The centroids of one run of k-means."""
    with needs("`DistilledSet.from_kmeans`", "scikit-learn", "data"):
        from sklearn.cluster import KMeans
    # More restarts or iterations change the inertia of MNIST by a thousandth.
    options: Any = {"n_init": 1, "max_iter": 30}
    solver = KMeans(k, random_state=int(rng.integers(2**32)), **options)
    return solver.fit(x).cluster_centers_


def herding(x: Rows, k: int, rng: np.random.Generator) -> Rows:
    """Images chosen one by one, each to bring the mean of the chosen images as close as
    possible to the mean of all images."""
    centred = x - x.mean(axis=0, dtype=np.float64)
    squares = np.sum(centred**2, axis=1)
    total = np.zeros(x.shape[1])
    chosen = []
    for _ in range(k):
        # |total + x|^2, without the term that is the same for all x.
        distances = squares + 2 * centred @ total
        distances[chosen] = np.inf
        chosen.append(int(np.argmin(distances)))
        total += centred[chosen[-1]]
    return x[chosen]
