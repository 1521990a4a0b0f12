"""Functions that represent the images of one class by a few images. Each takes the
images of one class as rows, and returns `k` rows. They run once, on the host."""

from collections.abc import Callable
from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from .._checks import needs
from .._sharding import to_host
from ._dataset import Dataset


Rows = Float[np.ndarray, "_ p"]


def by_class(
    train: Dataset, labels: Int[np.ndarray, " n"], choose: Callable, key: PRNGKeyArray
) -> Float[np.ndarray, "n *shape"]:
    """Makes the images for `labels`: of each class, by `choose(x, k, rng)` from its
    real images."""
    rng = np.random.default_rng(np.asarray(jr.bits(key, (4,))))
    real = to_host(train.floating()).reshape(len(train), -1)
    real_labels = to_host(train.labels)
    images = np.empty((len(labels), real.shape[1]), real.dtype)
    for class_ in np.unique(labels):
        is_here = labels == class_
        x, wanted = real[real_labels == class_], int(is_here.sum())
        if len(x) < wanted:
            raise ValueError(
                f"`n` = {len(labels)} requires {wanted} images of class {class_}; "
                f"`train` has {len(x)}."
            )
        images[is_here] = choose(x, wanted, rng)
    return images.reshape(-1, *train.shape)


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
