"""Distils a dataset into images for linear probes of frozen networks.

The backbones are convolutional networks that are trained here, on another dataset; in
their place stand the pre-trained networks of one's own. The features of the real images
are computed once. The inner problem is ridge regression on the features of the
distilled images, whose targets, ridge and temperature are learned, too. With several
backbones, one set serves them all: each outer step takes the next one. With
`--pool-share` some of the steps are for networks of a pool, which are trained on the
distilled images, so that the set serves backbones that are not at hand; such a set
begins best at one that was distilled for the pool alone, by `network.py`.

Prints the test accuracy of the probes of as many real images, of the distilled images
and of all real images: on the backbones that the images were distilled for, and the
mean over three of another architecture that they were not distilled for, which differ
much. Writes the images and an artifact.
"""

import argparse
import functools as ft
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from architectures import adam, DATASETS, load, real_data, run, with_targets
from network import POOL

import eqdistill as eqd
from eqdistill import nn, recipes


BACKBONES = {
    "16-32-64": ft.partial(nn.ConvNet, widths=(16, 32, 64), norm=None, size=32),
    "32-64-64": ft.partial(nn.ConvNet, widths=(32, 64, 64), norm=None, size=32),
    "16-32-64, group norm": ft.partial(
        nn.ConvNet, widths=(16, 32, 64), norm=nn.group_norm, size=32
    ),
}
UNSEEN = ft.partial(nn.ConvNet, widths=(32, 32, 32), size=32)
NUM_UNSEEN = 3
INNER = eqd.RelativeRidge()


def main(
    dataset: str,
    data_dir: Path | None,
    pretraining: str,
    pretraining_steps: int,
    num_backbones: int,
    pool_share: float,
    start: Path | None,
    images: int,
    steps: int,
    batch: int,
    learning_rate: float,
    held_out: float,
    seed: int,
    output: Path,
) -> None:
    if not 0 <= pool_share < 1:
        raise SystemExit(f"--pool-share must be in [0, 1); got {pool_share}.")
    if steps < 0:
        raise SystemExit(f"--steps must not be negative; got {steps}.")
    source, _, _ = real_data(pretraining, data_dir)
    train, test, standardisation = real_data(dataset, data_dir, held_out=held_out)
    on = "held-out" if held_out > 0 else "test"
    output.mkdir(parents=True, exist_ok=True)

    if source.shape != train.shape:
        raise SystemExit(
            f"--pretraining must have images of shape {train.shape}, as --dataset has; "
            f"got {source.shape}."
        )
    n = images * train.num_classes
    initial = None
    if start is not None:
        initial = load_start(start, train, standardisation)
        n = len(initial.images)
    real = eqd.DistilledSet.from_real(train, n, l2=1e-3, key=jr.key(seed))
    real = with_targets(real, train.num_classes)
    initial = real if initial is None else initial

    kinds = dict(list(BACKBONES.items())[:num_backbones])
    probes = {
        name: probe(kind, source, train, pretraining_steps, key=jr.key(i))
        for i, (name, kind) in enumerate(kinds.items())
    }
    problems: list[tuple] = [
        (model, eqd.Batches(train, min(batch, len(train)), model), INNER)
        for model in probes.values()
    ]
    known = itertools.cycle(range(len(problems)))
    if pool_share > 0:
        pool = eqd.Pool(*POOL.values(), num_classes=train.num_classes)
        problems.append((None, eqd.Batches(train, min(128, len(train))), pool))
    # The steps of the pool lie as evenly as can be.
    is_drawn = np.diff(np.floor(pool_share * np.arange(steps + 1))) > 0
    order = [len(problems) - 1 if drawn else next(known) for drawn in is_drawn]
    began = time.perf_counter()
    distilled = in_turn(initial, problems, order, learning_rate, key=jr.key(seed))
    jax.block_until_ready(distilled)
    seconds = time.perf_counter() - began
    print(f"outer steps     {steps}, {seconds:.0f} s with compiling")
    print(f"size            {distilled.nbytes:,} bytes with labels")
    print(f"ridge           {initial.l2:.2g} -> {distilled.l2:.2g}, of the features")

    backbones = {name: [model] for name, model in probes.items()}
    backbones["not distilled for"] = [
        probe(UNSEEN, source, train, pretraining_steps, key=jr.key(100 + i))
        for i in range(NUM_UNSEEN)
    ]
    print(f"{on} accuracy of probes: real images as many, distilled, all real images")
    for name, models in backbones.items():
        found = np.array(
            [
                [
                    float(eqd.evaluate(real, x, test, INNER).accuracy),
                    float(eqd.evaluate(distilled, x, test, INNER).accuracy),
                    accuracy_of_all(x, train, test),
                ]
                for x in models
            ]
        )
        few, ours, whole = found.mean(axis=0)
        deviation = f", ± {np.std(found[:, 1], ddof=1):.1%}" if len(found) > 1 else ""
        print(
            f"  {name:<24} {few:.2%}  {ours:.2%}  {whole:.2%}  "
            f"({ours / whole:.1%} of all{deviation})",
            flush=True,
        )
    files = [output / f"probe.{end}" for end in ("png", "safetensors")]
    eqd.plot.images(distilled).savefig(files[0])
    model = next(iter(probes.values()))
    eqd.save(
        files[1],
        distilled,
        model,
        eqd.evaluate(distilled, model, test, INNER) if on == "test" else None,
        inner=INNER,
        preprocessing=standardisation,
        dataset=Path(dataset).name,
        seed=seed,
    )
    print(f"files           {', '.join(map(str, files))}")


def load_start(
    file: Path, train: eqd.Dataset, standardisation: eqd.AbstractPreprocessing
) -> eqd.DistilledSet:
    (start,) = load(file, standardisation)
    found = start.images.shape[1:], start.labels.shape[1:], type(start.loss)
    if found != (train.shape, (train.num_classes,), eqd.SquaredError):
        shape, labels, loss = found
        raise SystemExit(
            f"--start must be a set with images of shape {train.shape} and targets of "
            f"a squared error for {train.num_classes} classes; {file} has images of "
            f"shape {shape}, labels of shape {labels}, and {loss.__name__}."
        )
    return start


def in_turn(
    start: eqd.DistilledSet,
    problems: list[tuple],
    order: list[int],
    learning_rate: float,
    *,
    key: jax.Array,
) -> eqd.DistilledSet:
    """One set for several problems, each a model, real data and an inner solver.
    The order has the number of the problem of each outer step."""
    optimiser = adam(optax.cosine_decay_schedule(learning_rate, max(1, len(order))))
    hypergradient = eqx.filter_grad(eqd.outer_loss, has_aux=True)

    @eqx.filter_jit
    def update(learned, optimiser_state, inner_state, step, problem):
        model, data, inner = problem
        gradient, outcome = hypergradient(
            learned, model, data, inner, inner_state, step=step, key=key
        )
        updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        return eqx.apply_updates(learned, updates), optimiser_state, outcome.state

    learned = start
    optimiser_state = optimiser.init(eqx.filter(start, eqx.is_inexact_array))
    states = [inner.init(start, model, key=key) for model, _, inner in problems]
    for step, i in enumerate(order):
        learned, optimiser_state, states[i] = update(
            learned, optimiser_state, states[i], jnp.asarray(step), problems[i]
        )
    return learned


def probe(
    kind: Callable, source: eqd.Dataset, train: eqd.Dataset, steps: int, *, key
) -> eqd.LinearClassifier:
    """A linear model on the features of a network that is trained on `source`."""
    make_key, fit_key = jr.split(key)
    recipe = recipes.supervised(kind, updates=steps)
    network = recipe.make(source.shape, source.num_classes, key=make_key)
    everything = eqd.DistilledSet(source.images, source.labels, l2=1.0)
    prepared = recipe.prepare(everything, source.num_classes)
    trained = eqd.fit(prepared, network, recipe.inner, key=fit_key).model
    last = eqd.last_layer(trained)
    head = eqd.LogisticRegression(last.head.weight.shape[1], train.num_classes).head
    return eqd.LinearClassifier(last.features, head)


def accuracy_of_all(
    model: eqd.LinearClassifier, train: eqd.Dataset, test: eqd.Dataset
) -> float:
    """The test accuracy of the probe of all real images: ridge regression, in double
    precision."""
    train, test = (data.map(model.features) for data in (train, test))
    features = np.asarray(train.images, np.float64)
    targets = np.eye(train.num_classes)[np.asarray(train.labels)]
    moments = features.T @ features
    ridge = 1e-6 * np.trace(moments) * np.eye(len(moments))
    weight = np.linalg.solve(moments + ridge, features.T @ targets)
    predicted = np.argmax(np.asarray(test.images) @ weight, axis=1)
    return float(np.mean(predicted == np.asarray(test.labels)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help=DATASETS)
    parser.add_argument(
        "--pretraining",
        default="fashion_mnist",
        help="the dataset that the backbones are trained on, likewise",
    )
    parser.add_argument(
        "--data-dir", type=Path, help="the folder of the files of both datasets"
    )
    parser.add_argument("--pretraining-steps", type=int, default=500)
    parser.add_argument(
        "--num-backbones", type=int, default=1, choices=range(1, 1 + len(BACKBONES))
    )
    parser.add_argument(
        "--pool-share",
        type=float,
        default=0.0,
        help="the share of the steps that are for networks of a pool",
    )
    parser.add_argument(
        "--start",
        type=Path,
        help="an artifact with the set to begin at, in the place of real images",
    )
    parser.add_argument("--images", type=int, default=1, help="real images a class")
    parser.add_argument(
        "--steps", type=int, default=6000, help="zero evaluates the set of `--start`"
    )
    parser.add_argument("--batch", type=int, default=1000, help="real images a step")
    parser.add_argument(
        "--learning-rate", type=float, default=0.03, help="of the images, at first"
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        help="a fraction of the training images to evaluate on, in place of the test "
        "images",
    )
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
