"""Trains networks on small sets of images with a named recipe, and prints a table of
sets against networks.

The sets are random real images, in several draws; the same images with labels that are
learned for ridge regression on the pixels; class means; k-means; herding; images that
are distilled for logistic regression with a learned ridge; and the sets in files of
`eqdistill.save`, if any are given. For the recipe `supervised` the only set is all
training images. All images are standardised. Recipes for hard labels skip sets with
soft labels.

Prints the size of each set with its labels, the mean test accuracy after the last
training step, and the standard deviation over networks, as a table in Markdown; and
plots the accuracies. Measurements are kept in `baselines.json`, so that the script can
be stopped and resumed.
"""

import argparse
import functools as ft
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import DATASETS, maker, NETWORKS, real_data, RECIPES, run
from matplotlib.figure import Figure

import eqdistill as eqd


Sets = Callable[[], list[eqd.DistilledSet]]


def main(
    dataset: str,
    data_dir: Path | None,
    recipe: str,
    networks: list[str],
    sets: list[str] | None,
    artifacts: list[Path],
    images: int,
    draws: int,
    num_networks: int,
    updates: int | None,
    output: Path,
) -> None:
    train, test, standardisation = real_data(dataset, data_dir)
    made = make_sets(train, images, draws)
    if recipe == "supervised":
        everything = ft.partial(eqd.DistilledSet, train.images, train.labels, l2=1.0)
        made, sets = {"all training images": lambda: [everything()]}, None
    made = {name: made[name] for name in (made if sets is None else sets)}
    contents = {}
    for path in artifacts:
        made[path.stem] = ft.partial(load, path, standardisation)
        contents[path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
    output.mkdir(parents=True, exist_ok=True)
    kept = Measured(output / "baselines.json")
    rows, sizes = {}, []
    for name, make in made.items():
        own = [contents[name]] if name in contents else []
        measure = lambda make=make: make()[0].nbytes
        sizes.append(kept.get([dataset, images, name, "bytes", *own], measure))
        rows[name] = []
        for network in networks:
            settings = {} if updates is None else {"updates": updates}
            by = RECIPES[recipe](maker(NETWORKS[network], train), **settings)
            key = [dataset, images, name, draws, network, recipe, updates, num_networks]
            measure = ft.partial(accuracies, make, by, test, num_networks)
            found = kept.get([*key, *own], measure)
            rows[name].append(None if found is None else np.array(found))
    table = to_table(rows, sizes, networks)
    print(f"\n{dataset}, {images} images per class, recipe {recipe}:\n\n{table}")
    stem = f"baselines_{Path(dataset).name}_{images}_{recipe.replace(', ', '_')}"
    (output / f"{stem}.md").write_text(table + "\n")
    draw(rows, networks).savefig(output / f"{stem}.png")
    print(f"\nfiles {output / stem}.md, {output / stem}.png")


class Measured:
    """Keeps measurements in a file."""

    def __init__(self, file: Path):
        self.file = file
        self.found = json.loads(file.read_text()) if file.exists() else {}

    def get(self, key: list, measure: Callable[[], Any]) -> Any:
        """Calls `measure`, unless the file has its result from an earlier run."""
        text = json.dumps(key)
        if text not in self.found:
            self.found[text] = measure()
            print(f"{text}: {self.found[text]}", flush=True)
            # A run that is killed here leaves the old file.
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.found, indent=1))
            part.replace(self.file)
        return self.found[text]


def accuracies(
    make: Sets, recipe: eqd.recipes.Recipe, test: eqd.Dataset, num_networks: int
) -> list[list[float]] | None:
    """One row for each set, with the accuracy of each network. `None` if the recipe
    does not take the labels."""
    sets = make()
    if recipe.name in ("dc", "supervised") and sets[0].labels.ndim == 2:
        return None
    found = eqd.evaluate(sets, recipe, test, num_models=num_networks)
    return found.scores.tolist()


def make_sets(train: eqd.Dataset, images: int, draws: int) -> dict[str, Sets]:
    n = images * train.num_classes
    once = lambda constructor: [constructor(train, n, l2=0.1, key=jr.key(0))]
    real = lambda seed: eqd.DistilledSet.from_real(train, n, l2=0.1, key=jr.key(seed))
    return {
        "random real images": lambda: [real(seed) for seed in range(draws)],
        "learned labels": lambda: [
            learn_labels(real(seed), train) for seed in range(draws)
        ],
        "class means": lambda: once(eqd.DistilledSet.from_class_means),
        "k-means": lambda: once(eqd.DistilledSet.from_kmeans),
        "herding": lambda: once(eqd.DistilledSet.from_herding),
        "distilled, linear": lambda: [distil_linear(train, n)],
    }


def learn_labels(real: eqd.DistilledSet, train: eqd.Dataset) -> eqd.DistilledSet:
    start = eqx.tree_at(lambda d: d.log_l2, real, jnp.zeros(()))
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


def load(
    path: Path, standardisation: eqd.datasets.AbstractPreprocessing
) -> list[eqd.DistilledSet]:
    """The set in a file, in standardised units."""
    artifact = eqd.load(path)
    images = artifact.distilled.images
    if artifact.preprocessing is not None:
        images = jax.vmap(artifact.preprocessing.inverse)(images)
    images = jax.vmap(standardisation)(images)
    return [eqx.tree_at(lambda d: d.images, artifact.distilled, images)]


def std_models(found: np.ndarray) -> float:
    """The standard deviation over networks, pooled over sets. NaN for one network."""
    if found.shape[1] == 1:
        return np.nan
    return 100 * np.sqrt(np.mean(np.var(found, axis=1, ddof=1)))


def to_cell(found: np.ndarray | None) -> str:
    if found is None:
        return "-"
    text = f"{100 * found.mean():.1f}"
    if found.shape[1] > 1:
        text += f" ± {std_models(found):.1f}"
    if len(found) > 1:
        text += f" (draws ± {100 * np.std(found.mean(axis=1), ddof=1):.1f})"
    return text


def to_table(
    rows: dict[str, list[np.ndarray | None]], sizes: list[int], networks: list[str]
) -> str:
    lines = [f"| | bytes | {' | '.join(networks)} |"]
    lines.append("|---" * (len(networks) + 2) + "|")
    for (name, row), size in zip(rows.items(), sizes, strict=True):
        lines.append(f"| {name} | {size:,} | {' | '.join(map(to_cell, row))} |")
    return "\n".join(lines)


def draw(rows: dict[str, list[np.ndarray | None]], networks: list[str]) -> Figure:
    """One line for each set and one mark for each network: the mean accuracy, with the
    standard deviation over networks."""
    rows = {k: row for k, row in rows.items() if any(x is not None for x in row)}
    figure = Figure(
        figsize=(6.5, 0.45 * len(rows) + 1.6), dpi=200, layout="constrained"
    )
    axis = figure.add_subplot()
    markers = "osD^vP*X"
    for j, network in enumerate(networks):
        # Shifted a little, so that the marks of one line do not overlap.
        shift = 0.08 * (j - (len(networks) - 1) / 2)
        found = [
            (i, x) for i, row in enumerate(rows.values()) if (x := row[j]) is not None
        ]
        axis.errorbar(
            [100 * x.mean() for _, x in found],
            [i + shift for i, _ in found],
            xerr=[np.nan_to_num(std_models(x)) for _, x in found],
            fmt=markers[j % len(markers)],
            markersize=5,
            linewidth=1,
            label=network,
        )
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy (%)")
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="outside lower center",
        ncols=min(4, len(networks)),
        frameon=False,
        fontsize=8,
    )
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help=DATASETS)
    parser.add_argument(
        "--data-dir", type=Path, help="the folder with the files of the dataset"
    )
    parser.add_argument("--recipe", default="zero_start", choices=list(RECIPES))
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=list(NETWORKS),
        default=["ConvNet, instance norm", "ConvNet", "LeNet", "MLP"],
    )
    parser.add_argument("--sets", nargs="*", help="defaults to all", metavar="SET")
    parser.add_argument(
        "--artifacts", nargs="*", type=Path, default=[], help="files of eqdistill.save"
    )
    parser.add_argument("--images", type=int, default=1, help="images per class")
    parser.add_argument(
        "--draws", type=int, default=5, help="number of sets of random real images"
    )
    parser.add_argument("--num-networks", type=int, default=3)
    parser.add_argument(
        "--updates", type=int, help="training steps (default: the recipe's)"
    )
    run(main, parser)
