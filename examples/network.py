"""Distils a dataset into images that train convolutional networks from scratch.

The inner problem is ridge regression on the last layer of a network that is drawn from
a pool: networks of all ages, of two kinds, with and without instance normalisation.
Learned are the images, their targets, the ridge and the temperature. The result is the
exponential average of these over the steps. All images are standardised.

Prints the accuracy of fresh networks of three kinds that are trained on the distilled
images alone; and writes the images, the course of the training, and an artifact that
claims the accuracy of the first kind.
"""

import argparse
import functools as ft
import time
from pathlib import Path

import jax
import jax.random as jr
import optax

import eqdistill as eqd
from eqdistill import nn, recipes


# Grey images of 28 x 28 are padded to 32, as in the papers.
POOL = (
    ft.partial(nn.ConvNet, widths=(16, 32, 64), norm=None, size=32),
    ft.partial(nn.ConvNet, widths=(16, 32, 64), size=32),
)
NETWORKS = {
    "ConvNet, instance norm": ft.partial(nn.ConvNet, size=32),
    "ConvNet": ft.partial(nn.ConvNet, size=32, widths=(32, 64, 128), norm=None),
    "LeNet": nn.LeNet,
}


def main(
    dataset: str,
    data_dir: Path | None,
    images: int,
    steps: int,
    batch: int,
    learning_rate: float,
    held_out: float,
    networks: list[str],
    num_networks: int,
    seed: int,
    output: Path,
) -> None:
    train, test = eqd.datasets.load(dataset, data_dir)
    standardisation = eqd.Standardisation.fit(train)
    train, test = train.map(standardisation), test.map(standardisation)
    on = "test"
    if held_out > 0:  # For choices: not by the test set.
        train, test = train.split(held_out, key=jr.key(0))
        on = "held-out"
    output.mkdir(parents=True, exist_ok=True)
    n = images * train.num_classes
    real = eqd.DistilledSet.from_real(train, n, l2=1e-3, key=jr.key(seed))
    targets = jax.nn.one_hot(real.labels, train.num_classes) - 1 / train.num_classes
    start = eqd.DistilledSet(real.images, targets, l2=1e-3, loss=eqd.SquaredError())

    def rates(learned):
        """The images move ten times as fast as all else."""
        name = lambda path: jax.tree_util.keystr(path[-1:], simple=True)
        return jax.tree.map_with_path(
            lambda path, _: "images" if name(path) == "images" else "all else", learned
        )

    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimiser = optax.partition(
        {
            "images": optax.adam(schedule),
            "all else": optax.adam(lambda step: schedule(step) / 10),
        },
        rates,
    )
    began = time.perf_counter()
    result = eqd.distill(
        start,
        None,
        eqd.Batches(train, batch),
        inner=eqd.Pool(*POOL, num_classes=train.num_classes),
        optimiser=eqd.averaged(optimiser, decay=0.99),
        learn=(True, False),
        steps=steps,
        key=jr.key(seed),
        callbacks=[eqd.ProgressBar()],
    )
    seconds = time.perf_counter() - began
    distilled = eqd.average_of(result).distilled
    print(f"outer steps     {steps}, {seconds:.0f} s")
    print(f"size            {distilled.nbytes:,} bytes with labels")
    print(f"ridge           {start.l2:.2g} -> {distilled.l2:.2g}, of the features")
    files = [output / f"network.{end}" for end in ("png", "safetensors")]
    eqd.plot.images(distilled).savefig(files[0])
    eqd.plot.history(result.history).savefig(output / "network_history.png")
    for name in networks:
        recipe = recipes.zero_start(NETWORKS[name])
        found = recipes.evaluate(
            distilled, recipe, test, num_networks=num_networks, key=jr.key(seed)
        )
        deviation = f" ± {found.deviation_of_networks:.1%}" if num_networks > 1 else ""
        print(f"{on} accuracy {found.mean:.1%}{deviation}, {name}", flush=True)
        if name == networks[0] and on == "test":
            eqd.save(
                files[1],
                distilled,
                recipe,
                found,
                preprocessing=standardisation,
                dataset=dataset,
                seed=seed,
            )
    print(f"files           {', '.join(map(str, files))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        default="mnist",
        choices=["mnist", "fashion_mnist", "digits", "cifar10"],
    )
    parser.add_argument(
        "--data-dir", type=Path, help="where to look for the dataset first"
    )
    parser.add_argument("--images", type=int, default=1, help="images a class")
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
        "--networks",
        nargs="+",
        choices=list(NETWORKS),
        default=list(NETWORKS),
        help="to train on the distilled images",
    )
    parser.add_argument("--num-networks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="a folder for the results"
    )
    args = parser.parse_args()
    # The next run loads what this one compiles.
    jax.config.update("jax_compilation_cache_dir", str(args.output / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(**vars(args))
