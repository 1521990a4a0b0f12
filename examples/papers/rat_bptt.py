"""Random truncated back-propagation through time (RaT-BPTT) of Feng, Vedantam and
Kempe, Embarrassingly simple dataset distillation, 2024, on MNIST or on CIFAR-10 from a
folder of pictures.

A network that is drawn anew in each outer step is trained on the distilled images by
Adam, and the last 60 steps of a run that ends at random between step 60 and step 200
are differentiated. The gradient is clipped at twice the running mean of its norm.

Scaled to two cores: blocks of 16, 32 and 64 channels in the place of three of 128, real
batches of 256 in the place of 5,000, and far fewer outer steps.

Prints the test accuracy of fresh networks after 200 steps of the same training, and by
a recipe of the evaluation; draws the images and the history.
"""

import argparse
import functools as ft
import time
from pathlib import Path

import jax
import jax.random as jr
import optax
from architectures import DATASETS, NETWORKS, real_data, RECIPES, run

import eqdistill as eqd
from eqdistill import nn, recipes


network = ft.partial(nn.ConvNet, widths=(16, 32, 64), size=32)
# With a derivative where a gradient is zero.
adam = ft.partial(optax.adam, eps_root=1e-8)
WINDOWS = {
    "random": eqd.RandomWindow,
    "last": eqd.LastSteps,
    "gradient": eqd.GradientWindow,
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
    num_classes = train.num_classes
    start = eqd.DistilledSet.from_real(
        train, images * num_classes, l2=1e-8, key=jr.key(seed)
    )
    rate = {"learning_rate": 1e-3}
    training = eqd.UnrolledSolver(
        adam, rate, gradient_steps, window=WINDOWS[window](size)
    )
    began = time.perf_counter()
    result = eqd.distill(
        start,
        None,
        eqd.Batches(train, batch),
        inner=eqd.RandomInitialisation(network, training, num_classes=num_classes),
        optimiser=optax.chain(eqd.clip_by_running_norm(), optax.adam(learning_rate)),
        steps=steps,
        callbacks=[eqd.ProgressBar()],
        key=jr.key(seed),
    )
    print(f"outer steps     {steps}, {time.perf_counter() - began:.0f} s")
    whole = eqd.UnrolledSolver(adam, rate, gradient_steps)
    for i, distilled in enumerate((start, result.distilled)):
        accuracies = jax.numpy.array(
            [
                eqd.evaluate(
                    distilled, network(train.shape, num_classes, key=key), test, whole
                ).accuracy
                for key in jr.split(jr.key(seed + 1), num_networks)
            ]
        )
        print(
            f"{'random real' if i == 0 else 'distilled':15s} "
            f"{100 * accuracies.mean():.1f} +- {100 * accuracies.std(ddof=1):.1f}%, "
            f"after {gradient_steps} steps of the same training",
            flush=True,
        )
    stem = f"rat_bptt_{Path(dataset).name}_{images}"
    eqd.plot.images(result.distilled).savefig(output / f"{stem}.png")
    eqd.plot.history(result.history).savefig(output / f"{stem}_history.png")
    for name in networks:
        by = RECIPES[recipe](NETWORKS[name])
        found = recipes.evaluate(
            result.distilled, by, test, num_networks=num_networks, key=jr.key(seed)
        )
        print(
            f"distilled       {100 * found.mean:.1f} +- "
            f"{100 * found.deviation_of_networks:.1f}%, {name}, by the recipe {recipe}",
            flush=True,
        )
        if name == networks[0]:
            eqd.save(
                output / f"{stem}.safetensors",
                result,
                by,
                found,
                preprocessing=preprocessing,
                dataset=Path(dataset).name,
                seed=seed,
            )
    print(f"files           {output / stem}.png, {output / stem}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help=DATASETS)
    parser.add_argument("--zca", action="store_true", help="whiten the images")
    parser.add_argument("--images", type=int, default=1, help="images a class")
    parser.add_argument(
        "--gradient-steps", type=int, default=200, help="steps of the training run"
    )
    parser.add_argument("--size", type=int, default=60, help="steps of the window")
    parser.add_argument("--window", default="random", choices=list(WINDOWS))
    parser.add_argument("--steps", type=int, default=1500, help="outer steps")
    parser.add_argument("--batch", type=int, default=256, help="real images a step")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--recipe", default="dc", choices=list(RECIPES))
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=list(NETWORKS),
        default=["ConvNet, instance norm"],
        help="to train on the distilled images by the recipe",
    )
    parser.add_argument("--num-networks", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
