"""Distils a dataset into images that train convolutional networks from scratch.

The model of a step is the last layer of a network from a pool: networks of all ages,
with and without instance normalisation. The images, their targets, the ridge and the
temperature are learned. With `--hard` the labels stay fixed, the loss is the
cross-entropy, and the images suit recipes with hard labels. `--pack 2` stores four
small images in the space of one. The result is the moving average over the steps,
rounded to float16, which halves the size of the file. All images are standardised, or
whitened with `--zca`.

For FRePo's recipe the targets are ten times larger. Its networks start with a random
last layer, whose effect a few images cannot undo, but which matters less next to larger
targets. For the pool's ridge regression, this changes only the units.

Prints the accuracy of fresh networks that are trained only on the distilled images; and
writes the images, the history of the run, and an artifact that claims the accuracy of
the first network.
"""

import argparse
import dataclasses
import functools as ft
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _common import adam, DATASETS, maker, NETWORKS, real_data, RECIPES, run

import eqdistill as eqd
from eqdistill import nn


# Greyscale images of 28 x 28 are padded to 32, as in the papers. All are narrow enough
# to be trained on two cores.
POOL = {
    "plain": ft.partial(nn.ConvNet, widths=(16, 32, 64), norm=None, size=32),
    "norm": ft.partial(nn.ConvNet, widths=(16, 32, 64), size=32),
    "wide": ft.partial(nn.ConvNet, widths=(64, 128, 256), norm=None, size=32),
    "lenet": nn.LeNet,
    "mlp": nn.MLP,
    "alexnet": ft.partial(nn.AlexNet, width_multiplier=0.125),
    "vgg": ft.partial(nn.VGG11, width_multiplier=0.25),
    "resnet": ft.partial(nn.ResNet18, width_multiplier=0.125),
}
STARTS = {
    "real": eqd.DistilledSet.from_real,
    "means": eqd.DistilledSet.from_class_means,
    "kmeans": eqd.DistilledSet.from_kmeans,
}
LARGER_TARGETS = {"frepo": 10.0, "frepo, augmented": 10.0}


def main(
    dataset: str,
    data_dir: Path | None,
    zca: bool,
    flip: bool,
    images: int,
    pack: int,
    hard: bool,
    start_from: str,
    pool: list[str],
    weights: list[float] | None,
    max_age: int,
    linearised: bool,
    steps: int,
    batch: int,
    share: int,
    learning_rate: float,
    held_out: float,
    recipe: str,
    networks: list[str],
    num_networks: int,
    seed: int,
    output: Path,
) -> None:
    if linearised and hard:
        raise SystemExit("--linearised is for learned labels, not for --hard.")
    if recipe.startswith("dc") and not hard:
        raise SystemExit(f"--recipe '{recipe}' takes hard labels: add --hard.")
    train, test, preprocessing = real_data(
        dataset, data_dir, held_out=held_out, zca=zca
    )
    on = "held-out" if held_out > 0 else "test"
    output.mkdir(parents=True, exist_ok=True)
    n = pack**2 * images * train.num_classes
    start = STARTS[start_from](train, n, l2=1e-3, key=jr.key(seed))
    if not hard:
        start = start.with_targets(train.num_classes)
    if pack > 1:
        start = eqd.Packed.from_distilled(start, pack)
    makes = [maker(POOL[name], train) for name in pool]
    augmentation = eqd.augment.Flip() if flip else None
    inner = eqd.linear.LinearisedSolver() if linearised else eqd.AutoSolver()
    # Targets differ by one between classes, and logits by about five.
    loss = eqd.CrossEntropy() if hard else eqd.CrossEntropy(0.2)

    models = eqd.Pool(
        *makes, weights=weights, max_age=max_age, augmentation=augmentation
    )
    objective = eqd.Bilevel(models, inner, loss)
    temperature = lambda o: o.loss.log_temperature
    if share > 1:
        objective = eqd.Rounds(objective, steps=share, examples=batch)
        temperature = lambda o: o.objective.loss.log_temperature

    optimiser = adam(optax.cosine_decay_schedule(learning_rate, steps))
    began = time.perf_counter()
    result = eqd.distill(
        start,
        objective,
        eqd.Batches(train, batch),
        optimiser=eqd.averaged(optimiser, decay=0.99),
        learn=lambda start: start,
        learn_objective=(lambda o: ()) if hard else temperature,
        steps=steps,
        key=jr.key(seed),
        callbacks=[eqd.ProgressBar()],
    ).average()
    seconds = time.perf_counter() - began
    start = result.start
    if recipe in LARGER_TARGETS:
        times = LARGER_TARGETS[recipe]
        start = eqx.tree_at(lambda s: s.labels, start, replace_fn=lambda x: times * x)
    is_large = lambda x: eqx.is_inexact_array(x) and x.ndim > 1
    halve = lambda x: x.astype(jnp.float16).astype(x.dtype) if is_large(x) else x
    start = jax.tree.map(halve, start)
    distilled = start.decode()
    result = dataclasses.replace(result, start=start, distilled=distilled)
    print(f"outer steps     {steps}, {seconds:.0f} s")
    assert isinstance(result.start, eqd.DistilledSet | eqd.Packed)
    print(f"size            {result.start.nbytes:,} bytes with labels")
    print(f"ridge           0.001 -> {distilled.l2:.2g}, relative to the features")
    files = [output / f"network.{end}" for end in ("png", "safetensors")]
    columns = train.num_classes if pack > 1 else None
    eqd.plot.images(distilled, columns=columns).savefig(files[0])
    eqd.plot.history(result.history).savefig(output / "network_history.png")
    for i, name in enumerate(networks):
        by = RECIPES[recipe](maker(NETWORKS[name], train))
        found = eqd.evaluate(
            distilled,
            by,
            test,
            num_models=num_networks,
            key=jr.key(seed),
            progress=True,
        )
        print(f"{on} accuracy {found}, {name}", flush=True)
        if i == 0:
            eqd.save(
                files[1],
                result,
                found if on == "test" else None,
                preprocessing=preprocessing,
                dataset=Path(dataset).name,
                seed=seed,
            )
    print(f"files           {', '.join(map(str, files))}")


def add_pool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pool",
        nargs="+",
        default=["plain", "norm"],
        choices=list(POOL),
        help="the networks of the pool",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help=DATASETS)
    parser.add_argument(
        "--data-dir", type=Path, help="the folder with the files of the dataset"
    )
    parser.add_argument("--zca", action="store_true", help="whiten the images")
    parser.add_argument(
        "--flip",
        action="store_true",
        help="flip the distilled images at random when networks are trained",
    )
    parser.add_argument("--images", type=int, default=1, help="images per class")
    parser.add_argument(
        "--pack", type=int, default=1, help="the factor by which images are enlarged"
    )
    parser.add_argument("--hard", action="store_true", help="keep the labels fixed")
    parser.add_argument(
        "--start-from", default="real", choices=list(STARTS), help="the initial images"
    )
    add_pool(parser)
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        help="how often each of them is drawn, relative to the others",
    )
    parser.add_argument(
        "--max-age",
        type=int,
        default=100,
        help="the number of training steps after which a network starts again",
    )
    parser.add_argument(
        "--linearised",
        action="store_true",
        help="linearise networks in all parameters, instead of fitting the last layer",
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128, help="real images per step")
    parser.add_argument(
        "--share",
        type=int,
        default=1,
        help="the number of steps that share a network and its features of a batch",
    )
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
    parser.add_argument(
        "--recipe",
        default="feature_regression",
        choices=[name for name in RECIPES if name != "supervised"],
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=list(NETWORKS),
        default=["ConvNet, instance norm", "ConvNet"],
        help="networks to train on the distilled images",
    )
    parser.add_argument("--num-networks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
