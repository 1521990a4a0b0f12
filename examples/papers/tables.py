"""Distils the rows of a table: wines, breast cancer, and the prices of houses.

Wines and tumours are classified by logistic regression, fitted to one distilled row per
class. The houses are generated, with skewed columns of very different scales. Their
prices are predicted by ridge regression on the features of random networks, which are
drawn again in each step. It is fitted to ten distilled rows, whose prices are learned
too.

Prints the test scores, accuracy or R2, of random rows, of the centroids of k-means, of
the distilled rows and of all training rows: the mean and the standard deviation over
splits of the table, and over draws of the random rows. Each method chooses its ridge on
the same held-out part of the training rows; the distilled rows start from the centroids
and their ridge, which is then learned too. Writes the distilled rows of the first split
as an artifact and an export.
"""

import argparse
import functools as ft
from collections.abc import Callable
from pathlib import Path

import jax.random as jr
import numpy as np
import optax
import sklearn.datasets
from _common import run
from jaxtyping import PRNGKeyArray
from sklearn.model_selection import train_test_split

import eqdistill as eqd


# The number of distilled rows, and the model.
TABLES = {
    "wine": (3, eqd.linear.LogisticRegression(13, 3, use_intercept=True)),
    "breast_cancer": (2, eqd.linear.LogisticRegression(30, 2, use_intercept=True)),
    "houses": (
        10,
        eqd.RandomFeatures(
            ft.partial(eqd.nn.MLP, (6,), 1, widths=(128,)), num_networks=4
        ),
    ),
}
METHODS = ("random rows", "k-means", "distilled", "all rows")
RIDGES = (0.001, 0.01, 0.1, 1.0)


def main(splits: int, draws: int, steps: int, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    # Made once: a new optimiser would trigger recompilation.
    optimiser = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    print(f"{'table':<14}{'rows':>5}", *(f"{method:>14}" for method in METHODS))
    for name, (n, model) in TABLES.items():
        scores: dict[str, list[float]] = {method: [] for method in METHODS}
        for split in range(splits):
            train, test = real_rows(name, split)
            standardisation = eqd.datasets.Standardisation.fit(train)
            train, test = train.map(standardisation), test.map(standardisation)
            distill = ft.partial(eqd.distill, optimiser=optimiser, steps=steps)
            # The same number as test rows, so that one program evaluates on both.
            rows, held_out = train.split(len(test) / len(train), key=jr.key(split))
            sets = sets_of(rows, held_out, n, model, distill, draws, key=jr.key(split))
            for method, several in sets.items():
                scores[method] += [eqd.evaluate(x, model, test).score for x in several]
            if split == 0:
                file = output / f"tables_{name}.safetensors"
                (distilled,) = sets["distilled"]
                publish(file, distilled, model, test, standardisation, name)
        print(
            f"{name:<14}{n:>5}",
            *(f"{np.mean(x):>7.1%} ± {np.std(x, ddof=1):.1%}" for x in scores.values()),
            flush=True,
        )


def sets_of(
    rows: eqd.Dataset,
    held_out: eqd.Dataset,
    n: int,
    model,
    distill: Callable,
    draws: int,
    *,
    key: PRNGKeyArray,
) -> dict[str, list[eqd.DistilledSet]]:
    """The sets of each method, all from the same training rows."""
    score = lambda x: eqd.evaluate(x, model, held_out, num_models=1).score

    def choose(make: Callable[..., eqd.DistilledSet], *args, **kwargs):
        return max((make(*args, l2=l2, **kwargs) for l2 in RIDGES), key=score)

    real, kmeans = eqd.DistilledSet.from_real, eqd.DistilledSet.from_kmeans
    random = [choose(real, rows, n, key=x) for x in jr.split(key, draws)]
    centroids = choose(kmeans, rows, n, key=key)
    # The ridge is learned too, and so are the prices of houses.
    distilled = distill(centroids, model, rows, learn=lambda x: x, key=key).distilled
    every = choose(eqd.DistilledSet, rows.images, rows.labels, loss=centroids.loss)
    return dict(zip(METHODS, (random, [centroids], [distilled], [every]), strict=True))


def publish(
    file: Path,
    distilled: eqd.DistilledSet,
    model,
    test: eqd.Dataset,
    standardisation: eqd.datasets.Standardisation,
    name: str,
) -> None:
    """Writes an artifact, and an export beside it."""
    evaluation = eqd.evaluate(distilled, model, test)
    eqd.save(
        file,
        distilled,
        evaluation,
        preprocessing=standardisation,
        dataset=None if name == "houses" else name,
    )
    eqd.export(file.with_suffix(""), eqd.load(file))


def real_rows(name: str, split: int) -> tuple[eqd.Dataset, eqd.Dataset]:
    """The training and the test rows. Split 0 is that of `eqdistill.datasets.load`."""
    if name == "houses":
        return houses(split)
    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        x, y, test_size=0.25, stratify=y, random_state=split
    )
    return eqd.Dataset(x, y), eqd.Dataset(test_x, test_y)


def houses(split: int = 0, n: int = 1500) -> tuple[eqd.Dataset, eqd.Dataset]:
    """Houses in a state with a coast and two expensive cities, and standardised
    prices."""
    rng = np.random.default_rng(0)
    income = rng.lognormal(1.2, 0.45, n)
    population = rng.lognormal(7.0, 0.7, n)
    rooms = 3 + 0.3 * income + rng.gamma(2.0, 1.0, n)
    age = rng.uniform(1, 52, n)
    latitude = rng.uniform(32.5, 42, n)
    inland = rng.gamma(2.0, 1.2, n)  # In degrees from the coast.
    longitude = -124 + 0.85 * (42 - latitude) + inland
    near = lambda city: np.exp(-((latitude - city) ** 2) - (inland - 0.5) ** 2)
    price = income**0.9 * (0.3 + 0.6 * np.exp(-inland / 2)) + 1.5 * near(34)
    price += 1.5 * near(37.8) + 0.01 * age + 0.1 * rooms + rng.normal(0, 0.35, n)
    x = np.stack([income, population, rooms, age, latitude, longitude], axis=1)
    rows, test_rows = train_test_split(np.arange(n), test_size=0.25, random_state=split)
    y = ((price - price[rows].mean()) / price[rows].std())[:, None]
    return eqd.Dataset(x[rows], y[rows]), eqd.Dataset(x[test_rows], y[test_rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=5, help="splits of the table")
    parser.add_argument(
        "--draws", type=int, default=3, help="draws of random rows per split"
    )
    parser.add_argument("--steps", type=int, default=150, help="outer steps")
    run(main, parser)
