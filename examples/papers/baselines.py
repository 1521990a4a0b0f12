"""Trains networks on small sets of images with a named recipe, and prints a table of
sets against networks.

The sets are random real images, in several draws; class means; k-means; herding; the
best coreset of the package `coreax`; with `--search`, real images chosen by a search
of that many CPU-seconds; images that are distilled for logistic regression with a
learned ridge; and the sets in any given files that `eqdistill.save` wrote. For the
recipe `supervised` the only set is all training images. All images are standardised.
All choices are made on held-out training images.

Each set has a column with hard labels; and, for the recipes that take them, one with
soft labels, which are learned for ridge regression on the pixels. Sets from files keep
their own labels.

Prints a table in Markdown: the CPU-seconds it took to make the images of a set,
including compilation; its size with its labels; and the mean test accuracy after the
last training step, with the standard deviation over networks. Plots the accuracies.
Measurements are kept in `baselines.json`, so that the script can be stopped and
resumed.
"""

import argparse
import functools as ft
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from _common import DATASETS, maker, NETWORKS, real_data, RECIPES, run
from _small_sets import make_sets, Sets
from matplotlib.figure import Figure

import eqdistill as eqd


Column = tuple[str, str]  # The labels and the network.
Rows = dict[str, dict[Column, np.ndarray | None]]


def main(
    dataset: str,
    data_dir: Path | None,
    recipe: str,
    networks: list[str],
    sets: list[str] | None,
    artifacts: list[Path],
    images: int,
    draws: int,
    search: float | None,
    num_networks: int,
    updates: int | None,
    output: Path,
) -> None:
    train, test, standardisation = real_data(dataset, data_dir)
    settings = {} if updates is None else {"updates": updates}
    trained = {
        x: RECIPES[recipe](maker(NETWORKS[x], train), **settings) for x in networks
    }
    made = make_sets(train, images, draws, search, trained[networks[0]])
    if recipe == "supervised":
        everything = ft.partial(eqd.DistilledSet, train.images, train.labels, l2=1.0)
        made, sets = {"all training images": {"hard": lambda: [everything()]}}, None
    made = {name: made[name] for name in (made if sets is None else sets)}
    # Everything else that the sets depend on.
    own: dict[str, Any] = {
        "searched": search,
        "best coreset": [recipe, updates, networks[0]],
    }
    file_sizes = {}
    for path in artifacts:
        distilled, file_sizes[path.stem] = load(path, standardisation)
        labels = "soft" if distilled.labels.ndim == 2 else "hard"
        made[path.stem] = {labels: lambda distilled=distilled: [distilled]}
        own[path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
    takes_soft = recipe != "supervised" and not recipe.startswith("dc")
    columns = [
        (labels, network)
        for labels in ("hard", "soft")[: 1 + takes_soft]
        for network in networks
    ]
    output.mkdir(parents=True, exist_ok=True)
    kept = Measured(output / "baselines.json")
    rows: Rows = {}
    costs: dict[str, dict[str, str]] = {}
    for name, labelled in made.items():
        rows[name], costs[name] = {}, {}
        for labels, network in columns:
            key = [dataset, images, name, labels, own.get(name)]
            make = labelled.get(labels)
            found = None
            if make is not None:
                measure = ft.partial(cost, make)
                size, seconds = kept.get([*key, "bytes, CPU-seconds"], measure)
                costs[name][labels] = f"{file_sizes.get(name, size):,}"
                if labels == "hard" and name not in file_sizes:
                    costs[name]["CPU-seconds"] = f"{seconds:.1f}"
                measure = ft.partial(
                    accuracies, make, trained[network], test, num_networks
                )
                key += [draws, network, recipe, updates, num_networks]
                found = np.array(kept.get(key, measure))
            rows[name][labels, network] = found
    table = to_table(rows, costs, columns)
    print(f"\n{dataset}, {images} images per class, recipe {recipe}:\n\n{table}")
    stem = f"baselines_{Path(dataset).name}_{images}_{recipe.replace(', ', '_')}"
    (output / f"{stem}.md").write_text(table + "\n")
    draw(rows, columns).savefig(output / f"{stem}.png")
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


def cost(make: Sets) -> tuple[int, float]:
    """The bytes of a set, and the CPU-seconds that it takes to make one."""
    began = time.process_time()
    sets = make()
    return sets[0].nbytes, (time.process_time() - began) / len(sets)


def accuracies(
    make: Sets, recipe: eqd.recipes.Recipe, test: eqd.Dataset, num_networks: int
) -> list[list[float]]:
    """One row for each set, with the accuracy of each network."""
    found = eqd.evaluate(make(), recipe, test, num_models=num_networks)
    return found.scores.tolist()


def load(
    path: Path, standardisation: eqd.datasets.AbstractPreprocessing
) -> tuple[eqd.DistilledSet, int]:
    """The set in a file, in standardised units, and the bytes that are stored."""
    artifact = eqd.load(path)
    start: Any = artifact.start
    images = artifact.distilled.images
    if artifact.preprocessing is not None:
        images = jax.vmap(artifact.preprocessing.inverse)(images)
    images = jax.vmap(standardisation)(images)
    return eqx.tree_at(lambda d: d.images, artifact.distilled, images), start.nbytes


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
    rows: Rows, costs: dict[str, dict[str, str]], columns: list[Column]
) -> str:
    """The columns for hard labels come first. Both groups start with the bytes."""
    head, lines = ["", "CPU-seconds"], []
    for group in dict.fromkeys(labels for labels, _ in columns):
        head += [f"{group} labels: bytes", *(x for y, x in columns if y == group)]
    for name, row in rows.items():
        line = [name, costs[name].get("CPU-seconds", "-")]
        for i, (column, found) in enumerate(row.items()):
            if i == 0 or column[0] != columns[i - 1][0]:
                line.append(costs[name].get(column[0], "-"))
            line.append(to_cell(found))
        lines.append(line)
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Rows, columns: list[Column]) -> Figure:
    """One line for each set and one mark for each network and kind of labels: the mean
    accuracy, with the standard deviation over networks."""
    is_empty = lambda row: all(x is None for x in row.values())
    rows = {name: row for name, row in rows.items() if not is_empty(row)}
    figure = Figure(
        figsize=(6.5, 0.45 * len(rows) + 1.6), dpi=200, layout="constrained"
    )
    axis = figure.add_subplot()
    markers = "osD^vP*X"
    for j, column in enumerate(columns):
        # Shifted a little, so that the marks of one line do not overlap.
        shift = 0.08 * (j - (len(columns) - 1) / 2)
        found = [
            (i, x)
            for i, row in enumerate(rows.values())
            if (x := row[column]) is not None
        ]
        labels, network = column
        axis.errorbar(
            [100 * x.mean() for _, x in found],
            [i + shift for i, _ in found],
            xerr=[np.nan_to_num(std_models(x)) for _, x in found],
            fmt=markers[j % len(markers)],
            markersize=5,
            linewidth=1,
            label=f"{network}, {labels} labels",
        )
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy (%)")
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="outside lower center",
        ncols=min(2, len(columns)),
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
        "--artifacts",
        nargs="*",
        type=Path,
        default=[],
        help="files that eqdistill.save wrote",
    )
    parser.add_argument("--images", type=int, default=1, help="images per class")
    parser.add_argument(
        "--draws", type=int, default=5, help="number of sets of random real images"
    )
    parser.add_argument(
        "--search",
        type=float,
        metavar="SECONDS",
        help="add real images that a search of this many CPU-seconds finds",
    )
    parser.add_argument("--num-networks", type=int, default=3)
    parser.add_argument(
        "--updates", type=int, help="training steps (default: the recipe's)"
    )
    run(main, parser)
