"""Distils a dataset into images that train convolutional networks from scratch.

The inner problem is ridge regression on the last layer of a network that is drawn from
a pool: networks of all ages, with and without instance normalisation. Learned are the
images, their targets, the ridge and the temperature. With `--hard` the labels stay
fixed, the loss is the cross-entropy, and the images suit recipes with hard labels. With
`--pack 2` there are four small images in the room of one. The result is the exponential
average over the steps. All images are standardised, or whitened with `--zca`.

Targets are ten times as large for FRePo's recipe, whose networks have a last layer that
starts at random: with few images the function of that layer is never unlearned, and
weighs less beside larger targets. For the ridge regression of the pool only the units
change.

Prints the accuracy of fresh networks that are trained on the distilled images alone;
and writes the images, the course of the training, and an artifact that claims the
accuracy of the first kind of network.
"""

import argparse
import dataclasses
import functools as ft
import math
import time
from pathlib import Path

import equinox as eqx
import jax.random as jr
import optax
from architectures import (
    adam,
    DATASETS,
    NETWORKS,
    real_data,
    RECIPES,
    run,
    with_targets,
)
from jaxtyping import PyTree

import eqdistill as eqd
from eqdistill import nn, recipes


# Grey images of 28 x 28 are padded to 32, as in the papers.
POOL = {
    "plain": ft.partial(nn.ConvNet, widths=(16, 32, 64), norm=None, size=32),
    "norm": ft.partial(nn.ConvNet, widths=(16, 32, 64), size=32),
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
    pool: list[str],
    linearised: bool,
    steps: int,
    batch: int,
    learning_rate: float,
    held_out: float,
    recipe: str,
    networks: list[str],
    num_networks: int,
    seed: int,
    output: Path,
) -> None:
    if linearised and hard:
        raise SystemExit("--linearised is for labels that are learned, not for --hard.")
    if recipe.startswith("dc") and not hard:
        raise SystemExit(f"--recipe '{recipe}' takes hard labels: add --hard.")
    if steps < 1:
        raise SystemExit(f"--steps must be at least 1; got {steps}.")
    train, test, preprocessing = real_data(
        dataset, data_dir, held_out=held_out, zca=zca
    )
    on = "held-out" if held_out > 0 else "test"
    output.mkdir(parents=True, exist_ok=True)
    n = pack**2 * images * train.num_classes
    start = eqd.DistilledSet.from_real(train, n, l2=1e-3, key=jr.key(seed))
    inner = eqd.RelativeRidge(eqd.SpanSolver())
    if not hard:
        start = with_targets(start, train.num_classes)
        inner = eqd.LinearisedSolver() if linearised else eqd.RelativeRidge()
    if pack > 1:
        start = eqd.Packed.from_distilled(start, pack)

    optimiser = adam(optax.cosine_decay_schedule(learning_rate, steps))
    began = time.perf_counter()
    result = eqd.distill(
        start,
        None,
        eqd.Batches(train, batch),
        inner=eqd.Pool(
            *(POOL[kind] for kind in pool),
            num_classes=train.num_classes,
            inner=inner,
            augmentation=eqd.Flip() if flip else None,
        ),
        optimiser=eqd.averaged(optimiser, decay=0.99),
        learn=(True, False),
        steps=steps,
        key=jr.key(seed),
        callbacks=[eqd.ProgressBar()],
    )
    seconds = time.perf_counter() - began
    result = eqd.average_of(result)
    if not hard and recipe in LARGER_TARGETS:
        start = with_larger_targets(result.start, LARGER_TARGETS[recipe])
        result = dataclasses.replace(result, start=start, distilled=start.decode())
    distilled = result.distilled
    print(f"outer steps     {steps}, {seconds:.0f} s")
    print(f"size            {result.start.nbytes:,} bytes with labels")
    print(f"ridge           0.001 -> {distilled.l2:.2g}, of the features")
    files = [output / f"network.{end}" for end in ("png", "safetensors")]
    columns = train.num_classes if pack > 1 else None
    eqd.plot.images(distilled, columns=columns).savefig(files[0])
    eqd.plot.history(result.history).savefig(output / "network_history.png")
    for name in networks:
        by = RECIPES[recipe](NETWORKS[name])
        found = recipes.evaluate(
            distilled, by, test, num_networks=num_networks, key=jr.key(seed)
        )
        deviation = f" ± {found.deviation_of_networks:.1%}" if num_networks > 1 else ""
        print(f"{on} accuracy {found.mean:.1%}{deviation}, {name}", flush=True)
        if name == networks[0]:
            eqd.save(
                files[1],
                result,
                by,
                found if on == "test" else None,
                preprocessing=preprocessing,
                dataset=Path(dataset).name,
                seed=seed,
            )
    print(f"files           {', '.join(map(str, files))}")


def with_larger_targets(start: PyTree, times: float) -> PyTree:
    """What is learned, in other units of the targets. The logits of a ridge regression
    stay as they are."""
    return eqx.tree_at(
        lambda s: (s.labels, s.loss.log_temperature),
        start,
        (times * start.labels, start.loss.log_temperature + math.log(times)),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help=DATASETS)
    parser.add_argument(
        "--data-dir", type=Path, help="the folder of the files of the dataset"
    )
    parser.add_argument("--zca", action="store_true", help="whiten the images")
    parser.add_argument(
        "--flip",
        action="store_true",
        help="flip the distilled images at random in the training of the pool",
    )
    parser.add_argument("--images", type=int, default=1, help="images a class")
    parser.add_argument(
        "--pack", type=int, default=1, help="the factor by which images are enlarged"
    )
    parser.add_argument("--hard", action="store_true", help="labels are not learned")
    parser.add_argument(
        "--pool", nargs="+", default=list(POOL), choices=list(POOL), help="its networks"
    )
    parser.add_argument(
        "--linearised",
        action="store_true",
        help="linearise the networks in all parameters, in the place of a last layer",
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128, help="real images a step")
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
        help="to train on the distilled images",
    )
    parser.add_argument("--num-networks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
