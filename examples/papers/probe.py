"""Distils a dataset into images for linear probes on frozen networks.

The backbones are convolutional networks, which are trained here on another dataset:
they stand in for your own pre-trained networks. Their features of the real images are
computed once. The inner problem is ridge regression on the features of the distilled
images; targets, ridge and temperature are learned too. With several backbones, one set
works for all of them: the outer steps take them in turn. With `--pool-every 5`, one
step in five is for networks of a pool, which are trained on the distilled images, so
that the set also works for unseen backbones. Such a run is best started from a set that
was distilled for the pool alone, by `networks.py`.

Prints the test accuracy of probes fitted to random real images, to the distilled images
and to all real images: on the backbones that the images were distilled for, and the
mean over three unseen backbones of another architecture. Writes the images and an
artifact.
"""

import argparse
import functools as ft
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import optax
from _common import adam, DATASETS, maker, real_data, run
from networks import add_pool, POOL

import eqdistill as eqd
from eqdistill import nn, recipes


BACKBONES = {
    "16-32-64": ft.partial(nn.ConvNet, widths=(16, 32, 64), norm=None, size=32),
    "32-64-64": ft.partial(nn.ConvNet, widths=(32, 64, 64), norm=None, size=32),
    "16-32-64, group norm": ft.partial(
        nn.ConvNet, widths=(16, 32, 64), norm=nn.group_norm, size=32
    ),
}
EXTRA = ft.partial(nn.ConvNet, widths=(16, 32, 64), size=32)
UNSEEN = ft.partial(nn.ConvNet, widths=(32, 32, 32), size=32)
NUM_UNSEEN = 3


def main(
    dataset: str,
    data_dir: Path | None,
    pretraining: str,
    pretraining_steps: int,
    num_backbones: int,
    num_extra: int,
    pool_every: int,
    pool: list[str],
    start: Path | None,
    images: int,
    steps: int,
    batch: int,
    learning_rate: float,
    held_out: float,
    seed: int,
    output: Path,
) -> None:
    source, _, _ = real_data(pretraining, data_dir)
    train, test, standardisation = real_data(dataset, data_dir, held_out=held_out)
    on = "held-out" if held_out > 0 else "test"
    output.mkdir(parents=True, exist_ok=True)
    if source.shape != train.shape:
        raise SystemExit(
            f"--pretraining must have images of shape {train.shape}, like --dataset; "
            f"got {source.shape}."
        )
    n = images * train.num_classes
    initial = None if start is None else eqd.load(start).distilled
    if initial is not None:
        n = len(initial)
    real = eqd.DistilledSet.from_real(train, n, l2=1e-3, key=jr.key(seed))
    real = real.with_targets(train.num_classes)
    initial = real if initial is None else initial

    networks = dict(list(BACKBONES.items())[:num_backbones])
    probes = {
        name: probe(name, network, source, train, pretraining_steps, key=jr.key(i))
        for i, (name, network) in enumerate(networks.items())
    }
    extra = [
        probe(str(i), EXTRA, source, train, pretraining_steps, key=jr.key(50 + i))
        for i in range(num_extra)
    ]
    loss = eqd.CrossEntropy(0.2)
    models = [*probes.values(), *extra]
    objectives = [eqd.Bilevel(model, loss=loss) for model in models]
    order = list(range(len(models)))
    if pool_every > 0:
        makes = (maker(POOL[name], train) for name in pool)
        objectives.append(eqd.Bilevel(eqd.Pool(*makes), loss=loss))
        known = itertools.cycle(range(len(models)))
        order = [
            len(models) if i % pool_every == pool_every - 1 else next(known)
            for i in range(len(models) * pool_every)
        ]
    cached = [model.features.module for model in models]
    distilled, began = initial, time.perf_counter()
    if steps > 0:
        optimiser = adam(optax.cosine_decay_schedule(learning_rate, steps))
        result = eqd.distill(
            initial,
            eqd.InTurn(*objectives, order=order),
            eqd.Batches(train, min(batch, len(train)), cached=cached),
            optimiser=optimiser,
            learn=lambda start: start,
            learn_objective=lambda o: [x.loss.log_temperature for x in o.objectives],
            steps=steps,
            key=jr.key(seed),
            callbacks=[eqd.ProgressBar()],
        )
        distilled = result.distilled
    seconds = time.perf_counter() - began
    print(f"outer steps     {steps}, {seconds:.0f} s including compilation")
    print(f"size            {distilled.nbytes:,} bytes with labels")
    print(
        f"ridge           {initial.l2:.2g} -> {distilled.l2:.2g}, relative to the "
        "features"
    )

    backbones = {name: [model] for name, model in probes.items()}
    if extra:
        backbones["16-32-64, instance norm"] = extra
    backbones["not distilled for"] = [
        probe("unseen", UNSEEN, source, train, pretraining_steps, key=jr.key(100 + i))
        for i in range(NUM_UNSEEN)
    ]
    print(f"{on} accuracy of probes: random real images, distilled, all real images")
    for name, models in backbones.items():
        found = np.array(
            [
                [
                    eqd.evaluate(real, model, test).accuracy,
                    eqd.evaluate(distilled, model, test).accuracy,
                    accuracy_of_all(model, train, test),
                ]
                for model in models
            ]
        )
        few, ours, whole = found.mean(axis=0)
        std = f", ± {np.std(found[:, 1], ddof=1):.1%}" if len(found) > 1 else ""
        print(
            f"  {name:<24} {few:.2%}  {ours:.2%}  {whole:.2%}  "
            f"({ours / whole:.1%} of all{std})",
            flush=True,
        )
    files = [output / f"probe.{end}" for end in ("png", "safetensors")]
    eqd.plot.images(distilled).savefig(files[0])
    evaluation = eqd.evaluate(distilled, next(iter(probes.values())), test)
    eqd.save(
        files[1],
        distilled,
        evaluation if on == "test" else None,
        preprocessing=standardisation,
        dataset=Path(dataset).name,
        seed=seed,
    )
    print(f"files           {', '.join(map(str, files))}")


def probe(
    name: str,
    network: Callable,
    source: eqd.Dataset,
    train: eqd.Dataset,
    steps: int,
    *,
    directory: Path | None = None,
    key: jax.Array,
) -> eqd.linear.LinearClassifier:
    """A linear head on the features of a network that is trained on `source`."""
    recipe = recipes.supervised(maker(network, source), updates=steps)
    everything = eqd.DistilledSet(source.images, source.labels, l2=1.0)
    few = eqd.Dataset(source.images[:100], source.labels[:100], source.num_classes)
    trained = eqd.evaluate(everything, recipe, few, num_models=1, key=key)
    last = eqd.linear.last_layer(trained.fitted.model)
    features = eqd.Cached(last.features.module, name, directory)
    width = last.head.weight.shape[1]
    head = eqd.linear.LogisticRegression(width, train.num_classes).head
    return eqd.linear.LinearClassifier(features, head)


def accuracy_of_all(
    model: eqd.linear.LinearClassifier, train: eqd.Dataset, test: eqd.Dataset
) -> float:
    """The test accuracy of a probe fitted to all real images, by ridge regression in
    double precision."""
    part = model.features.module
    train, test = (
        data.map(part.features, directory=part.directory) for data in (train, test)
    )
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
        help="the dataset that the backbones are trained on",
    )
    parser.add_argument(
        "--data-dir", type=Path, help="the folder with the files of both datasets"
    )
    parser.add_argument("--pretraining-steps", type=int, default=500)
    parser.add_argument(
        "--num-backbones", type=int, default=1, choices=range(1, 1 + len(BACKBONES))
    )
    parser.add_argument(
        "--num-extra",
        type=int,
        default=0,
        help="further backbones, with instance norm, which take turns with the first",
    )
    parser.add_argument(
        "--pool-every",
        type=int,
        default=0,
        help="one step in this many is for networks of a pool; 0 for none",
    )
    add_pool(parser)
    parser.add_argument(
        "--start",
        type=Path,
        help="an artifact with the set to start from, instead of real images",
    )
    parser.add_argument("--images", type=int, default=1, help="real images per class")
    parser.add_argument(
        "--steps", type=int, default=6000, help="0 only evaluates the set of `--start`"
    )
    parser.add_argument("--batch", type=int, default=1000, help="real images per step")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=0.03,
        help="the initial learning rate of the images",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        help="a fraction of the training images to evaluate on, instead of the test "
        "images",
    )
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
