"""Small sets of images that were not distilled for a network, for comparison.

Coresets see only training images. A held-out tenth of these decides between them.
"""

import functools as ft
import time
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from sklearn.decomposition import PCA

import eqdistill as eqd
from eqdistill import nn, recipes


Sets = Callable[[], list[eqd.DistilledSet]]
Labelled = dict[str, Sets]  # Keyed by the labels, "hard" or "soft".
PER_CLASS = 2000  # The kernels of `coreax` are of size PER_CLASS x PER_CLASS.
NUM_NETWORKS, WIDTH, SWAPS = 4, 128, 100


def make_sets(
    train: eqd.Dataset,
    images: int,
    draws: int,
    search: float | None,
    recipe: eqd.recipes.Recipe,
) -> dict[str, Labelled]:
    n = images * train.num_classes
    once = lambda constructor: [constructor(train, n, l2=0.1, key=jr.key(0))]
    real = lambda seed: eqd.DistilledSet.from_real(train, n, l2=0.1, key=jr.key(seed))
    hard: dict[str, Sets] = {
        "random real images": lambda: [real(seed) for seed in range(draws)],
        "class means": lambda: once(eqd.DistilledSet.from_class_means),
        "k-means": lambda: once(eqd.DistilledSet.from_kmeans),
        "herding": lambda: once(eqd.DistilledSet.from_herding),
        "best coreset": lambda: [from_coreax(train, n, recipe)],
        "distilled, linear": lambda: [distil_linear(train, n)],
    }
    if search is not None:
        hard["searched"] = lambda: [search_images(train, n, search)]
    return {name: with_soft_labels(make, train) for name, make in hard.items()}


def with_soft_labels(make: Sets, train: eqd.Dataset) -> Labelled:
    """The same sets with hard labels and with learned ones, each made only once."""
    hard = ft.cache(make)
    soft = ft.cache(lambda: [learn_labels(x, train) for x in hard()])
    return {"hard": hard, "soft": soft}


def learn_labels(hard: eqd.DistilledSet, train: eqd.Dataset) -> eqd.DistilledSet:
    start = eqx.tree_at(lambda d: d.log_l2, hard, jnp.zeros(()))
    return eqd.distill(
        start.with_targets(train.num_classes),
        linear(train),
        train,
        steps=200,
        learn=lambda start: (start.labels, start.log_l2),
    ).distilled


def distil_linear(train: eqd.Dataset, n: int) -> eqd.DistilledSet:
    start = eqd.DistilledSet.from_noise(train, n, l2=0.01, scale=0.01, key=jr.key(0))
    optimiser = optax.chain(
        optax.lbfgs(learning_rate=1.0, linesearch=None), optax.clip_by_global_norm(0.5)
    )
    return eqd.distill(
        start,
        linear(train),
        train,
        optimiser=optimiser,
        steps=150,
        learn=lambda start: (start.images, start.log_l2),
    ).distilled


def linear(train: eqd.Dataset) -> eqd.linear.LinearClassifier:
    return eqd.linear.LogisticRegression(train.images[0].size, train.num_classes)


class Split(NamedTuple):
    """The same number of images of each class, ordered by class, to choose from; and
    held-out images to compare choices on. `features` has a pair of arrays for each
    network."""

    rows: eqd.Dataset
    held_out: eqd.Dataset
    features: list[tuple[np.ndarray, np.ndarray]]

    def subset(self, chosen: np.ndarray) -> eqd.DistilledSet:
        images, labels = np.asarray(self.rows.images), np.asarray(self.rows.labels)
        return eqd.DistilledSet(images[chosen], labels[chosen], l2=0.1)


def split(train: eqd.Dataset, n: int) -> Split:
    """Splits the training images, and computes their features with networks that are
    trained on `n` of them."""
    rest, held_out = train.split(0.1, key=jr.key(1))
    labels = np.asarray(rest.labels)
    size = min(PER_CLASS, *np.bincount(labels))
    classes = range(train.num_classes)
    chosen = np.concatenate([np.flatnonzero(labels == y)[:size] for y in classes])
    images = np.asarray(rest.images)[chosen]
    rows = eqd.Dataset(images, labels[chosen], train.num_classes)
    make = ft.partial(nn.ConvNet, train.shape, train.num_classes, widths=(16, 32, 64))
    recipe = recipes.supervised(make, updates=100, batch_size=min(n, 128))
    features = []
    for key in jr.split(jr.key(0), NUM_NETWORKS):
        real = eqd.DistilledSet.from_real(rest, n, l2=1.0, key=key)
        trained = eqd.evaluate(real, recipe, held_out, num_models=1, key=key)
        last = eqd.linear.last_layer(trained.fitted.model)
        features.append(principal(rows.map(last.features), held_out.map(last.features)))
    return Split(rows, held_out, features)


def principal(rows: eqd.Dataset, held_out: eqd.Dataset):
    """Projects two datasets onto the first principal components of the first one."""
    x, y = (np.asarray(data.images).reshape(len(data), -1) for data in (rows, held_out))
    pca = PCA(min(WIDTH, *x.shape), random_state=0).fit(x)
    return pca.transform(x), pca.transform(y)


def from_coreax(train: eqd.Dataset, n: int, recipe: recipes.Recipe) -> eqd.DistilledSet:
    """The best of four coresets from the package `coreax`: kernel herding and randomly
    pivoted Cholesky in each class, on the pixels and on the features of a network. The
    best one has the highest held-out accuracy of a network trained with the recipe."""
    try:
        from coreax import Data
        from coreax.kernels import median_heuristic, SquaredExponentialKernel
        from coreax.solvers import KernelHerding, RPCholesky
    except ImportError as e:
        raise SystemExit(f"pip install 'eqdistill[papers]' for coresets: {e}.") from e
    parts, c = split(train, n), train.num_classes
    found = []
    for x, _ in (principal(parts.rows, parts.held_out), parts.features[0]):
        by_class = x.reshape(c, -1, x.shape[1])
        kernel = SquaredExponentialKernel(float(median_heuristic(by_class[0])))
        for solver in (
            KernelHerding(n // c, kernel, block_size=100),
            RPCholesky(n // c, random_key=jr.key(0), kernel=kernel),
        ):
            own = [
                solver.reduce(Data(jnp.asarray(x)))[0].unweighted_indices
                for x in by_class
            ]
            chosen = [y * by_class.shape[1] + np.asarray(i) for y, i in enumerate(own)]
            found.append(parts.subset(np.concatenate(chosen)))
    on = ft.partial(eqd.evaluate, test=parts.held_out, num_models=1)
    return max(found, key=lambda x: on(x, recipe).score)


def search_images(train: eqd.Dataset, n: int, seconds: float) -> eqd.DistilledSet:
    """Real images chosen by a search that takes `seconds` of CPU time. It replaces a
    random image with another of its class if this lowers the held-out squared error of
    ridge regression on the features, averaged over the networks."""
    began = time.process_time()
    parts, c = split(train, n), train.num_classes
    x, held_out = (jnp.stack(arrays) for arrays in zip(*parts.features, strict=True))
    targets, wanted = (
        jax.nn.one_hot(data.labels, c) - 1 / c for data in (parts.rows, parts.held_out)
    )
    size = len(parts.rows) // c

    def error(chosen):
        own = x[:, chosen]
        gram = own.mT @ own
        scale = jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / n
        ridge = 1e-3 * scale * jnp.eye(gram.shape[-1])
        weights = jnp.linalg.solve(gram + ridge, own.mT @ targets[chosen])
        return jnp.mean((held_out @ weights - wanted) ** 2)

    def swap(state, key):
        slot, image = jr.randint(key, (2,), 0, jnp.array([n, size]))
        chosen, least = state
        other = chosen.at[slot].set(slot % c * size + image)
        found = error(other)
        keep = lambda new, old: jnp.where(found < least, new, old)
        return (keep(other, chosen), keep(found, least)), None

    swaps = lambda state, key: jax.lax.scan(swap, state, jr.split(key, SWAPS))[0]
    swaps = jax.jit(swaps)
    chosen = jnp.arange(n) % c * size + jr.randint(jr.key(2), (n,), 0, size)
    state, step = (chosen, jnp.asarray(jnp.inf)), 0
    while time.process_time() - began < seconds:
        state = jax.block_until_ready(swaps(state, jr.key(3 + step)))
        step += 1
    print(f"search: {step * SWAPS} swaps, held-out squared error {state[1]:.4f}")
    return parts.subset(np.asarray(state[0]))
