"""Evaluates somebody else's images with a named recipe: trains fresh networks only on
these images, and measures their accuracy on real test data.

The images are either a folder with one folder of image files for each class, in the
alphabetical order of the classes; or a file of `numpy.savez` with `images`, of shape
`(n, height, width)` or `(n, channels, height, width)`, and `labels`: class indices of
shape `(n,)`, or targets of shape `(n, c)`. Pixels are bytes, or numbers from 0 (black)
to 1 (white).
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from papers._common import maker, NETWORKS, RECIPES, run

import eqdistill as eqd


def main(
    path: Path,
    dataset: str,
    data_dir: Path | None,
    recipe: str,
    network: str,
    num_networks: int,
    seed: int,
    output: Path,
) -> None:
    train, test = eqd.datasets.load(dataset, data_dir)
    standardisation = eqd.datasets.Standardisation.fit(train)
    distilled = read(path, test.num_classes, standardisation)
    found = eqd.evaluate(
        distilled,
        RECIPES[recipe](maker(NETWORKS[network], test)),
        test.map(standardisation),
        num_models=num_networks,
        key=jr.key(seed),
    )
    print(f"images          {len(distilled)}, {distilled.nbytes:,} bytes with labels")
    print(f"recipe          {recipe}, {network}")
    print(f"networks        {', '.join(f'{x:.2%}' for x in found.accuracies[0])}")
    std = f" ± {found.std_models:.2%}" if num_networks > 1 else ""
    print(f"test accuracy   {found.accuracy:.2%}{std}")
    output.mkdir(parents=True, exist_ok=True)
    picture = output / "evaluate_images.png"
    eqd.plot.images(distilled).savefig(picture)
    print(f"files           {picture}")


def read(
    path: Path, num_classes: int, standardisation: eqd.datasets.Standardisation
) -> eqd.DistilledSet:
    """**Raises:**

    A `ValueError` if there is not one folder for each class, or if the file lacks
    `images` or `labels`.
    """
    if path.is_dir():
        data = eqd.datasets.from_folder(path)
        if data.num_classes != num_classes:
            raise ValueError(
                f"`path` must have a folder for each of the {num_classes} classes; "
                f"{path} has {', '.join(data.class_names or ())}."
            )
        images, labels = np.asarray(data.floating()), np.asarray(data.labels)
    else:
        # Pickles could run code.
        with np.load(path, allow_pickle=False) as file:
            if not {"images", "labels"} <= set(file):
                raise ValueError(
                    f"`path` must have `images` and `labels`; {path} has "
                    f"{', '.join(file) or 'nothing'}."
                )
            images, labels = file["images"], file["labels"]
        if np.issubdtype(images.dtype, np.integer):
            images = images / 255
    images = jax.vmap(standardisation)(jnp.asarray(images, jnp.float32))
    is_soft = labels.ndim == 2
    return eqd.DistilledSet(
        images,
        labels.astype(np.float32) if is_soft else labels,
        l2=1.0,
        loss=eqd.SquaredError() if is_soft else eqd.CrossEntropy(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a folder, or an .npz file")
    parser.add_argument(
        "--dataset",
        default="mnist",
        choices=["mnist", "fashion_mnist", "digits", "cifar10"],
    )
    parser.add_argument(
        "--data-dir", type=Path, help="the folder with the files of the dataset"
    )
    parser.add_argument("--recipe", default="dc", choices=list(RECIPES))
    parser.add_argument(
        "--network", default="ConvNet, instance norm", choices=list(NETWORKS)
    )
    parser.add_argument("--num-networks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
