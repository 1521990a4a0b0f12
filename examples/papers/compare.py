"""Compares distilled images with the same number of real images, means and k-means.

For each number of images, logistic regression is fitted only to these images, and its
accuracy on the test images is measured. The baselines are random real images, class
means, k-means and herding. The ridge of each baseline is chosen from a grid by its
accuracy on a held-out tenth of the training images. The baselines are compared with
images distilled with the ridge fixed at 0.1; with a learned ridge; and with a learned
ridge and soft labels. To save time, all sets are made from only `--train` of the
training images. Prints a table in Markdown, and plots it in `compare.png`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import run
from jaxtyping import PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import eqdistill as eqd


TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "digits": "Digits"}
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Setting(NamedTuple):
    model: eqd.linear.LinearClassifier
    train: eqd.Dataset
    test: eqd.Dataset
    held_out: eqd.Dataset
    everything: eqd.Dataset


def load(name: str, num_train: int) -> Setting:
    everything, test = eqd.datasets.load(name)
    train, held_out = everything.split(0.1, key=jr.key(0))
    train = eqd.Dataset(
        train.images[:num_train], train.labels[:num_train], train.num_classes
    )
    model = eqd.linear.LogisticRegression(train.images[0].size, train.num_classes)
    return Setting(model, train, test, held_out, everything)


def accuracy(distilled: eqd.DistilledSet, setting: Setting, data: eqd.Dataset) -> float:
    return eqd.evaluate(distilled, setting.model, data).accuracy


Method = Callable[[Setting, int, PRNGKeyArray], float]


def baseline(constructor: Callable[..., eqd.DistilledSet]) -> Method:
    def measure(setting: Setting, n: int, key: PRNGKeyArray) -> float:
        start = constructor(setting.train, n, l2=1.0, key=key)
        candidates = [
            eqd.DistilledSet(start.images, start.labels, l2=l2) for l2 in GRID
        ]
        best = max(candidates, key=lambda d: accuracy(d, setting, setting.held_out))
        return accuracy(best, setting, setting.test)

    return measure


def distilled(
    steps: int, *, l2: float, learn_l2: bool = False, soft_labels: bool = False
) -> Method:
    # The outer loss is smooth, and each step uses all data: unit steps of L-BFGS need
    # no line search. Steps that learn the ridge are clipped, because a long step could
    # make the ridge so large that nothing more is learned.
    optimiser = optax.lbfgs(learning_rate=1.0, linesearch=None)
    if learn_l2:
        optimiser = optax.chain(optimiser, optax.clip_by_global_norm(0.5))

    def measure(setting: Setting, n: int, key: PRNGKeyArray) -> float:
        scale = 1 / setting.train.images[0].size
        start = eqd.DistilledSet.from_noise(
            setting.train, n, l2=l2, scale=scale, key=key
        )
        if soft_labels:
            num_classes = setting.train.num_classes
            if n < num_classes:
                # Each image stands for several classes, drawn at random.
                logits = 0.5 * jr.normal(key, (n, num_classes))
            else:
                logits = 5 * jax.nn.one_hot(start.labels, num_classes)
            start = eqd.DistilledSet(start.images, logits, l2=l2)
        names = ["images", *["labels"] * soft_labels, *["log_l2"] * learn_l2]
        try:
            result = eqd.distill(
                start,
                setting.model,
                setting.train,
                optimiser=optimiser,
                steps=steps,
                learn=lambda start: [getattr(start, name) for name in names],
            ).distilled
        except eqd.DistillationError as e:
            print(f"{e} Using the last good distilled set.", file=sys.stderr)
            result = e.distillation.distilled
        return accuracy(result, setting, setting.test)

    return measure


def methods(steps: int) -> dict[str, Method]:
    return {
        "random real images": baseline(eqd.DistilledSet.from_real),
        "herding": baseline(eqd.DistilledSet.from_herding),
        "class means": baseline(eqd.DistilledSet.from_class_means),
        "k-means": baseline(eqd.DistilledSet.from_kmeans),
        "distilled, ridge 0.1": distilled(steps, l2=0.1),
        "distilled, learned ridge": distilled(steps, l2=0.01, learn_l2=True),
        "distilled, learned ridge and labels": distilled(
            steps, l2=0.01, learn_l2=True, soft_labels=True
        ),
    }


def full_data_accuracy(setting: Setting) -> float:
    """The accuracy of a fit to all training images. A few steps suffice, because an
    approximate argmin is enough."""
    data = setting.everything
    everything = eqd.DistilledSet(data.floating(), data.labels, l2=1e-4)
    fitted = eqd.fit(
        everything, setting.model, eqd.linear.SpanSolver(max_steps=20), throw=False
    )
    logits = jax.vmap(fitted.model)(setting.test.floating())
    return float(jnp.mean(jnp.argmax(logits, axis=1) == setting.test.labels))


def table(images: list[int], results: dict[str, np.ndarray]) -> str:
    lines = [
        f"| images | {' | '.join(map(str, images))} |",
        f"|---|{'---|' * len(images)}",
    ]
    for method, values in results.items():
        cells = [
            f"{100 * mean:.1f} ± {100 * std:.1f}"
            for mean, std in zip(values.mean(1), values.std(1), strict=True)
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Baselines are grey and dashed; distilled sets have the colours of Okabe and Ito.
STYLES = [
    {"color": "0.70", "linestyle": "--", "marker": "x"},
    {"color": "0.55", "linestyle": "--", "marker": "^"},
    {"color": "0.40", "linestyle": "--", "marker": "v"},
    {"color": "0.20", "linestyle": "--", "marker": "D"},
    {"color": "#E69F00", "marker": "o"},
    {"color": "#0072B2", "marker": "s"},
    {"color": "#D55E00", "marker": "*", "markersize": 8},
]


def draw(
    axis: Axes, images: list[int], results: dict[str, np.ndarray], ceiling: float
) -> None:
    axis.axhline(100 * ceiling, color="black", linewidth=0.8, linestyle=":")
    axis.annotate(
        "all training images",
        (0.02, 100 * ceiling),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        fontsize=7,
    )
    for (method, values), style in zip(results.items(), STYLES, strict=True):
        axis.errorbar(
            images,
            100 * values.mean(axis=1),
            100 * values.std(axis=1),
            label=method,
            capsize=2,
            alpha=0.9,
            linewidth=1.3,
            **{"markersize": 4, **style},
        )
    axis.set_xscale("log")
    axis.set_xticks(images, [str(n) for n in images])
    axis.minorticks_off()
    axis.set_ylim(0, 100)
    axis.set_xlabel("number of images")
    axis.grid(axis="y", color="0.9", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def main(
    images: list[int],
    seeds: int,
    steps: int,
    train: int,
    output: Path,
    dataset: Sequence[str] = ("mnist", "fashion_mnist"),
) -> None:
    start = time.perf_counter()
    images = sorted(set(images))
    all_methods = methods(steps)
    panels = {}
    for name in dict.fromkeys(dataset):
        try:
            setting = load(name, train)
        except FileNotFoundError as e:
            print(f"{TITLES[name]} is skipped: {e}", file=sys.stderr)
            continue
        results = {method: np.zeros((len(images), seeds)) for method in all_methods}
        for i, n in enumerate(images):
            for method, measure in all_methods.items():
                begin = time.perf_counter()
                for seed in range(seeds):
                    results[method][i, seed] = measure(setting, n, jr.key(seed))
                print(
                    f"{TITLES[name]}, {n} images, {method}: "
                    f"{results[method][i].mean():.1%} "
                    f"({time.perf_counter() - begin:.1f} s)",
                    file=sys.stderr,
                )
        ceiling = full_data_accuracy(setting)
        panels[TITLES[name]] = results, ceiling
        print(f"\n{TITLES[name]}: test accuracy (%), mean ± standard deviation")
        print(f"over {seeds} seeds; {ceiling:.1%} with all training images.\n")
        print(table(images, results), flush=True)
    if not panels:
        sys.exit("No dataset was found.")

    figure = Figure(figsize=(3.6 * len(panels), 3.9), dpi=200, layout="constrained")
    axes = np.ravel(figure.subplots(1, len(panels), squeeze=False, sharey=True))
    for axis, (title, (results, ceiling)) in zip(axes, panels.items(), strict=True):
        draw(axis, images, results, ceiling)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        fontsize=7,
        frameon=False,
    )
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "compare.png")
    print(f"\nplot {output / 'compare.png'}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        action="extend",
        choices=list(TITLES),
        help="may be repeated (default: mnist fashion_mnist)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=[1, 2, 5, 10, 20, 50, 100],
        help="numbers of images",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=50, help="outer steps")
    parser.add_argument(
        "--train",
        type=int,
        default=10_000,
        help="use at most this many training images",
    )
    run(main, parser)
