"""Evaluates somebody else's images by a named recipe: trains fresh networks on the
images alone, and measures their accuracy on real test data.

The images are either a folder with one folder of pictures for each class, in the
alphabetical order of the classes; or a file of `numpy.savez` with `images`, of shape
`(n, height, width)` or `(n, channels, height, width)`, and `labels`: class indices of
shape `(n,)`, or targets of shape `(n, c)`. Pixels are bytes, or numbers of which 0 is
black and 1 is white.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from architectures import NETWORKS, RECIPES, run

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
    standardisation = eqd.Standardisation.fit(train)
    distilled = read(path, test.num_classes, standardisation)
    found = eqd.recipes.evaluate(
        distilled,
        RECIPES[recipe](NETWORKS[network]),
        test.map(standardisation),
        num_networks=num_networks,
        key=jr.key(seed),
    )
    print(f"images          {len(distilled)}, {distilled.nbytes:,} bytes with labels")
    print(f"recipe          {recipe}, {network}")
    print(f"networks        {', '.join(f'{x:.2%}' for x in found.accuracies[0])}")
    print(
        f"test accuracy   {found.mean:.2%}"
        + (f" ± {found.deviation_of_networks:.2%}" if num_networks > 1 else "")
    )
    output.mkdir(parents=True, exist_ok=True)
    picture = output / "evaluate_images.png"
    eqd.plot.images(distilled).savefig(picture)
    print(f"files           {picture}")


def read(
    path: Path, num_classes: int, standardisation: eqd.Standardisation
) -> eqd.DistilledSet:
    """**Raises:**

    A `ValueError` if there is not one folder for each class, or if the file has no
    `images` and `labels`.
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
        # Without pickles, which could run code.
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
    parser.add_argument("path", type=Path, help="a folder, or a file .npz")
    parser.add_argument(
        "--dataset",
        default="mnist",
        choices=["mnist", "fashion_mnist", "digits", "cifar10"],
    )
    parser.add_argument(
        "--data-dir", type=Path, help="the folder of the files of the dataset"
    )
    parser.add_argument("--recipe", default="dc", choices=list(RECIPES))
    parser.add_argument(
        "--network", default="ConvNet, instance norm", choices=list(NETWORKS)
    )
    parser.add_argument("--num-networks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
