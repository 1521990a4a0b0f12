"""The command `python -m eqdistill check FILE`, which checks the accuracy of a file."""

import argparse
import sys

import jax
import numpy as np

from . import datasets
from ._data._dataset import Dataset
from ._data._preprocessing import AbstractPreprocessing, ZCA
from ._files._artifact import Artifact, load
from ._outer._evaluate import evaluate
from .datasets import _published_hashes


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        # One line. The base class would print its usage too.
        self.exit(2, f"{self.prog}: {message}\n")


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1; got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    main = _Parser(prog="python -m eqdistill")
    parser = main.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check",
        help="check the accuracy that a file claims",
        description="Trains models on the distilled set in a file, with the recipe in "
        "the file, and compares their accuracy on the real test data with the accuracy "
        "that the file claims.",
        epilog="The exit status is 0 if the two agree, 1 if they differ by more than "
        "the tolerance, and 2 if the file or an argument is bad.",
    )
    parser.set_defaults(error=parser.error)
    parser.add_argument("file", metavar="FILE", help="a file of eqdistill.save")
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="the dataset to measure on. Defaults to the dataset in the file, and must "
        "not contradict it",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="the folder with the files of the dataset"
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="T",
        help="the largest difference allowed between the accuracies, which are from 0 "
        "to 1. Defaults to the measured standard deviation over models, but at least "
        "0.0001: one test image in 10,000",
    )
    return main


def _check(args: argparse.Namespace) -> int:
    """Prints both accuracies, and returns the exit status."""
    with jax.enable_x64(load(args.file).x64):
        artifact = load(args.file)
        name = _dataset(args, artifact)
        train, test = datasets.load(name, args.data_dir)
        if artifact.preprocessing is not None:
            _check_preprocessing(args.file, artifact.preprocessing, train)
            test = test.map(artifact.preprocessing)
        found = evaluate(
            artifact.distilled,
            artifact.recipe,
            test,
            num_models=artifact.num_models,
            key=artifact.key,
        )
    tolerance = args.tolerance
    if tolerance is None:
        tolerance = max(found.std_models if artifact.num_models > 1 else 0.0, 1e-4)
    claimed, measured = artifact.accuracy, found.accuracy
    assert claimed is not None
    # Accuracies are float32 fractions, so further digits are rounding.
    difference = round(abs(claimed - measured), 6)
    print(
        f"{name} test accuracy: claimed {claimed:.3%}, measured {measured:.3%}, "
        f"difference {100 * difference:.3f} points "
        f"(tolerance {100 * tolerance:.3g})"
    )
    return 0 if difference <= tolerance else 1


def _dataset(args: argparse.Namespace, artifact: Artifact) -> str:
    """The name of the dataset.

    **Raises:**

    A `ValueError` if the file cannot be checked.
    """
    name = artifact.dataset or args.dataset
    if name is None:
        raise ValueError(f"{args.file} names no dataset: pass one as --dataset.")
    if args.dataset not in (None, name):
        raise ValueError(
            f"{args.file} is of the dataset {name!r}, but --dataset is "
            f"{args.dataset!r}."
        )
    if artifact.accuracy is None:
        raise ValueError(f"{args.file} claims no accuracy, so there is none to check.")
    if artifact.sha256 not in ({}, _published_hashes(name)):
        raise ValueError(
            f"{args.file} was made with other files of {name!r} than eqdistill loads: "
            "their SHA-256 differ."
        )
    if artifact.recipe is None:
        raise ValueError(
            f"The recipe of {args.file} cannot be rebuilt from the file: "
            f"{artifact.recipe_description!r}. Pass the recipe, and the set that "
            "eqdistill.load returns, to eqdistill.evaluate."
        )
    return name


def _check_preprocessing(
    file: str, preprocessing: AbstractPreprocessing, train: Dataset
) -> None:
    """**Raises:**

    A `ValueError` unless the preprocessing is the one fitted to the training data. It
    could otherwise hold everything that is to be learned.
    """
    if isinstance(preprocessing, ZCA):
        wanted = ZCA.fit(train, regularisation=preprocessing.regularisation)
    else:
        wanted = type(preprocessing).fit(train)
    pairs = zip(jax.tree.leaves(preprocessing), jax.tree.leaves(wanted), strict=True)
    for x, y in pairs:
        if x.shape != y.shape or not np.allclose(x, y, 1e-2, 1e-3 * np.abs(y).max()):
            raise ValueError(
                f"The preprocessing in {file} is not the one fitted to the training "
                "data."
            )


def _main() -> int:
    args = _parser().parse_args()
    try:
        return _check(args)
    # Every error: exit status 1 is only for accuracies that differ.
    except (Exception, KeyboardInterrupt) as e:
        lines = [line for line in str(e).splitlines() if line.strip()]
        return args.error(lines[0][:1000] if lines else type(e).__name__)


if __name__ == "__main__":
    sys.exit(_main())
