"""The command `python -m eqdistill check FILE`, which checks the accuracy of a file."""

import argparse
import sys
from typing import Any

import jax
import numpy as np

from . import datasets
from ._checks import check_between
from ._data._dataset import Dataset
from ._data._preprocessing import ZCA
from ._files._artifact import load
from ._outer._evaluate import evaluate
from .datasets import _published_hashes


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        # One line. The base class would print its usage too.
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    main = _Parser(prog="python -m eqdistill")
    parser = main.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check",
        help="check the accuracy that a file claims",
        description="Trains models on the distilled set in a file, with the recipe in "
        "the file, and compares their accuracy on the real test data with the accuracy "
        "that the file claims. The exit status is 0 if the two agree, 1 if they differ "
        "by more than the tolerance, and 2 if the file or an argument is bad.",
    )
    parser.set_defaults(error=parser.error)
    add = parser.add_argument
    add("file", metavar="FILE", help="a file that eqdistill.save wrote")
    add("--dataset", metavar="NAME", help="the dataset, if the file names none")
    add("--data-dir", metavar="DIR", help="the folder with the files of the dataset")
    tolerance = (
        "the largest difference allowed between the accuracies, which are from 0 to 1. "
        "Defaults to the measured standard deviation over models, but at least 0.0001: "
        "one test image in 10,000"
    )
    add("--tolerance", type=float, metavar="T", help=tolerance)
    return main


def _check(file: str, dataset: str | None, data_dir: str | None) -> tuple:
    """The name of the dataset, the claimed accuracy, and the new evaluation."""
    with jax.enable_x64(load(file).x64):
        artifact = load(file)
        name = artifact.dataset or dataset
        if name is None:
            raise ValueError(f"{file} names no dataset: pass one as --dataset.")
        if dataset not in (None, name):
            raise ValueError(f"{file} is of {name!r}, but --dataset is {dataset!r}.")
        if artifact.accuracy is None:
            raise ValueError(f"{file} claims no accuracy, so there is none to check.")
        if artifact.sha256 not in ({}, _published_hashes(name)):
            raise ValueError(
                f"{file} was made with other files of {name!r} than eqdistill loads: "
                "their SHA-256 differ."
            )
        if artifact.recipe is None:
            raise ValueError(
                f"The recipe of {file} cannot be rebuilt. To check it, call "
                "eqdistill.evaluate with the distilled set of eqdistill.load, and this "
                f"recipe: {artifact.recipe_description!r}"
            )
        train, test = datasets.load(name, data_dir)
        if artifact.preprocessing is not None:
            _check_preprocessing(file, artifact.preprocessing, train)
            test = test.map(artifact.preprocessing)
        models = {"num_models": artifact.num_models, "key": artifact.key}
        found = evaluate(artifact.distilled, artifact.recipe, test, **models)
    return name, artifact.accuracy, found


def _check_preprocessing(file: str, preprocessing: Any, train: Dataset) -> None:
    """Checks that a preprocessing is the one fitted to the training data. Otherwise it
    could hold everything that is to be learned."""
    if isinstance(preprocessing, ZCA):
        wanted = ZCA.fit(train, regularisation=preprocessing.regularisation)
    else:
        wanted = type(preprocessing).fit(train)
    pairs = map(jax.tree.leaves, (preprocessing, wanted))
    for x, y in zip(*pairs, strict=True):
        if x.shape != y.shape or not np.allclose(x, y, 1e-2, 1e-3 * np.abs(y).max()):
            problem = "is not fitted to the training data."
            raise ValueError(f"The preprocessing in {file} {problem}")


def _main() -> int:
    args = _parser().parse_args()
    try:
        if args.tolerance is not None:
            check_between(0, 1, tolerance=args.tolerance)
        name, claimed, found = _check(args.file, args.dataset, args.data_dir)
    # Every error: exit status 1 is only for accuracies that differ.
    except (Exception, KeyboardInterrupt) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        return args.error(lines[0][:1000])
    tolerance = args.tolerance
    if tolerance is None:
        tolerance = np.nanmax([found.std_models, 1e-4])
    # Accuracies are float32 fractions, so further digits are rounding.
    difference = round(abs(claimed - found.accuracy), 6)
    print(
        f"{name} test accuracy: claimed {claimed:.3%}, measured {found.accuracy:.3%}, "
        f"difference {100 * difference:.3f} points (tolerance {100 * tolerance:.3g})"
    )
    return 0 if difference <= tolerance else 1


if __name__ == "__main__":
    sys.exit(_main())
