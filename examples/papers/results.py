"""Prints the table of results in the README, from the files in `examples/sets`.

Each file holds a distilled set and the accuracy that it claims, as `eqdistill.save`
wrote it. `--check` first measures all claims again.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr

import eqdistill as eqd


SETS = Path(__file__).parents[1] / "sets"
SIZES = "1", "10", "50"  # Images per class.
# What the papers report at these sizes.
PUBLISHED = {
    ("mnist", "dc"): {"DC": (91.7, 97.4, 98.8), "DSA": (88.7, 97.8, 99.2)},
    ("mnist", "feature_regression"): {"RCIG": (94.7, 98.9, 99.2)},
    ("mnist", "frepo"): {"FRePo": (93.0, 98.6, 99.2)},
    ("mnist", "packed"): {"IDC": (94.2, None, None)},
    ("fashion_mnist", "dc"): {"DC": (70.5, None, None), "DSA": (70.6, 84.6, 88.7)},
    ("fashion_mnist", "feature_regression"): {"RCIG": (79.8, 88.5, 90.2)},
    ("fashion_mnist", "frepo"): {"FRePo": (75.6, None, None)},
    ("fashion_mnist", "packed"): {"IDC": (81.0, 86.0, 86.2)},
    ("cifar10", "frepo, augmented"): {"FRePo": (46.8, 65.5, 71.7)},
}
HEAD = ("Dataset", "Images per class", "Bytes", "Recipe, network", "Here", "Published")


def table(folder: Path) -> str:
    """One line for each file, in Markdown. The bytes are those of the whole file."""
    rows = sorted(to_row(file) for file in folder.glob("*.safetensors"))
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_row(file: Path) -> list[str]:
    artifact: Any = eqd.load(file)
    recipe, start = artifact.recipe, artifact.start
    if recipe is None or artifact.score is None or artifact.dataset is None:
        raise SystemExit(f"{file} must name its dataset and claim a score to check.")
    network = eqx.filter_eval_shape(recipe.models.make, key=jr.key(0))
    settings = dict(network.settings)
    most = max(x.size for x in jax.tree.leaves(start))
    size = f"{most / artifact.distilled.images[0].size / settings['num_classes']:g}"
    augmented = ", augmented" if dict(recipe.settings).get("augment") else ""
    kind, images = f"{recipe.name}{augmented}", size
    papers = PUBLISHED.get((artifact.dataset, kind), {})
    if isinstance(start, eqd.Packed):
        papers = PUBLISHED.get((artifact.dataset, "packed"), {})
        images = f"{size}, packed"
    reported = [
        f"{x[SIZES.index(size)]} ({name})"
        for name, x in papers.items()
        if size in SIZES and x[SIZES.index(size)] is not None
    ]
    std = "" if artifact.std is None else f" ± {100 * artifact.std:.1f}"
    return [
        artifact.dataset,
        images,
        f"{file.stat().st_size:,}",
        f"`{kind}`, {to_words(network.architecture, settings)}",
        f"{100 * artifact.score:.1f}{std}",
        ", ".join(reported),
    ]


def to_words(architecture: str, settings: dict) -> str:
    words = [architecture, "-".join(map(str, settings.get("widths", ())))]
    norm = settings.get("norm")
    words.append("" if norm is None else norm.__name__.replace("_", " "))
    return " ".join(filter(None, words))


def check(file: Path, cifar10: Path | None = None) -> bool:
    command = [sys.executable, "-m", "eqdistill", "check", str(file)]
    if eqd.load(file).dataset == "cifar10" and cifar10 is not None:
        command += ["--data", str(cifar10)]
    return subprocess.run(command).returncode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="measure again first")
    parser.add_argument("--sets", type=Path, default=SETS, help="folder of the files")
    parser.add_argument(
        "--cifar10",
        type=Path,
        metavar="FOLDER",
        help="CIFAR-10 as pictures: folders train and test, each with a folder for "
        "each class",
    )
    args = parser.parse_args()
    files = sorted(args.sets.glob("*.safetensors")) if args.check else []
    wrong = [str(file) for file in files if not check(file, args.cifar10)]
    print(table(args.sets))
    if wrong:
        raise SystemExit(f"These files claim a different accuracy: {', '.join(wrong)}.")
