"""Distils a dataset into images that train convolutional networks from scratch.

In each step, the last layer of a network from a pool is fitted to the distilled images.
Images, labels and the ridge are learned. Prints the accuracy of larger fresh networks,
and writes the images and a file that `python -m eqdistill check` checks. For more
options, see `papers/networks.py`.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.random as jr
import optax

import eqdistill as eqd


def main(dataset: str, images_per_class: int, steps: int, output: Path) -> None:
    folder = Path(dataset)
    if folder.is_dir():
        train = eqd.datasets.from_folder(folder / "train")
        test = eqd.datasets.from_folder(folder / "test", class_names=train.class_names)
    else:
        train, test = eqd.datasets.load(dataset)
    standardisation = eqd.datasets.Standardisation.fit(train)
    train, test = train.map(standardisation), test.map(standardisation)

    c = train.num_classes
    start = eqd.DistilledSet.from_real(
        train, images_per_class * c, l2=1e-3, key=jr.key(0)
    )
    network = partial(eqd.nn.ConvNet, train.shape, c)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.03, steps))
    result = eqd.distill(
        start.with_targets(c),
        eqd.Pool(partial(network, widths=(16, 32, 64))),
        eqd.Batches(train, 128),
        optimiser=eqd.averaged(optimiser, decay=0.99),
        learn=lambda start: start,
        steps=steps,
        key=jr.key(0),
        callbacks=[eqd.ProgressBar()],
    ).average()

    recipe = eqd.recipes.feature_regression(network)
    evaluation = eqd.evaluate(result.distilled, recipe, test, progress=True)
    print(f"size            {result.distilled.nbytes:,} bytes with labels")
    print(f"test accuracy   {evaluation}")
    output.mkdir(parents=True, exist_ok=True)
    images, file = output / "network.png", output / "network.safetensors"
    eqd.plot.images(result.distilled).savefig(images)
    name = None if folder.is_dir() else dataset
    eqd.save(file, result, evaluation, preprocessing=standardisation, dataset=name)
    print(f"files           {images}, {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        default="mnist",
        help="a name that eqdistill.datasets.load accepts, or a folder with subfolders "
        "train and test, each with one folder per class",
    )
    parser.add_argument("--images-per-class", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="the folder to write to"
    )
    args = parser.parse_args()
    # The next run loads what this one compiles.
    jax.config.update("jax_compilation_cache_dir", str(args.output / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(**vars(args))
