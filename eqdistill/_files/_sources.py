"""Real data and recipes that the command line names."""

import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import datasets
from .._data._class_names import check_same_classes
from .._data._dataset import Dataset
from .._data._preprocessing import Standardisation, ZCA


_SPLITS = ("train_images", "train_labels", "test_images", "test_labels")


def load_data(
    name: str | None, data: str | None, data_dir: str | None
) -> tuple[Dataset, Dataset]:
    """The training and the test data: of the dataset `name`, or from `data`, a folder,
    an `.npz` file or `module:function`."""
    if data is None:
        if name is None:
            raise ValueError("No dataset is named: pass --dataset or --data.")
        return datasets.load(name, data_dir)
    path = Path(data)
    if path.is_dir():
        train = datasets.from_folder(path / "train")
        test = datasets.from_folder(path / "test", class_names=train.class_names)
    elif path.suffix == ".npz":
        arrays = read_npz(path, *_SPLITS)
        images, labels, test_images, test_labels = (arrays[x] for x in _SPLITS)
        train = Dataset(images, labels)
        test = Dataset(test_images, test_labels, train.num_classes)
    else:
        train, test = call(data, "--data")
    check_same_classes("the training data", train, "the test data", test)
    for name in ("shape", "num_classes"):
        a, b = getattr(train, name), getattr(test, name)
        if a != b:
            raise ValueError(
                f"The training and the test data of {data} must have the same {name}; "
                f"got {a} and {b}."
            )
    return train, test


def call(name: str, flag: str) -> Any:
    """Calls a function without arguments, named as `module:function`."""
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"{flag} {name} does not exist, and is not a module:function.")
    return getattr(importlib.import_module(module), function)()


def read_npz(path: Path, *names: str) -> dict[str, np.ndarray]:
    """All arrays in a file, which must include arrays with these names."""
    with np.load(path, allow_pickle=False) as file:  # Pickles could run code.
        if not {*names} <= {*file}:
            raise ValueError(
                f"{path} must have the arrays {', '.join(names)}; it has "
                f"{', '.join(file) or 'none'}."
            )
        return dict(file)


def check_fitted(file: str, preprocessing: Any, train: Dataset) -> None:
    """Checks that the preprocessing was fitted to the training data. Any other could
    itself contain what models are supposed to learn from the images."""
    if isinstance(preprocessing, ZCA):
        wanted = ZCA.fit(train, regularisation=preprocessing.regularisation)
    else:
        wanted = type(preprocessing).fit(train)
    pairs = map(jax.tree.leaves, (preprocessing, wanted))
    for x, y in zip(*pairs, strict=True):
        tolerance = 1e-2 * np.abs(y) + 1e-3 * np.abs(y).max()
        if isinstance(wanted, Standardisation):
            tolerance = 1e-2 * wanted.deviation  # Columns have different scales.
        if x.shape != y.shape or not (np.abs(x - y) <= tolerance).all():
            problem = "is not fitted to the training data."
            raise ValueError(f"The preprocessing in {file} {problem}")
