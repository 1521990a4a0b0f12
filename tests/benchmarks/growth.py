"""Measures how the time and the memory of distillation grow.

The time of one outer step is measured against the numbers of real images, pixels,
distilled images and classes, on images of noise, in which no pixel is rare. On MNIST,
the time of a whole run is measured against its number of steps, and of `jax.vmap` over
steps against the number of starts. The memory is the peak of a process that distils
MNIST.

Prints Markdown tables of medians with the slopes between logarithms, and writes
`growth.json` and `growth.png`. Run it with `python tests/benchmarks/growth.py`, on
Linux.
"""

import gc
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _timing import in_turn, machine, parser, print_table, seconds, write
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

import eqdistill as eqd


BASE = {"N": 20_000, "p": 784, "n": 10, "c": 10}
GRID = {
    "N": [5_000, 10_000, 20_000, 40_000, 80_000],
    "p": [98, 196, 392, 784, 1568],
    "n": [10, 20, 50, 100, 200, 400, 800],
    "c": [5, 10, 20, 40],
}
NAMES = {
    "N": "real images $N$",
    "p": "pixels $p$",
    "n": "distilled images $n$",
    "c": "classes $c$",
    "steps": "outer steps",
    "starts": "starts at once",
}
RUNS = ("steps", "starts")
STEPS = 32


def noise(N: int, p: int, n: int, c: int):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, p), np.uint8)
    train = eqd.Dataset(images, rng.integers(0, c, N), c)
    start = eqd.DistilledSet(images[:n] / np.float32(255), np.arange(n) % c, l2=0.1)
    return start, eqd.linear.LogisticRegression(p, c), train


def from_noise(train: eqd.Dataset, key: jax.Array) -> eqd.DistilledSet:
    return eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 784, key=key)


def of_sizes(repeats: int) -> dict[str, dict[int, float]]:
    """Seconds of one outer step: the difference between many steps and few."""
    optimiser = optax.adam(0.02)

    def step(**sizes):
        problem = noise(**sizes)
        run = lambda steps: (
            lambda: eqd.distill(*problem, optimiser=optimiser, steps=steps)
        )
        times = in_turn({"few": run(2), "many": run(STEPS + 2)}, repeats)
        return float(np.median(times["many"] - times["few"])) / STEPS

    # There are at least as many distilled images as classes.
    bases = {letter: BASE for letter in GRID} | {"c": {**BASE, "n": 40}}
    return {
        letter: {value: step(**{**bases[letter], letter: value}) for value in values}
        for letter, values in GRID.items()
    }


def of_runs(repeats: int) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
    train, _ = eqd.datasets.load("mnist")
    model = eqd.linear.LogisticRegression(28 * 28, 10)
    keys = jr.split(jr.key(0), 32)
    starts = [from_noise(train, key) for key in keys]
    lbfgs = optax.lbfgs(learning_rate=1.0, linesearch=None)
    whitened = eqd.linear.whitened(lbfgs, train)
    one = lambda steps, optimiser: (
        lambda: eqd.distill(starts[0], model, train, optimiser=optimiser, steps=steps)
    )
    problem = eqd.Problem(starts[0], eqd.Bilevel(model), optimiser=whitened)
    data = problem.objective.layout(train)

    def each(n: int):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts[:n])
        step = eqx.filter_jit(eqx.filter_vmap(problem.step, in_axes=(0, None)))

        def run():
            states = jax.vmap(problem.init)(stacked, key=keys[:n])
            for _ in range(8):
                states, _ = step(states, data)
            return states.learned

        return run

    lengths = {s: one(s, lbfgs) for s in (10, 20, 40, 80, 160)}
    counts = {0: one(8, whitened), **{n: each(n) for n in (1, 2, 4, 8, 16, 32)}}
    first = {}
    for n in (0, 32):
        jax.clear_caches()
        first[n] = seconds(counts[n])
    found = {}
    for name, runs in {"steps": lengths, "starts": counts}.items():
        times = in_turn(runs, repeats)
        found[name] = {k: float(np.median(x)) for k, x in times.items()}
    return found, first


def memory() -> dict[str, float]:
    """Megabytes that a process holds while it distils, at most."""
    train, _ = eqd.datasets.load("mnist")
    start = from_noise(train, jr.key(0))
    problem = start, eqd.linear.LogisticRegression(28 * 28, 10), train
    optimiser = optax.adam(0.02)
    run = lambda: eqd.distill(*problem, optimiser=optimiser, steps=20)
    # The first run compiles.
    run()
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    peak = _status("VmHWM")
    as_bytes = train.images.nbytes / 1e6
    held = peak - before + as_bytes
    return {"bytes": as_bytes, "held": held, "of floats": held / (4 * as_bytes)}


def _status(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{name}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024 / 1e6


def show(found: dict[str, dict[int, float]], first: dict[int, float]) -> None:
    for letter, times in found.items():
        times = {k: v for k, v in times.items() if k > 0}
        # Between the two largest sizes.
        (a, s), (b, t) = list(times.items())[-2:]
        slope = f"{np.log(t / s) / np.log(b / a):.2f}"
        cells = [f"{1e3 * t:.1f}" for t in times.values()]
        print_table([NAMES[letter], *times, "slope"], [["ms", *cells, slope]])
    starts = found["starts"]
    ratio = starts[32] / starts[0]
    print(
        f"8 steps of 32 starts at once take {ratio:.1f} times as long as one run of "
        f"`distill` ({1e3 * starts[0]:.0f} ms): {32 / ratio:.1f} times as fast as 32 "
        f"runs. With compile, they take {first[32]:.1f} s, {first[32] / first[0]:.1f} "
        f"times as long as the {first[0]:.1f} s of one run.\n"
    )


def draw(found: dict[str, dict[int, float]]) -> Figure:
    figure = Figure(figsize=(7.0, 3.6), dpi=200, layout="constrained")
    axes = np.ravel(figure.subplots(2, 3))
    for axis, (letter, times) in zip(axes, found.items(), strict=True):
        sizes = [k for k in times if k > 0]
        milliseconds = [1e3 * times[k] for k in sizes]
        axis.loglog(sizes, milliseconds, color="black", marker="o", markersize=3)
        # Proportional growth, for comparison.
        last = milliseconds[-1] / sizes[-1]
        axis.loglog(sizes, [last * k for k in sizes], color="0.7", linestyle="--")
        axis.set_xticks(sizes, [f"{k:,}" for k in sizes], fontsize=6, rotation=30)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.minorticks_off()
        axis.set_xlabel(NAMES[letter], fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("ms per run" if letter in RUNS else "ms per step", fontsize=8)
    return figure


def main(repeats: int, output: Path) -> None:
    results: dict[str, object] = {"machine": machine()}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        held = pool.submit(memory).result()
    print(
        f"Distilling MNIST takes {held['held']:.0f} MB, {held['of floats']:.2f} of the "
        f"{4 * held['bytes']:.0f} MB of its pixels as floats; as bytes they take "
        f"{held['bytes']:.0f} MB.\n"
    )
    runs, first = of_runs(repeats)
    found = {**of_sizes(repeats), **runs}
    show(found, first)
    results |= {"memory": held, "seconds": found, "starts with compile": first}
    write(results, output / "growth.json")
    draw(found).savefig(output / "growth.png")


if __name__ == "__main__":
    main(**vars(parser(__doc__, repeats=5).parse_args()))
