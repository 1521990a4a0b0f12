"""The command `python -m eqdistill check FILE`: checks the claim of a file."""

import argparse
import sys

import jax
import jax.random as jr
import numpy as np

from . import datasets, recipes
from ._data._dataset import Dataset
from ._data._preprocessing import AbstractPreprocessing, Standardisation, ZCA
from ._data._sources import SOURCES
from ._files._artifact import Artifact, load_in_its_precision
from ._outer._evaluate import evaluate


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
        description="Fits a model to the distilled set in a file, from the file "
        "alone, and compares its accuracy on the real test data with the accuracy "
        "that the file claims.",
        epilog="Exits with 0 if the two agree; 1 if they differ by more than the "
        "tolerance; 2 if the file or an argument is bad.",
    )
    parser.set_defaults(error=parser.error)
    parser.add_argument("file", metavar="FILE", help="a file of eqdistill.save")
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="the dataset to measure on. Defaults to the one that the file names, and "
        "may not contradict it",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="the folder of the files of the dataset"
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="T",
        help="the most by which the accuracies, from 0 to 1, may differ. Defaults to "
        "the deviation that is measured over networks, or else to 0.0001: one test "
        "image in 10,000",
    )
    return main


def _measure(args: argparse.Namespace) -> tuple[str, float, float, float]:
    """The name of the dataset, the accuracies that are claimed and measured, and the
    most by which they may differ."""
    artifact = load_in_its_precision(args.file)
    name = artifact.dataset or args.dataset
    if name is None:
        raise ValueError(f"{args.file} names no dataset: give one by --dataset.")
    if args.dataset not in (None, name):
        raise ValueError(
            f"{args.file} is of the dataset {name!r}, but --dataset says "
            f"{args.dataset!r}."
        )
    if artifact.accuracy is None:
        raise ValueError(f"{args.file} claims no accuracy: there is none to compare.")
    source = SOURCES.get(name)
    if source is not None and artifact.sha256 not in ({}, source.sha256):
        raise ValueError(
            f"{args.file} was made with other files of {name!r} than eqdistill loads: "
            "their SHA-256 differ."
        )
    with jax.enable_x64(artifact.x64):
        train, test = datasets.load(name, args.data_dir)
        if artifact.preprocessing is not None:
            _check_preprocessing(args.file, artifact.preprocessing, train)
            test = test.map(artifact.preprocessing)
        measured, deviation = _retrain(args.file, artifact, test)
    tolerance = args.tolerance
    if tolerance is None:
        tolerance = max(deviation, 1e-4)
    return name, artifact.accuracy, measured, tolerance


def _check_preprocessing(
    file: str, preprocessing: AbstractPreprocessing, train: Dataset
) -> None:
    """**Raises:**

    A `ValueError` if that is not what is fitted to the training data: it could hold all
    that is to be learned.
    """
    if isinstance(preprocessing, ZCA):
        wanted = ZCA.fit(train, regularisation=preprocessing.regularisation)
    else:
        wanted = Standardisation.fit(train)
    for x, y in zip(
        jax.tree.leaves(preprocessing), jax.tree.leaves(wanted), strict=True
    ):
        if x.shape != y.shape or not np.allclose(x, y, 1e-2, 1e-3 * np.abs(y).max()):
            raise ValueError(
                f"The preprocessing of {file} is not the one that is fitted to the "
                "training data."
            )


def _retrain(file: str, artifact: Artifact, test: Dataset) -> tuple[float, float]:
    """The accuracy of the model that a file says was fitted, and zero; or the mean
    accuracy of the networks that were trained, and their deviation."""
    if artifact.recipe is not None:
        key = jr.key(artifact.seed or 0) if artifact.key is None else artifact.key
        found = recipes.evaluate(
            artifact.distilled,
            artifact.recipe,
            test,
            num_networks=artifact.fits,
            key=key,
        )
        deviation = found.deviation_of_networks if artifact.fits > 1 else 0.0
        return found.mean, deviation
    if artifact.is_by_recipe:
        raise ValueError(
            f"The recipe of {file} cannot be built from a file: "
            f"{artifact.classifier_description!r}. Use eqdistill.load and "
            "eqdistill.recipes.evaluate."
        )
    for part in ("model", "inner"):
        if getattr(artifact, part) is None:
            description = getattr(artifact, f"{part}_description")
            raise ValueError(
                f"The {part} of {file} cannot be built from a file: {description!r}. "
                "Use eqdistill.load and eqdistill.evaluate."
            )
    assert artifact.model is not None
    assert artifact.inner is not None
    evaluation = evaluate(artifact.distilled, artifact.model, test, artifact.inner)
    return float(evaluation.accuracy), 0.0


def _main() -> int:
    args = _parser().parse_args()
    try:
        name, claimed, measured, tolerance = _measure(args)
    # Whatever it is: the exit status 1 is for claims that differ, and nothing else.
    except (Exception, KeyboardInterrupt) as e:
        lines = [line for line in str(e).splitlines() if line.strip()]
        return args.error(lines[0][:1000] if lines else type(e).__name__)
    # Accuracies are fractions in single precision: digits beyond these are rounding.
    difference = round(abs(claimed - measured), 6)
    print(
        f"{name} test accuracy: claimed {claimed:.3%}, measured {measured:.3%}, "
        f"difference {100 * difference:.3f} points "
        f"(tolerance {100 * tolerance:.3g})"
    )
    return 0 if difference <= tolerance else 1


if __name__ == "__main__":
    sys.exit(_main())
