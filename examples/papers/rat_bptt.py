"""Reproduces random truncated back-propagation through time (RaT-BPTT) by Feng,
Vedantam and Kempe, Embarrassingly simple dataset distillation, 2024, on MNIST, or on
CIFAR-10 from a folder of images.

In each outer step a network with new weights is trained on the distilled images with
Adam. The run ends at random between step 60 and step 200, and its last 60 steps are
differentiated. The gradient is clipped at twice the running mean of its norm.

Scaled to two cores: blocks of 16, 32 and 64 channels instead of three blocks of 128,
real batches of 256 instead of 5,000, and far fewer outer steps.

Prints the test accuracy of fresh networks after 200 steps of the same training, and
with an evaluation recipe; plots the images and the history.
"""

import argparse
import functools as ft
import time
from pathlib import Path

import jax.random as jr
import optax
from _common import DATASETS, maker, NETWORKS, real_data, RECIPES, run

import eqdistill as eqd
from eqdistill import adjoints, nn


network = ft.partial(nn.ConvNet, widths=(16, 32, 64), size=32)
# `eps_root` gives Adam a derivative where a gradient is zero.
adam = ft.partial(optax.adam, eps_root=1e-8)
WINDOWS = {
    "random": adjoints.RandomWindow,
    "last": adjoints.LastSteps,
    "gradient": adjoints.GradientWindow,
}


def main(
    dataset: str,
    zca: bool,
    images: int,
    gradient_steps: int,
    size: int,
    window: str,
    steps: int,
    batch: int,
    learning_rate: float,
    recipe: str,
    networks: list[str],
    num_networks: int,
    seed: int,
    output: Path,
) -> None:
    train, test, preprocessing = real_data(dataset, None, zca=zca)
    output.mkdir(parents=True, exist_ok=True)
    n = images * train.num_classes
    start = eqd.DistilledSet.from_real(train, n, l2=1e-8, key=jr.key(seed))
    rate = {"learning_rate": 1e-3}
    training = eqd.UnrolledSolver(
        adam, rate, gradient_steps, window=WINDOWS[window](size)
    )
    models = eqd.Fresh(maker(network, train))
    began = time.perf_counter()
    result = eqd.distill(
        start,
        eqd.Bilevel(models, training),
        eqd.Batches(train, batch),
        optimiser=optax.chain(
            adjoints.clip_by_running_norm(), optax.adam(learning_rate)
        ),
        steps=steps,
        callbacks=[eqd.ProgressBar()],
        key=jr.key(seed),
    )
    print(f"outer steps     {steps}, {time.perf_counter() - began:.0f} s")
    whole = eqd.UnrolledSolver(adam, rate, gradient_steps)
    for name, distilled in (("random real", start), ("distilled", result.distilled)):
        found = eqd.evaluate(
            distilled,
            models,
            test,
            inner=whole,
            num_models=num_networks,
            key=jr.key(seed + 1),
        )
        print(
            f"{name:15s} {to_text(found)}, after {gradient_steps} steps of the same "
            "training",
            flush=True,
        )
    stem = f"rat_bptt_{Path(dataset).name}_{images}"
    eqd.plot.images(result.distilled).savefig(output / f"{stem}.png")
    eqd.plot.history(result.history).savefig(output / f"{stem}_history.png")
    for name in networks:
        found = eqd.evaluate(
            result.distilled,
            RECIPES[recipe](maker(NETWORKS[name], train)),
            test,
            num_models=num_networks,
            key=jr.key(seed),
        )
        print(f"distilled       {to_text(found)}, {name}, recipe {recipe}", flush=True)
        if name == networks[0]:
            eqd.save(
                output / f"{stem}.safetensors",
                result,
                found,
                preprocessing=preprocessing,
                dataset=Path(dataset).name,
                seed=seed,
            )
    print(f"files           {output / stem}.png, {output / stem}.safetensors")


def to_text(found) -> str:
    return f"{100 * found.accuracy:.1f} +- {100 * found.std_models:.1f}%"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help=DATASETS)
    parser.add_argument("--zca", action="store_true", help="whiten the images")
    parser.add_argument("--images", type=int, default=1, help="images per class")
    parser.add_argument(
        "--gradient-steps", type=int, default=200, help="number of training steps"
    )
    parser.add_argument(
        "--size", type=int, default=60, help="number of differentiated steps"
    )
    parser.add_argument("--window", default="random", choices=list(WINDOWS))
    parser.add_argument("--steps", type=int, default=1500, help="outer steps")
    parser.add_argument("--batch", type=int, default=256, help="real images per step")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--recipe", default="dc", choices=list(RECIPES))
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=list(NETWORKS),
        default=["ConvNet, instance norm"],
        help="networks to train on the distilled images with the recipe",
    )
    parser.add_argument("--num-networks", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
