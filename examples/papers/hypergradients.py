"""Compares hypergradients: implicit, unrolled, truncated and approximate ones on the
same problem, by error, time and memory, and by the images distilled with each.

Each part prints a table in Markdown. The first two are for ten images of MNIST and
logistic regression:

- `errors`: the relative error of the hypergradient, its time and its memory; with a
  plot of the error and of its predicted decay. In double precision, where the exact
  hypergradient is known.
- `accuracy`: the outer loss and the test accuracy after fifty outer steps with each.
- `memory`: the memory for a hypergradient through LeNet's training, for 10 to 10,000
  steps, as the compiler reports it.
- `cost`: the time of a backward pass relative to plain training, in a loop, for several
  networks.
"""

import argparse
import functools as ft
import math
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
from _common import run
from matplotlib.figure import Figure

import eqdistill as eqd
from eqdistill import adjoints, linear, nn


NETWORKS = {
    "LeNet": nn.LeNet,
    "ConvNet, 16-32-64": ft.partial(nn.ConvNet, widths=(16, 32, 64), norm=None),
    "ConvNet, 16-32-64, instance norm": ft.partial(nn.ConvNet, widths=(16, 32, 64)),
}
# Slightly less than the inverse of the largest curvature of the inner problem.
RATE = 0.5
L2 = 0.05


def main(parts: list[str], dataset: str, steps: int, repeats: int, output: Path):
    output.mkdir(parents=True, exist_ok=True)
    train, test = eqd.datasets.load(dataset)
    if "errors" in parts:
        with jax.enable_x64(True):
            errors(train, repeats, output)
    if "accuracy" in parts:
        accuracy(train, test, steps)
    if "memory" in parts:
        memory(train)
    if "cost" in parts:
        cost(train, repeats)


def descent(steps: int, **kwargs) -> eqd.UnrolledSolver:
    return eqd.UnrolledSolver(optax.sgd, {"learning_rate": RATE}, steps, **kwargs)


def neumann(terms: int) -> eqd.ArgminSolver:
    """The exact argmin, with the first terms of the series at the same step size."""
    return eqd.ArgminSolver(
        adjoint=optx.ImplicitAdjoint(adjoints.NeumannSeries(terms, RATE))
    )


def loss_of_images(
    start: eqd.DistilledSet, objective: eqd.Bilevel, data: eqd.AbstractData
) -> Callable:
    """The loss of an objective as a function of the images alone."""
    state = objective.init(start, key=jr.key(0))

    def loss(images):
        distilled = eqx.tree_at(lambda d: d.images, start, images)
        step = jnp.array(0)
        return objective(distilled, data, state, step=step, key=jr.key(0))[0]

    return loss


def errors(train: eqd.Dataset, repeats: int, output: Path) -> None:
    train = eqd.Dataset(train.floating()[:5000], train.labels[:5000], 10)
    train = jax.tree.map(
        lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, train
    )
    start = eqd.DistilledSet.from_class_means(train, l2=L2, key=jr.key(0))
    model = linear.LogisticRegression(math.prod(train.shape), 10, dtype=jnp.float64)

    def compiled_gradient(inner: eqd.AbstractInnerSolver):
        objective = eqd.Bilevel(model, inner)
        loss = loss_of_images(start, objective, objective.layout(train))
        return jax.jit(jax.grad(loss)).lower(start.images).compile()

    solver = linear.SpanSolver(rtol=1e-14, atol=1e-14)
    exact = compiled_gradient(solver)(start.images)
    counts = (1, 3, 10, 30, 100, 300, 1000)
    made = {
        "implicit, in the span": [solver],
        "implicit, L-BFGS and CG": [eqd.ArgminSolver()],
        "unrolled": [descent(n) for n in counts[2:]],
        "the last steps of 1,000": [
            descent(1000, window=adjoints.LastSteps(n)) for n in counts[:-1]
        ],
        "Neumann series": [neumann(n) for n in counts],
        "a random window of 1,000": [descent(1000, window=adjoints.RandomWindow(100))],
        "a gradient-weighted window of 1,000": [
            descent(1000, window=adjoints.GradientWindow(100))
        ],
    }
    found = {}
    print("| hypergradient | steps or terms | error | time | memory, MB |")
    print("|---|---|---|---|---|")
    unit = None
    for name, solvers in made.items():
        found[name] = []
        for inner in solvers:
            compiled = compiled_gradient(inner)
            g = compiled(start.images)
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                jax.block_until_ready(compiled(start.images))
                times.append(time.perf_counter() - began)
            unit = unit or min(times)
            count = count_of(inner)
            error = float(jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact))
            found[name].append((count, error))
            print(
                f"| {name} | {count or '-'} | {error:.1e} | {min(times) / unit:.1f} | "
                f"{megabytes(compiled):.2f} |",
                flush=True,
            )
    found = {k: v for k, v in found.items() if len(v) > 1}
    draw(found).savefig(output / "hypergradients.png")
    print(f"\nfile {output / 'hypergradients.png'}\n")


def count_of(inner: eqd.AbstractInnerSolver) -> int | None:
    if isinstance(inner, eqd.UnrolledSolver):
        return inner.steps if inner.window is None else inner.window.size
    if isinstance(inner, eqd.ArgminSolver):
        assert isinstance(inner.adjoint, optx.ImplicitAdjoint)
        linear = inner.adjoint.linear_solver
        return linear.terms if isinstance(linear, adjoints.NeumannSeries) else None
    return None


def draw(found: dict[str, list[tuple[int, float]]]) -> Figure:
    figure = Figure(figsize=(5, 3.4), dpi=200, layout="constrained")
    axis = figure.add_subplot()
    # Markers differ in size, because some points coincide.
    for (name, points), marker, size in zip(
        found.items(), "os^", (4, 8, 4), strict=True
    ):
        lines = axis.plot(
            *zip(*points, strict=True), marker=marker, markersize=size, label=name
        )
        if size > 4:
            lines[0].set_markerfacecolor("none")
    steps = np.geomspace(1, 1000, 200)
    axis.plot(
        steps,
        (1 - RATE * L2) ** steps,
        color="0.5",
        linestyle="--",
        linewidth=1,
        label=r"$(1 - \alpha \lambda)^K$",
    )
    axis.set(xscale="log", yscale="log", ylim=(1e-12, 3))
    axis.set_xlabel("steps or terms $K$")
    axis.set_ylabel("relative error of the hypergradient")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def accuracy(train: eqd.Dataset, test: eqd.Dataset, steps: int) -> None:
    model = linear.LogisticRegression(math.prod(train.shape), 10)
    start = eqd.DistilledSet.from_noise(
        train, l2=L2, scale=1 / math.prod(train.shape), key=jr.key(0)
    )
    print(f"| hypergradient | outer loss after {steps} steps | test accuracy, % |")
    print("|---|---|---|")
    for name, inner in {
        "implicit, in the span": linear.SpanSolver(),
        "implicit, L-BFGS and CG": eqd.ArgminSolver(),
        "unrolled, 100 steps": descent(100),
        "the last 10 of 100": descent(100, window=adjoints.LastSteps(10)),
        "random 10 of 100": descent(100, window=adjoints.RandomWindow(10)),
        "10 of 100, gradient-weighted": descent(
            100, window=adjoints.GradientWindow(10)
        ),
        "unrolled, 10 steps": descent(10),
        "Neumann series, 10 terms": neumann(10),
        "Neumann series, one term": neumann(1),
    }.items():
        result = eqd.distill(
            start,
            eqd.Bilevel(model, inner),
            train,
            steps=steps,
        )
        # The evaluation is the same for all of them.
        found = eqd.evaluate(result.distilled, model, test)
        loss = eqd.evaluate(result.distilled, model, train).loss
        print(f"| {name} | {loss:.3f} | {100 * found.accuracy:.1f} |", flush=True)
    print()


def unrolled_loss(
    network: Callable, shape: tuple[int, ...], inner: eqd.AbstractInnerSolver
) -> Callable:
    """The loss of a network on ten images, after training on ten others."""
    images = jr.normal(jr.key(0), (10, *shape))
    start = eqd.DistilledSet(images, jnp.arange(10), l2=1e-4)
    real = eqd.Dataset(jr.normal(jr.key(1), (10, *shape)), jnp.arange(10), 10)
    model = network(shape, 10, key=jr.key(2))
    return loss_of_images(start, eqd.Bilevel(model, inner), eqd.FullBatch(real))


def memory(train: eqd.Dataset) -> None:
    images = jnp.zeros((10, *train.shape))
    counts = (10, 100, 1000, 10_000)
    print(f"| memory, MB | {' | '.join(f'{n:,} steps' for n in counts)} |")
    print("|---" * (len(counts) + 1) + "|")
    checkpoint = adjoints.RecursiveCheckpointAdjoint
    of_steps = {
        "`DirectAdjoint()`": descent,
        "`RecursiveCheckpointAdjoint()`": lambda n: descent(n, adjoint=checkpoint()),
        "the same with the logarithm of the steps": lambda n: descent(
            n, adjoint=checkpoint(math.ceil(math.log2(n)))
        ),
        "`ReversibleSolver`, momentum 0.98": lambda n: adjoints.ReversibleSolver(
            0.01, momentum=0.98, steps=n
        ),
    }
    for name, make in of_steps.items():
        sizes = []
        for n in counts:
            loss = unrolled_loss(nn.LeNet, train.shape, make(n))
            sizes.append(megabytes(jax.jit(jax.grad(loss)).lower(images).compile()))
        print(f"| {name} | {' | '.join(f'{x:.1f}' for x in sizes)} |", flush=True)
    small = eqd.DistilledSet(jr.normal(jr.key(0), (10, 4, 4)), jnp.arange(10), l2=1)
    model = linear.LogisticRegression(16, 10)
    reversible = list(of_steps.values())[-1]
    bits = [eqd.fit(small, model, reversible(n)).stats["kept_bits"] for n in counts]
    print(
        f"| its bits per parameter and step | {' | '.join(f'{x:.4f}' for x in bits)} |"
    )
    print(f"\nlog2(1 / 0.98) is {math.log2(1 / 0.98):.4f}\n")


def megabytes(compiled) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def cost(train: eqd.Dataset, repeats: int) -> None:
    images = jr.normal(jr.key(3), (10, *train.shape))
    names = (
        "`DirectAdjoint()`",
        "`RecursiveCheckpointAdjoint()`",
        "`ReversibleSolver`",
    )
    print("| backward pass over plain training | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for network, make in NETWORKS.items():
        ratios = []
        for inner in (
            descent(100),
            descent(100, adjoint=adjoints.RecursiveCheckpointAdjoint()),
            adjoints.ReversibleSolver(0.01, momentum=0.98, steps=100),
        ):
            loss = unrolled_loss(make, train.shape, inner)
            plain = unrolled_loss(make, train.shape, descent(100))
            programs = [
                jax.jit(f).lower(images).compile() for f in (plain, jax.grad(loss))
            ]
            times = [[], []]
            for _ in range(repeats + 1):
                for own, program in zip(times, programs, strict=True):
                    began = time.perf_counter()
                    jax.block_until_ready(program(images))
                    own.append(time.perf_counter() - began)
            ratios.append(min(times[1]) / min(times[0]))
        print(f"| {network} | {' | '.join(f'{x:.1f}' for x in ratios)} |", flush=True)
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["errors", "accuracy", "memory", "cost"]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--steps", type=int, default=50, help="outer steps")
    parser.add_argument(
        "--repeats", type=int, default=5, help="repetitions of each timing"
    )
    run(main, parser)
