"""Accuracy against CPU time, all in one run: for images distilled with a pool, with the
last layers of fresh networks, by distribution matching and by gradient matching.

The time of each method starts before it compiles anything, and includes all threads of
the process. Loading the data and evaluating are not counted. All methods learn one
image per class, start from the same real images, use Adam with a cosine-decayed
learning rate, and return the moving average. Each method uses the learning rate that
did best on held-out training images (`--held-out 0.1`).

By default the labels are hard, and a ConvNet of 32-32-32 channels is trained with the
recipe of dataset condensation. With `--frepo` the targets are learned, the network is
that of FRePo, a step uses 1,024 real images, and a pool is compared with the same pool
in rounds.

The objectives of distribution matching (Zhao and Bilen 2023) and of gradient matching
(Zhao, Mopuri and Bilen 2021) are written here, as a user would write them.

Prints a table in Markdown, and plots the curves with the published end points.
"""

import argparse
import dataclasses
import functools as ft
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import adam, ConvNet, DATASETS, maker, NETWORKS, real_data
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import eqdistill as eqd
from eqdistill import recipes


@dataclasses.dataclass
class Method:
    """The number of outer steps, the learning rate at the start, functions that make
    the objective and the real data, what to change in the start, and what to learn."""

    steps: int
    rate: float
    objective: Callable
    data: Callable
    prepare: Callable = lambda start: start
    learn: Callable = lambda start: start


PUBLISHED = {
    "mnist": {"DC": 91.7, "DSA": 88.7, "FRePo": 93.0},
    "fashion_mnist": {"DC": 70.5, "DSA": 70.6, "FRePo": 75.6},
}


class DistributionMatching(eqd.AbstractObjective):
    """The squared distance between the mean features of the real and of the distilled
    images, summed over the classes."""

    models: eqd.AbstractModels
    num_classes: int
    failures: tuple[str, ...] = ()

    def init(self, distilled, *, key):
        return self.models.init(distilled, key=key)

    def __call__(self, distilled, data, state, *, step, key):
        data_key, models_key = jr.split(key)
        network = self.models.draw(state, key=jr.fold_in(models_key, step))
        features = eqd.linear.last_layer(network).features

        def of_example(features, x, y):
            return jnp.outer(jax.nn.one_hot(y, self.num_classes), features(x))

        real = data.mean(of_example, features, step, key=data_key)
        real = jax.lax.stop_gradient(real)
        own = class_means(of_example, features, distilled)
        # Batches are balanced: a class has one example in `num_classes`.
        distance = self.num_classes**2 * jnp.sum((real - own) ** 2)
        return distance, eqd.Outcome(state, jnp.array(0), {})


class GradientMatching(eqd.AbstractObjective):
    """The distance between the gradients on the real and on the distilled images of
    each class: one minus the cosine, summed over the outputs of the layers."""

    models: eqd.AbstractModels
    num_classes: int
    failures: tuple[str, ...] = ()

    def init(self, distilled, *, key):
        return self.models.init(distilled, key=key)

    def __call__(self, distilled, data, state, *, step, key):
        data_key, models_key = jr.split(key)
        network = self.models.draw(state, key=jr.fold_in(models_key, step))
        params, static = eqx.partition(network, eqx.is_inexact_array)

        def of_example(params, x, y):
            logits = eqx.combine(params, static)(x)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return loss * jax.nn.one_hot(y, self.num_classes)

        real = lambda params: data.mean(of_example, params, step, key=data_key)
        own = lambda params: class_means(of_example, params, distilled)
        gradients = jax.lax.stop_gradient(jax.jacrev(real)(params))
        distances = jax.tree.map(distance, gradients, jax.jacrev(own)(params))
        total = jnp.stack(jax.tree.leaves(distances)).sum()
        return total, eqd.Outcome(state, jnp.array(0), {})


def class_means(of_example, model, distilled):
    of_image = lambda x, y: of_example(model, x, y)
    return jax.vmap(of_image)(distilled.images, distilled.labels).mean(axis=0)


def distance(real, own):
    """One minus the cosine of the rows of a layer's weights, for each class."""
    if real.size == real.shape[0] * real.shape[1]:  # a bias
        return jnp.zeros(())
    rows = lambda x: x.reshape(x.shape[0] * x.shape[1], -1)
    return jnp.sum(1 - cosine(rows(real), rows(own)))


cosine = ft.partial(optax.losses.cosine_similarity, epsilon=1e-6)


class Clock(eqd.AbstractCallback[list]):
    """Keeps the state and the CPU time at some of the steps."""

    marks: tuple[int, ...]
    every: int

    def init(self, problem, state, steps):
        return []

    def __call__(self, problem, state, history, own):
        if len(history) in self.marks:
            own = [*own, (len(history), time.process_time(), state)]
        return own, False

    def close(self, own):
        pass


def dc_methods(network: Callable, small: Callable, c: int) -> dict[str, Method]:
    """One image per class with hard labels, for the recipe of dataset condensation."""
    balanced = lambda of_class: ft.partial(
        eqd.Batches, size=of_class * c, balanced=True
    )
    matching = lambda kind: lambda: kind(eqd.Fresh(network), c)
    # Our methods use narrower networks and smaller batches. Ridge regression on the
    # last layer of a fresh network compiles in half the time of a pool.
    some = ft.partial(eqd.Batches, size=128)
    last = lambda *, key: eqd.linear.last_layer(small(key=key))
    fresh = lambda: eqd.Bilevel(eqd.Fresh(last))
    pool = lambda: eqd.Bilevel(eqd.Pool(small, max_age=10))
    squared = lambda start: eqx.tree_at(lambda s: s.loss, start, eqd.SquaredError())
    images = lambda start: start.images
    return {
        "fresh networks": Method(166, 0.4, fresh, some, prepare=squared),
        "pool": Method(4000, 0.03, pool, some),
        "distribution matching": Method(
            1600, 0.3, matching(DistributionMatching), balanced(64), learn=images
        ),
        "gradient matching": Method(
            128, 0.3, matching(GradientMatching), balanced(16), learn=images
        ),
    }


def frepo_methods(network: Callable, c: int) -> dict[str, Method]:
    """One image per class with learned targets, at the size of FRePo's experiments."""
    batches = ft.partial(eqd.Batches, size=1024)
    pool = lambda: eqd.Bilevel(eqd.Pool(network), loss=eqd.CrossEntropy(0.2))
    rounds = lambda: eqd.Rounds(pool(), steps=8, examples=1024)
    targets = lambda start: start.with_targets(c)
    return {
        "pool": Method(64, 0.03, pool, batches, prepare=targets),
        "pool, in rounds of 8": Method(448, 0.03, rounds, batches, prepare=targets),
    }


def main(
    dataset: str,
    data_dir: Path | None,
    methods: list[str] | None,
    frepo: bool,
    shorter: int,
    learning_rate: float | None,
    num_networks: int,
    held_out: float,
    seed: int,
    output: Path,
) -> None:
    train, test, _ = real_data(dataset, data_dir, held_out=held_out)
    c = train.num_classes
    if frepo:
        network = maker(NETWORKS["FRePo's ConvNet"], train)
        by = recipes.feature_regression(network)
        made = frepo_methods(network, c)
    else:
        network = maker(ft.partial(ConvNet, widths=(32, 32, 32)), train)
        by = recipes.dc(network)
        small = maker(ft.partial(ConvNet, widths=(16, 32, 64)), train)
        made = dc_methods(network, small, c)
    methods = methods or list(made)
    curves = {}
    for name in methods:
        method = made[name]
        steps = max(method.steps // shorter, 2)
        rate = method.rate if learning_rate is None else learning_rate
        every = max(steps // 64, 1)
        marks = (*(every * 2**i for i in range(6) if every * 2**i < steps), steps)
        jax.clear_caches()
        began = time.process_time()
        start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(seed))
        schedule = optax.cosine_decay_schedule(rate, steps)
        result = eqd.distill(
            method.prepare(start),
            method.objective(),
            method.data(train),
            optimiser=eqd.averaged(adam(schedule), decay=0.99),
            learn=method.learn,
            steps=steps,
            key=jr.key(seed),
            callbacks=[Clock(marks=marks, every=every), eqd.ProgressBar()],
        )
        curves[name] = []
        for step, at, state in result.callbacks[0]:
            then = eqx.tree_at(lambda r: r.state, result, state).average()
            found = eqd.evaluate(
                then.distilled, by, test, num_models=num_networks, key=jr.key(seed)
            )
            curves[name].append((step, at - began, 100 * np.array(found.scores)))
            print(f"{name}, {step} steps, {at - began:.1f} CPU-s: {found}", flush=True)
    rows = [
        f"| {name} | {step:,} | {at:.0f} | "
        f"{found.mean():.1f} ± {found.std(ddof=1):.1f} |"
        for name, curve in curves.items()
        for step, at, found in curve
    ]
    header = ["| method | outer steps | CPU seconds | accuracy |", "|---|---|---|---|"]
    print("\n" + "\n".join(header + rows) + "\n")
    for name, curve in curves.items():
        seconds = [at for _, at, found in curve if found.mean() >= 80]
        first = f"{min(seconds):.0f} CPU-s" if seconds else "never"
        print(f"80%: {first}, {name}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"accuracy_{Path(dataset).name}{'_frepo' * frepo}.png"
    draw(curves, PUBLISHED.get(dataset, {})).savefig(file)
    print(f"file {file}")


def draw(curves: dict[str, list], published: dict[str, float]) -> Figure:
    figure = Figure(figsize=(5.5, 3.2), dpi=200, layout="constrained")
    axis = figure.add_subplot()
    for marker, (name, curve) in zip("osD^", curves.items(), strict=False):
        minutes = [at / 60 for _, at, _ in curve]
        mean = [found.mean() for _, _, found in curve]
        std = [found.std(ddof=1) for _, _, found in curve]
        axis.errorbar(minutes, mean, yerr=std, marker=marker, markersize=4, label=name)
    for name, value in published.items():
        axis.axhline(value, color="0.7", linewidth=0.8, linestyle=":")
        axis.annotate(
            f"{name}, published",
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
            color="0.4",
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("CPU time of the distillation (minutes, including compilation)")
    axis.set_ylabel("accuracy (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help=DATASETS)
    parser.add_argument(
        "--data-dir", type=Path, help="the folder with the files of the dataset"
    )
    parser.add_argument("--methods", nargs="*", help="defaults to all")
    parser.add_argument(
        "--frepo",
        action="store_true",
        help="compare pools with and without rounds, at the size of FRePo",
    )
    parser.add_argument(
        "--shorter", type=int, default=1, help="divide the numbers of steps by this"
    )
    parser.add_argument(
        "--learning-rate", type=float, help="replaces that of each method"
    )
    parser.add_argument("--num-networks", type=int, default=5)
    parser.add_argument("--held-out", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    # No cache of compiled programs: compiling is part of the time.
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="the folder to write to"
    )
    main(**vars(parser.parse_args()))
