"""Prints the table of results in the README, from the files in `examples/sets`.

Each file holds a distilled set and the accuracy that it claims, as `eqdistill.save`
wrote it. `--check` measures all claims again. `--publish FILE NAME` adds a file: its
images are rounded to float16, which halves them, and the claim is measured again with
the recipe and the seed in the file.
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import eqdistill as eqd
from eqdistill import datasets, nn


SETS = Path(__file__).parents[1] / "sets"
# By the dataset, the recipe and the images per class, as their papers report them.
PUBLISHED = {
    ("mnist", "dc", "1"): "91.7 (DC), 88.7 (DSA)",
    ("mnist", "dc", "10"): "97.4 (DC), 97.8 (DSA)",
    ("mnist", "dc", "50"): "98.8 (DC), 99.2 (DSA)",
    ("fashion_mnist", "dc", "1"): "70.5 (DC), 70.6 (DSA)",
    ("fashion_mnist", "dc", "10"): "84.6 (DSA)",
    ("fashion_mnist", "dc", "50"): "88.7 (DSA)",
    ("mnist", "feature_regression", "1"): "94.7 (RCIG)",
    ("mnist", "feature_regression", "10"): "98.9 (RCIG)",
    ("mnist", "feature_regression", "50"): "99.2 (RCIG)",
    ("mnist", "feature_regression", "4, packed"): "94.2 (IDC)",
    ("fashion_mnist", "feature_regression", "1"): "79.8 (RCIG)",
    ("fashion_mnist", "feature_regression", "10"): "88.5 (RCIG)",
    ("fashion_mnist", "feature_regression", "50"): "90.2 (RCIG)",
    ("fashion_mnist", "feature_regression", "4, packed"): "81.0 (IDC)",
    ("mnist", "frepo", "1"): "93.0 (FRePo)",
    ("mnist", "frepo", "10"): "98.6 (FRePo)",
    ("mnist", "frepo", "50"): "99.2 (FRePo)",
    ("fashion_mnist", "frepo", "1"): "75.6 (FRePo)",
    ("cifar10", "frepo", "1"): "46.8 (FRePo)",
    ("cifar10", "frepo", "10"): "65.5 (FRePo)",
    ("cifar10", "frepo", "50"): "71.7 (FRePo)",
}
HEAD = "Dataset", "Images per class", "Bytes", "Recipe, network", "Accuracy", "Published"


def table(sets: Path) -> str:
    """One row for each file, in Markdown. The bytes are those of the whole file."""
    lines = [HEAD, ["---"] * len(HEAD), *map(row, sorted(sets.glob("*.safetensors")))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(file: Path) -> list[str]:
    artifact = eqd.load(file)
    recipe, distilled = artifact.recipe, artifact.distilled
    if recipe is None or artifact.score is None or artifact.dataset is None:
        raise SystemExit(f"{file} must have a dataset, and a claim that can be checked.")
    network = eqx.filter_eval_shape(recipe.models.make, key=jr.key(0))
    c = datasets.load(artifact.dataset)[1].num_classes
    images = f"{len(distilled) / c:g}"
    if type(artifact.start) is not eqd.DistilledSet:
        images += f", {type(artifact.start).__name__.lower()}"
    std = "" if artifact.std is None else f" ± {100 * artifact.std:.1f}"
    return [
        artifact.dataset,
        images,
        f"{file.stat().st_size:,}",
        f"`{recipe.name}`, {describe(network)}",
        f"{100 * artifact.score:.1f}{std}",
        PUBLISHED.get((artifact.dataset, recipe.name, images), ""),
    ]
