"""The commands `python -m eqdistill distill DATASET`, which distils a dataset,
`check FILE`, which checks the score that a file claims, and `evaluate FILE`, which
measures the score of any images."""

import argparse
import functools as ft
import sys
from collections.abc import Callable
from importlib.util import find_spec

import jax
import jax.random as jr
import numpy as np

from . import nn, recipes
from ._checks import check_at_least
from ._files._artifact import Artifact
from ._files._foreign import read_foreign, to_distilled
from ._files._quick import add_distill
from ._files._recipe_arrays import model_to_words, to_words
from ._files._save import load
from ._files._sources import call, check_fitted, load_data
from ._outer._evaluate import evaluate
from .datasets import _published_hashes


_RECIPES = ("dc", "frepo", "zero_start", "feature_regression", "supervised")
_NETWORKS = {
    "ConvNet": nn.ConvNet,
    "FRePoConvNet": ft.partial(nn.ConvNet, widths=(128, 256, 512), norm=None),
    "LeNet": nn.LeNet,
    "MLP": nn.MLP,
    "AlexNet": nn.AlexNet,
    "VGG11": nn.VGG11,
    "ResNet18": nn.ResNet18,
}
_HAS_BAR = find_spec("tqdm") is not None


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        # One line. The base class would print its usage too.
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    main = _Parser(prog="python -m eqdistill")
    commands = main.add_subparsers(required=True, metavar="COMMAND")
    add_distill(commands)

    parser = commands.add_parser(
        "check",
        help="check the score that a file claims",
        description="Trains models on the distilled set in a file, with the recipe in "
        "the file, and compares their score, such as the accuracy, on the real test "
        "data with the score that the file claims. The exit status is 0 if the two "
        "agree, 1 if they differ by more than the tolerance, and 2 if the file or an "
        "argument is bad.",
    )
    parser.set_defaults(run=_check, error=parser.error)
    add = parser.add_argument
    add("file", metavar="FILE", help="a file that eqdistill.save wrote")
    _add_data(parser)
    recipe = (
        "a function of yours that takes no arguments and returns the recipe, for a "
        "file whose recipe cannot be rebuilt. The arrays of the recipe, such as "
        "learned step sizes, are replaced by those in the file"
    )
    add("--recipe", metavar="MODULE:FUNCTION", help=recipe)
    tolerance = (
        "the largest difference allowed between the scores; accuracies are from 0 to "
        "1. Defaults to the claimed standard deviation over models, but at least "
        "0.0001 (one test image in 10,000)"
    )
    add("--tolerance", type=float, metavar="T", help=tolerance)

    parser = commands.add_parser(
        "evaluate",
        help="measure the accuracy of distilled images from any program",
        description="Trains fresh networks only on distilled images, and prints their "
        "accuracy on real test data. The exit status is 2 if the file or an argument "
        "is bad.",
    )
    parser.set_defaults(run=_evaluate, error=parser.error)
    add = parser.add_argument
    file = (
        "a folder or distilled.npz that eqdistill.export wrote; a folder with a folder "
        "of pictures for each class; or an .npz with images and labels"
    )
    add("file", metavar="FILE", help=file)
    _add_data(parser)
    units = (
        "the units of the images: from 0 (black) to 1 (white), or those of the "
        "training data after eqdistill.datasets.Standardisation or ZCA. Defaults to "
        "the units that an export stores, and to pixels for all other images"
    )
    choices = ("pixels", "standardised", "zca")
    add("--units", choices=choices, help=units)
    regularisation = "the regularisation of ZCA (default: 0.1)"
    add("--regularisation", type=float, default=0.1, metavar="R", help=regularisation)
    choices = ("logits", "probabilities", "targets")
    soft_labels = "how to read soft labels: targets are for the squared error"
    add("--soft-labels", choices=choices, help=soft_labels)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--recipe", choices=_RECIPES, help="(default: dc)")
    rate = (
        "train as dc does, but with this learning rate, and with soft labels if there "
        "are any. Defaults to learning_rate in the .npz, if present"
    )
    group.add_argument("--learning-rate", type=float, metavar="X", help=rate)
    add("--updates", type=int, metavar="N", help="the number of updates of the recipe")
    augment = "augment the images as the recipe does"
    add("--augment", action="store_true", default=None, help=augment)
    add("--network", choices=_NETWORKS, default="ConvNet", help="(default: ConvNet)")
    number = "the number of networks (default: 5)"
    add("--num-networks", type=int, default=5, metavar="N", help=number)
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    return main


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    name = "the dataset, if the file names none"
    group.add_argument("--dataset", metavar="NAME", help=name)
    data = (
        "your own data: a folder with subfolders train and test, each with one folder "
        "of pictures per class; an .npz with train_images, train_labels, test_images "
        "and test_labels; or module:function, which returns the training and the test "
        "data"
    )
    group.add_argument("--data", metavar="SOURCE", help=data)
    data_dir = "the folder with the files of the dataset"
    parser.add_argument("--data-dir", metavar="DIR", help=data_dir)


def _check(args: argparse.Namespace) -> int:
    if args.tolerance is not None:
        check_at_least(0, tolerance=args.tolerance)
    with jax.enable_x64(load(args.file).x64):
        return _check_artifact(args, load(args.file))


def _check_artifact(args: argparse.Namespace, artifact: Artifact) -> int:
    file, name = args.file, artifact.dataset or args.dataset
    if args.dataset not in (None, name):
        raise ValueError(f"{file} is for {name!r}, but --dataset is {args.dataset!r}.")
    if artifact.score is None:
        raise ValueError(f"{file} claims no score, so there is none to check.")
    if artifact.sha256 not in ({}, _published_hashes(name or "")):
        raise ValueError(
            f"{file} was not made with the files of {name!r} that eqdistill loads: "
            "their SHA-256 hashes differ."
        )
    if artifact.sha256 and args.data is not None:
        raise ValueError(f"{file} is for {name!r}, so it needs no --data.")
    words, recipe = ascii(artifact.recipe_description), artifact.recipe
    if recipe is not None and args.recipe is not None:
        raise ValueError(f"{file} holds its recipe, so it needs no --recipe.")
    if recipe is None:
        if args.recipe is None:
            raise ValueError(
                f"The recipe of {file} cannot be rebuilt. To check it, pass --recipe "
                f"module:function for a function that returns this recipe: {words}"
            )
        recipe = artifact.restore(call(args.recipe, "--recipe"))
    train, test = load_data(name, args.data, args.data_dir)
    if artifact.preprocessing is not None:
        check_fitted(file, artifact.preprocessing, train)
        test = test.map(artifact.preprocessing)
    print(f"recipe: {words[1:-1]}")
    if args.recipe is not None:
        print(f"{args.recipe}: {to_words(recipe)}")
    print(f"model: {model_to_words(recipe, artifact.distilled)}")
    for path, backbone in artifact.backbones.items():
        print(f"backbone `{path}`: {backbone}")
    models = {"num_models": artifact.num_models, "key": artifact.key}
    found = evaluate(artifact.distilled, recipe, test, progress=_HAS_BAR, **models)
    if found.metric != artifact.metric:
        raise ValueError(
            f"The metric claimed in {file} is {artifact.metric}, but the metric for "
            f"the labels of the data is {found.metric}."
        )
    tolerance = args.tolerance
    if tolerance is None:
        tolerance = max(artifact.std or 0, 1e-4)
    # Scores are float32, so further digits are rounding errors.
    difference = round(abs(artifact.score - found.score), 6)
    show = "{:.6f}".format
    words = f"{difference:.6f} (tolerance {tolerance:.3g})"
    if found.metric == "accuracy":
        show = "{:.3%}".format
        words = f"{100 * difference:.3f} points (tolerance {100 * tolerance:.3g})"
    print(
        f"{args.data or name} test {found.metric}: claimed {show(artifact.score)}, "
        f"measured {show(found.score)}, difference {words}"
    )
    return 0 if difference <= tolerance else 1


def _evaluate(args: argparse.Namespace) -> int:
    arrays = read_foreign(args.file)
    name = args.dataset
    if name is None and "dataset" in arrays:
        name = str(arrays["dataset"])
    train, test = load_data(name, args.data, args.data_dir)
    distilled, preprocessing = to_distilled(
        args.file,
        arrays,
        train,
        units=args.units,
        regularisation=args.regularisation,
        soft_labels=args.soft_labels,
    )
    if preprocessing is not None:
        test = test.map(preprocessing)
    rate = args.learning_rate
    if rate is None and args.recipe is None and "learning_rate" in arrays:
        rate = float(arrays["learning_rate"])
    network = _NETWORKS[args.network]
    if "ConvNet" in args.network and max(test.shape[-2:]) < 32:
        network = ft.partial(network, size=32)  # As in the papers.
    make = ft.partial(network, test.shape, test.num_classes)
    settings = {"updates": args.updates, "augment": args.augment}
    settings = {name: x for name, x in settings.items() if x is not None}
    if rate is None:
        recipe = getattr(recipes, args.recipe or "dc")(make, **settings)
        settings = dict(recipe.settings)
    else:
        recipe = dc_at_rate(make, rate, len(distilled), **settings)
        settings |= {"learning_rate": rate}
    words = ", ".join(f"{name}={x}" for name, x in settings.items())
    models = {"num_models": args.num_networks, "key": jr.key(args.seed)}
    found = evaluate(distilled, recipe, test, progress=_HAS_BAR, **models)
    std = f" ± {found.std_models:.2%}" if args.num_networks > 1 else ""
    print(
        f"images          {len(distilled)}, {distilled.nbytes:,} bytes with labels\n"
        f"preprocessing   {preprocessing and type(preprocessing).__name__}\n"
        f"recipe          {args.recipe or 'dc'}({words}), {args.network}\n"
        f"networks        {', '.join(f'{x:.2%}' for x in found.scores[0])}\n"
        f"test accuracy   {found.accuracy:.2%}{std}"
    )
    return 0


def dc_at_rate(
    make: Callable, rate: float, n: int, *, updates: int = 300
) -> recipes.Recipe:
    """The recipe `dc` with another learning rate, for soft labels too."""
    rates = np.full(updates, rate)
    rates[updates // 2 :] /= 10
    return recipes.learned_rates(make, learning_rates=rates, batch_size=n, momentum=0.9)


def _main() -> int:
    args = _parser().parse_args()
    try:
        return args.run(args)
    # Catch every error: exit status 1 is only for scores that differ.
    except (Exception, KeyboardInterrupt) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        return args.error(lines[0][:1000])


if __name__ == "__main__":
    sys.exit(_main())
