"""What several examples share: networks of the papers, data and the command line."""

import argparse
import functools as ft
from collections.abc import Callable
from pathlib import Path

import jax
import optax

import eqdistill as eqd
from eqdistill import nn, recipes


# Grey images of 28 x 28 are padded to 32, as in the papers.
NETWORKS = {
    "ConvNet, instance norm": ft.partial(nn.ConvNet, size=32),
    "ConvNet, instance norm, not padded": nn.ConvNet,
    "ConvNet": ft.partial(nn.ConvNet, size=32, widths=(32, 64, 128), norm=None),
    "FRePo's ConvNet": ft.partial(
        nn.ConvNet, size=32, widths=(128, 256, 512), norm=None
    ),
    "LeNet": nn.LeNet,
    "MLP": nn.MLP,
    "AlexNet": nn.AlexNet,
    "VGG-11": nn.VGG11,
    "ResNet-18": nn.ResNet18,
}
POOL = {
    "plain": ft.partial(nn.ConvNet, widths=(16, 32, 64), norm=None, size=32),
    "norm": ft.partial(nn.ConvNet, widths=(16, 32, 64), size=32),
}
RECIPES = {
    "dc": recipes.dc,
    "dc, augmented": ft.partial(recipes.dc, updates=1000, augment=True),
    "frepo": recipes.frepo,
    "frepo, augmented": ft.partial(recipes.frepo, augment=True),
    "zero_start": recipes.zero_start,
    "feature_regression": recipes.feature_regression,
    "supervised": recipes.supervised,
}
DATASETS = (
    "mnist, fashion_mnist, digits, cifar10, or a folder that holds the folders train "
    "and test, with a folder for each class"
)


def maker(network: Callable, data: eqd.Dataset) -> Callable:
    """A constructor of networks for a dataset, which only needs a `key`."""
    return ft.partial(network, data.shape, data.num_classes)


def real_data(
    dataset: str, data_dir: Path | None, *, held_out: float = 0.0, zca: bool = False
) -> tuple[eqd.Dataset, eqd.Dataset, eqd.datasets.AbstractPreprocessing]:
    """Standardised or whitened training and test images, and the preprocessing. With
    `held_out`, that fraction of the training images replaces the test images, so that
    no choice is made on the test set.

    `dataset` is a name, or a folder that holds the folders `train` and `test`.
    """
    if Path(dataset).is_dir():
        train, test = (
            eqd.datasets.from_folder(Path(dataset) / part) for part in ("train", "test")
        )
    else:
        train, test = eqd.datasets.load(dataset, data_dir)
    fit = (eqd.datasets.ZCA if zca else eqd.datasets.Standardisation).fit
    preprocessing = fit(train)
    train, test = train.map(preprocessing), test.map(preprocessing)
    if held_out > 0:
        train, test = train.split(held_out, key=jax.random.key(0))
    return train, test, preprocessing


def adam(
    schedule: optax.Schedule, slower: float = 10.0
) -> optax.GradientTransformation:
    """Adam, with a rate for labels, ridges and temperatures that is `slower` times
    smaller than the rate for images."""

    def part(path: tuple, _: jax.Array) -> str:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return "images" if name == "images" else "others"

    return optax.partition(
        {
            "images": optax.adam(schedule),
            "others": optax.adam(lambda step: schedule(step) / slower),
        },
        lambda learned: jax.tree.map_with_path(part, learned),
    )


def run(main: Callable[..., None], parser: argparse.ArgumentParser) -> None:
    """Calls `main` with the arguments of the command line, and a folder for the
    results. The next run loads what this one compiles."""
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="a folder for the results"
    )
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.output / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(**vars(args))
