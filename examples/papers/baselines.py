"""Trains networks on small sets of images by a named recipe: a table of sets against
networks.

The sets are random real images, of several draws; the same with labels that are learned
for ridge regression on the pixels; class means; k-means; herding; images distilled for
logistic regression with a learned ridge; and the sets in any files of `eqdistill.save`
that are given. For the recipe `supervised` there is one set: all training images. All
images are standardised. A recipe for hard labels leaves out sets with soft ones.

Prints the size of each set with its labels, the mean test accuracy after the last step
of the training, and the standard deviation over networks, as a table in Markdown; and
draws the accuracies. What has been measured is kept in `architectures.json`: the script
can be stopped, and goes on from there.
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
from matplotlib.figure import Figure

import eqdistill as eqd
from eqdistill import nn, recipes


# Grey images of 28 x 28 are padded to 32, as in the papers.
NETWORKS = {
    "ConvNet, instance norm": ft.partial(nn.ConvNet, size=32),
    "ConvNet, instance norm, not padded": nn.ConvNet,
    "ConvNet": ft.partial(nn.ConvNet, size=32, widths=(32, 64, 128), norm=None),
    "FRePo's ConvNet": ft.partial(
        nn.ConvNet, size=32, widths=(128, 256, 512), norm=None
    ),
    "LeNet": nn.LeNet,
    "MLP": nn.MLP,
    "AlexNet": nn.AlexNet,
    "VGG-11": nn.VGG11,
    "ResNet-18": nn.ResNet18,
}
RECIPES = {
    "dc": recipes.dc,
    "dc, augmented": ft.partial(recipes.dc, updates=1000, augment=True),
    "frepo": recipes.frepo,
    "frepo, augmented": ft.partial(recipes.frepo, augment=True),
    "zero_start": recipes.zero_start,
    "feature_regression": recipes.feature_regression,
    "supervised": recipes.supervised,
}
DATASETS = (
    "mnist, fashion_mnist, digits, cifar10, or a folder that holds the folders train "
    "and test, with a folder for each class"
)
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
    kept = Measured(output / "architectures.json")
    rows, sizes = {}, []
    for name, make in made.items():
        own = [contents[name]] if name in contents else []
        measure = lambda make=make: make()[0].nbytes
        sizes.append(kept.get([dataset, images, name, "bytes", *own], measure))
        rows[name] = []
        for network in networks:
            settings = {} if updates is None else {"updates": updates}
            by = RECIPES[recipe](NETWORKS[network], **settings)
            key = [dataset, images, name, draws, network, recipe, updates, num_networks]
            measure = ft.partial(accuracies, make, by, test, num_networks)
            found = kept.get([*key, *own], measure)
            rows[name].append(found and recipes.Evaluations(np.array(found)))
    table = to_table(rows, sizes, networks)
    print(f"\n{dataset}, {images} images a class, by the recipe {recipe}:\n\n{table}")
    stem = f"architectures_{Path(dataset).name}_{images}_{recipe.replace(', ', '_')}"
    (output / f"{stem}.md").write_text(table + "\n")
    draw(rows, networks).savefig(output / f"{stem}.png")
    print(f"\nfiles {output / stem}.md, {output / stem}.png")


def real_data(
    dataset: str, data_dir: Path | None, *, held_out: float = 0.0, zca: bool = False
) -> tuple[eqd.Dataset, eqd.Dataset, eqd.AbstractPreprocessing]:
    """Training and test images that are standardised or whitened, and by what. With
    `held_out`, that fraction of the training images is in the place of the test images,
    so that choices are not made by these.

    `dataset` is a name, or a folder that holds the folders `train` and `test`.
    """
    if Path(dataset).is_dir():
        train, test = (
            eqd.datasets.from_folder(Path(dataset) / part) for part in ("train", "test")
        )
    else:
        train, test = eqd.datasets.load(dataset, data_dir)
    preprocessing = (eqd.ZCA if zca else eqd.Standardisation).fit(train)
    train, test = train.map(preprocessing), test.map(preprocessing)
    if held_out > 0:
        train, test = train.split(held_out, key=jr.key(0))
    return train, test, preprocessing


def run(main: Callable[..., None], parser: argparse.ArgumentParser) -> None:
    """Calls `main` with the arguments of the command line, and a folder for the
    results. The next run loads what this one compiles."""
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="a folder for the results"
    )
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.output / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(**vars(args))


def adam(
    schedule: optax.Schedule, slower: float = 10.0
) -> optax.GradientTransformation:
    """Adam, for which the images move that many times as fast as all else that is
    learned."""

    def part(path: tuple, _: jax.Array) -> str:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return "images" if name == "images" else "all else"

    return optax.partition(
        {
            "images": optax.adam(schedule),
            "all else": optax.adam(lambda step: schedule(step) / slower),
        },
        lambda learned: jax.tree.map_with_path(part, learned),
    )


def with_targets(
    real: eqd.DistilledSet, num_classes: int, l2: float = 1e-3
) -> eqd.DistilledSet:
    """The set with targets of a squared error in the place of labels."""
    loss = eqd.SquaredError()
    targets = loss.targets(real.labels, num_classes)
    return eqd.DistilledSet(real.images, targets, l2=l2, loss=loss)


def error_of_mean(x: np.ndarray) -> float:
    """The standard error of the mean; zero of a single number."""
    return float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else 0.0


class Measured:
    """What has been measured, in a file."""

    def __init__(self, file: Path):
        self.file = file
        self.found = json.loads(file.read_text()) if file.exists() else {}

    def get(self, key: list, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, or returned when the script ran before."""
        text = json.dumps(key)
        if text not in self.found:
            self.found[text] = measure()
            print(f"{text}: {self.found[text]}", flush=True)
            # All of the file is there, or the old one.
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.found, indent=1))
            part.replace(self.file)
        return self.found[text]


def accuracies(
    make: Sets, recipe: recipes.Recipe, test: eqd.Dataset, num_networks: int
) -> list[list[float]] | None:
    """One row for each set, with the accuracy of each network."""
    sets = make()
    if recipe.name in ("dc", "supervised") and sets[0].labels.ndim == 2:
        return None
    found = recipes.evaluate(
        sets, recipe, test, num_networks=num_networks, key=jr.key(0)
    )
    return found.accuracies.tolist()


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
    start = with_targets(real, train.num_classes, l2=1.0)
    nothing = jax.tree.map(lambda _: False, start)
    learn = eqx.tree_at(lambda d: (d.labels, d.log_l2), nothing, (True, True))
    result = eqd.distill(
        start,
        linear(train),
        train,
        optimiser=optax.adam(0.02),
        steps=200,
        learn=(learn, False),
    )
    return result.distilled


def distil_linear(train: eqd.Dataset, n: int) -> eqd.DistilledSet:
    start = eqd.DistilledSet.from_noise(train, n, l2=0.01, scale=0.01, key=jr.key(0))
    optimiser = optax.chain(
        optax.lbfgs(learning_rate=1.0, linesearch=None), optax.clip_by_global_norm(0.5)
    )
    result = eqd.distill(
        start,
        linear(train),
        train,
        optimiser=optimiser,
        steps=150,
        learn=(True, False),
    )
    return result.distilled


def linear(train: eqd.Dataset) -> eqd.LinearClassifier:
    return eqd.LogisticRegression(train.images[0].size, train.num_classes)


def load(
    path: Path, standardisation: eqd.AbstractPreprocessing
) -> list[eqd.DistilledSet]:
    artifact = eqd.load(path)
    distilled = artifact.distilled
    if artifact.preprocessing is None:
        images = jax.vmap(standardisation)(distilled.images)
        return [eqx.tree_at(lambda d: d.images, distilled, images)]
    to_pixels = jax.vmap(artifact.preprocessing.inverse)
    images = jax.vmap(standardisation)(to_pixels(distilled.images))
    return [eqx.tree_at(lambda d: d.images, distilled, jnp.asarray(images))]


def to_cell(found: recipes.Evaluations | None) -> str:
    if found is None:
        return "-"
    text = f"{100 * found.mean:.1f}"
    if found.accuracies.shape[1] > 1:
        text += f" ± {100 * found.deviation_of_networks:.1f}"
    if len(found.accuracies) > 1:
        text += f" (draws ± {100 * found.deviation_of_sets:.1f})"
    return text


def to_table(
    rows: dict[str, list[recipes.Evaluations | None]],
    sizes: list[int],
    networks: list[str],
) -> str:
    lines = [f"| | bytes | {' | '.join(networks)} |"]
    lines.append("|---" * (len(networks) + 2) + "|")
    for (name, row), size in zip(rows.items(), sizes, strict=True):
        lines.append(f"| {name} | {size:,} | {' | '.join(map(to_cell, row))} |")
    return "\n".join(lines)


def draw(
    rows: dict[str, list[recipes.Evaluations | None]], networks: list[str]
) -> Figure:
    """One line for each set, one mark for each network: the mean over sets and
    networks, with the deviation over networks."""
    rows = {name: row for name, row in rows.items() if any(row)}
    figure = Figure(
        figsize=(6.5, 0.45 * len(rows) + 1.6), dpi=200, layout="constrained"
    )
    axis = figure.add_subplot()
    markers = "osD^vP*X"
    for j, network in enumerate(networks):
        # Marks of one line stand a little apart.
        shift = 0.08 * (j - (len(networks) - 1) / 2)
        found = [(i, row[j]) for i, row in enumerate(rows.values()) if row[j]]
        axis.errorbar(
            [100 * f.mean for _, f in found if f],
            [i + shift for i, _ in found],
            xerr=[100 * np.nan_to_num(f.deviation_of_networks) for _, f in found if f],
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
        "--data-dir", type=Path, help="the folder of the files of the dataset"
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
    parser.add_argument("--images", type=int, default=1, help="images a class")
    parser.add_argument("--draws", type=int, default=5, help="of random real images")
    parser.add_argument("--num-networks", type=int, default=3)
    parser.add_argument("--updates", type=int, help="defaults to the recipe's")
    run(main, parser)
