"""Networks, recipes, data and command-line options that several examples share."""

import argparse
import functools as ft
from collections.abc import Callable
from pathlib import Path

import jax
import optax

import eqdistill as eqd
from eqdistill import datasets, nn, recipes


# Greyscale images of 28 x 28 are padded to 32, as in the papers.
ConvNet = ft.partial(nn.ConvNet, size=32)
NETWORKS = {
    "ConvNet, instance norm": ConvNet,
    "ConvNet, instance norm, not padded": nn.ConvNet,
    "ConvNet": ft.partial(ConvNet, widths=(32, 64, 128), norm=None),
    "FRePo's ConvNet": ft.partial(ConvNet, widths=(128, 256, 512), norm=None),
    "LeNet": nn.LeNet,
    "MLP": nn.MLP,
    "AlexNet": nn.AlexNet,
    "VGG-11": nn.VGG11,
    "ResNet-18": nn.ResNet18,
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
    "mnist, fashion_mnist, digits, cifar10, or a folder with subfolders train and "
    "test, each with one folder per class"
)


def maker(network: Callable, data: eqd.Dataset) -> Callable:
    """A constructor of networks for a dataset, which needs only a `key`."""
    return ft.partial(network, data.shape, data.num_classes)


def real_data(dataset: str, data_dir: Path | None, held_out=0.0, zca=False):
    """Standardised or whitened training and test images, and the preprocessing. With
    `held_out`, that fraction of the training images replaces the test images, so that
    no choice is made on the test images."""
    if Path(dataset).is_dir():
        train = datasets.from_folder(Path(dataset, "train"))
        names = train.class_names
        test = datasets.from_folder(Path(dataset, "test"), class_names=names)
    else:
        train, test = datasets.load(dataset, data_dir)
    preprocessing = (datasets.ZCA if zca else datasets.Standardisation).fit(train)
    train, test = train.map(preprocessing), test.map(preprocessing)
    if held_out > 0:
        train, test = train.split(held_out, key=jax.random.key(0))
    return train, test, preprocessing


def adam(schedule: optax.Schedule, slower: float = 10.0):
    """Adam, with a rate for labels, ridges and so on that is `slower` times smaller."""
    other = optax.adam(lambda step: schedule(step) / slower)
    name = lambda path: jax.tree_util.keystr(path[-1:], simple=True)
    part = lambda path, _: "images" if name(path) == "images" else "other"
    label = lambda learned: jax.tree.map_with_path(part, learned)
    return optax.partition({"images": optax.adam(schedule), "other": other}, label)


def run(main: Callable[..., None], parser: argparse.ArgumentParser) -> None:
    """Calls `main` with the arguments of the command line."""
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="the folder to write to"
    )
    args = parser.parse_args()
    # The next run loads what this one compiles.
    jax.config.update("jax_compilation_cache_dir", str(args.output / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(**vars(args))
