"""Distilled images that `export` or other programs wrote."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from .._data._preprocessing import AbstractPreprocessing, Standardisation, ZCA
from .._losses import AbstractLoss, CrossEntropy, SquaredError
from ..datasets import from_folder
from ._sources import check_fitted, read_npz


_FROM_EXPORT = ("dataset", "mean", "deviation", "whitening", "regularisation")
_KINDS = {"CrossEntropy": "probabilities", "SquaredError": "targets"}
_WEIGHT_DECAY = 5e-4  # As in `recipes.dc`.


def read_foreign(file: str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file; or the `pictures` of a folder, in the units of real
    images, with their labels and, if `export` wrote them, the preprocessing."""
    path = Path(file)
    exported = path / "distilled.npz"
    if exported.is_file() and not any(path.glob("*/*")):
        path = exported  # Tables are exported without pictures.
    if not path.is_dir():
        if path.suffix != ".npz":
            raise ValueError(f"FILE must be a folder or end in '.npz'; got {file}.")
        return read_npz(path, "images", "labels")
    data = from_folder(path)
    low, high = _exported_range(path)
    arrays = read_npz(exported, "images") if exported.is_file() else {}
    if "weights" in arrays:
        raise ValueError(f"The PNGs in {file} store no weights, so pass {exported}.")
    return {name: arrays[name] for name in _FROM_EXPORT if name in arrays} | {
        "pictures": low + (high - low) * np.asarray(data.floating()),
        "labels": np.asarray(data.labels),
        "class_names": np.array(data.class_names),
    }


def _exported_range(folder: Path) -> tuple[float, float]:
    """The values of the levels 0 and 255, which `export` stores in each PNG."""
    from PIL import Image

    found = set()
    for file in folder.glob("[!.]*/[!.]*"):
        with Image.open(file) as image:
            info = image.info
        found.add((float(info.get("low", 0)), float(info.get("high", 1))))
    if len(found) > 1:
        raise ValueError(f"{folder} has pictures from several exports.")
    return found.pop()


def to_distilled(
    file: str,
    arrays: dict[str, np.ndarray],
    train: Dataset,
    *,
    units: str | None,
    regularisation: float,
    soft_labels: str | None,
) -> tuple[DistilledSet, AbstractPreprocessing | None]:
    """The distilled set, and the preprocessing of real images to its units."""
    is_folder = "pictures" in arrays
    images = arrays["pictures" if is_folder else "images"]
    if units is None and "mean" in arrays:
        preprocessing = _exported_preprocessing(file, arrays, train)
        is_pixels = is_folder
    else:
        units = units or ("pixels" if is_folder else None)
        images, is_pixels = _to_floating(images, units), units in (None, "pixels")
        if units == "zca":
            preprocessing = ZCA.fit(train, regularisation=regularisation)
        else:
            preprocessing = Standardisation.fit(train)
    # Grey images may have an axis of size 1 for the channel.
    if _without_ones(images.shape[1:]) != _without_ones(train.shape):
        raise ValueError(
            f"The images in {file} must have the shape of the real ones, "
            f"{train.shape}; got {images.shape[1:]}."
        )
    images = jnp.asarray(images.reshape(-1, *train.shape), float)
    if is_pixels and preprocessing is not None:
        low, high = train.images.min(), train.images.max()
        if train.images.dtype != np.uint8 and not (low >= 0 and high <= 1):
            raise ValueError(
                f"The real images must be uint8 or from 0 to 1; got {low} to {high}."
            )
        images = jax.vmap(preprocessing)(images)
    labels, loss = _labels(file, arrays, train, soft_labels)
    options = {"loss": loss, "weights": arrays.get("weights")}
    return DistilledSet(images, labels, l2=_WEIGHT_DECAY, **options), preprocessing


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _exported_preprocessing(
    file: str, arrays: dict[str, np.ndarray], train: Dataset
) -> AbstractPreprocessing | None:
    mean = jnp.asarray(arrays["mean"], float)
    if mean.ndim == 0:
        return None
    if "whitening" in arrays:
        whitening = jnp.asarray(arrays["whitening"], float)
        fitted = ZCA(mean, whitening, float(arrays["regularisation"]))
    else:
        fitted = Standardisation(mean, jnp.asarray(arrays["deviation"], float))
    check_fitted(file, fitted, train)
    return fitted


def _to_floating(images: np.ndarray, units: str | None) -> np.ndarray:
    """Converts bytes to pixels from 0 to 1. Raises a `ValueError` for unknown units."""
    if images.dtype == np.uint8:
        images = images / 255
    if images.dtype.kind in "iu":
        white = 65535 if images.dtype == np.uint16 else 255
        raise ValueError(
            f"`images` must be uint8 or floating point; got {images.dtype}: divide by "
            f"{white}."
        )
    low, high = images.min(), images.max()
    got = f"`images` have values from {low:.3g} to {high:.3g}"
    if low >= 0 and high > 16:
        raise ValueError(f"{got}: divide by {255 if high <= 255 else 65535}.")
    if low >= 0 and units in ("standardised", "zca"):
        raise ValueError(f"{got}, but {units} images have negative values.")
    if units is None and not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(
            f"{got}, in unknown units: pass --units standardised or --units zca if "
            "they were preprocessed, or --units pixels if 0 is black and 1 is white."
        )
    return images


def _labels(
    file: str, arrays: dict[str, np.ndarray], train: Dataset, kind: str | None
) -> tuple[np.ndarray, AbstractLoss]:
    """The labels as a `DistilledSet` holds them, and their loss."""
    labels, soft = arrays["labels"], None
    if {"targets", "loss"} <= arrays.keys():  # Exported.
        soft, kind = arrays["targets"], _KINDS.get(str(arrays["loss"]), kind)
    elif labels.ndim == 2:
        labels, soft = labels.argmax(axis=1), labels
    classes = np.arange(train.num_classes)
    if "class_names" in arrays:
        classes = _class_indices(file, arrays["class_names"].tolist(), train)
    is_index = labels.dtype.kind in "iu" and labels.ndim == 1
    if not is_index or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"`labels` in {file} must be class indices in [0, {len(classes)}), or soft "
            f"labels; got {labels.dtype} of shape {labels.shape} from {labels.min()} "
            f"to {labels.max()}."
        )
    if soft is None:
        return classes[labels], CrossEntropy()
    if kind is None:
        raise ValueError(
            f"{file} has soft labels: pass --soft-labels logits, probabilities or "
            "targets."
        )
    is_targets, width = kind == "targets", soft.shape[1]
    loss = SquaredError() if is_targets else CrossEntropy(arrays.get("temperature"))
    hard = np.eye(width)[labels] - is_targets / width
    if kind != "logits" and np.allclose(soft, hard, atol=1e-6):
        return classes[labels], loss
    if width != train.num_classes:
        raise ValueError(
            f"Soft labels must have a column for each of the {train.num_classes} "
            f"classes; {file} has {width}."
        )
    if kind == "probabilities":
        if soft.min() < 0 or not np.allclose(soft.sum(axis=1), 1, atol=1e-3):
            raise ValueError(
                f"The probabilities in {file} must be non-negative, and each row must "
                "sum to 1."
            )
        soft = np.log(np.maximum(soft, np.finfo(np.float32).tiny))
    return soft[:, np.argsort(classes)].astype(np.float32), loss


def _class_indices(
    file: str, names: list[str], train: Dataset
) -> Int[np.ndarray, " c"]:
    """The class indices in the real data of the classes with these names."""
    known, c = list(train.class_names or ()), train.num_classes
    if set(names) <= set(known):
        return np.array([known.index(name) for name in names])
    if all(name.isdecimal() and int(name) < c for name in names):
        return np.array([int(name) for name in names])
    if known or len(names) != c:
        raise ValueError(
            f"The classes in {file} must be those of the real images, "
            f"{', '.join(known) or f'0 to {c - 1}'}; got {', '.join(names)}."
        )
    return np.arange(c)
