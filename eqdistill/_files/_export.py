import inspect
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Float, Int, UInt8

from .._data._cifar import CifarBinary
from .._data._distilled_set import DistilledSet
from .._data._pictures import to_pictures
from .._data._preprocessing import AbstractPreprocessing, ZCA
from .._data._sources import SOURCES
from .._losses import CrossEntropy, SquaredError
from .._outer import _recipes as recipes
from ._artifact import Artifact


def export(
    folder: str | os.PathLike,
    distilled: DistilledSet | Artifact,
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    r"""Exports a distilled set for people outside JAX: one PNG for each image, in a
    folder for each class, and a file `distilled.npz` with the exact numbers and the
    recipe in words. [Use them elsewhere](../elsewhere.md) shows how to retrain.

    The PNGs have 8 bits, grey or in colour, as Pillow and the loaders of image folders
    expect. They show the images in the units of the real images, from 0 to 1: a
    preprocessing of the artifact is undone. If the pixels lie in this range, and fill
    half of it, then the level 0 stands for the value $a = 0$ and 255 for $b = 1$.
    Otherwise $a$ is the smallest and $b$ the largest value of all images. A level $k$
    stands for

    $$a + (b - a) \, k / 255,$$

    to within $(b - a) / 510$. Each PNG holds `low` ($a$) and `high` ($b$) as text.

    `distilled.npz` is read by `numpy.load`, and holds arrays of numbers and of text:

    - `images`: the distilled images, exact, in the units in which they were learned;
    - `labels`: the class index of each image, that of the largest soft label;
    - `targets`: shape `(n, c)`. The probabilities of the classes for cross-entropy; the
        targets for squared error;
    - `loss`: `"CrossEntropy"`, or `"SquaredError"` with its `temperature`;
    - `l2`: the ridge, or the weight decay of the recipe;
    - `low`, `high`: $a$ and $b$;
    - `mean`, `deviation`: real images $x$ from 0 to 1 become $(x - \mathrm{mean}) /
        \mathrm{deviation}$ in the units of `images`. With [`eqdistill.ZCA`][], `mean`
        and `whitening`;
    - `class_names`: the name of each class, which is also the name of its folder;
    - `recipe`: in words, what is trained and how;
    - of an artifact that has them, `dataset`, `claimed_accuracy` and
        `claimed_deviation`.

    Needs Pillow, of `eqdistill[plot]`.

    **Arguments:**

    - `folder`: where to write. It is made if it does not exist; files of the same
        names in it are overwritten.
    - `distilled`: what [`eqdistill.load`][] returned, with its recipe, claim and
        preprocessing; or only a distilled set. The images are grey, of shape `(height,
        width)` but for axes of size 1, or in colour, of shape `(height, width, 3)` or
        `(3, height, width)`.
    - `class_names`: the name of each class. Defaults to the names of the dataset that
        an artifact names, if it is CIFAR-10, and otherwise to the class indices.
        (Keyword only argument.)

    **Raises:**

    - A `ValueError` for images of any other shape, or that are not finite; or if
        `class_names` are too few, are not all different, or cannot be names of folders.
    - A `FileExistsError` if there are other PNGs in the folders of `folder`: they would
        be taken for images of the set.
    - An `ImportError` without Pillow.
    """
    try:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo
    except ImportError as e:
        raise ImportError(
            "`eqdistill.export` needs Pillow: pip install 'eqdistill[plot]'."
        ) from e
    artifact = distilled if isinstance(distilled, Artifact) else None
    if artifact is not None:
        distilled = artifact.distilled
    assert isinstance(distilled, DistilledSet)
    images = np.asarray(distilled.images)
    if not np.isfinite(images).all():
        raise ValueError(
            "`distilled` must have finite images; some pixels are NaN or infinite."
        )
    preprocessing = None if artifact is None else artifact.preprocessing
    levels, low, high = _to_levels(images, preprocessing)
    labels, meaning = _read_labels(distilled, artifact, class_names)
    names = _names(artifact, class_names, meaning["targets"].shape[1])

    folder = Path(folder)
    digits = len(str(len(levels) - 1))
    files = [folder / names[y] / f"{i:0{digits}}.png" for i, y in enumerate(labels)]
    others = set(folder.glob("*/*.png")) - set(files)
    if others:
        raise FileExistsError(
            "`folder` must have no PNGs of another set in its folders; got "
            f"{min(others)}."
        )
    text = PngInfo()
    text.add_text("low", repr(low))
    text.add_text("high", repr(high))
    for file, level in zip(files, levels, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(level).save(file, pnginfo=text)
    np.savez(
        folder / "distilled.npz",
        images=images,
        labels=labels,
        low=low,
        high=high,
        class_names=np.array(names),
        recipe=_recipe_in_words(distilled, artifact),
        **meaning,
        **_numbers(preprocessing),
        **_claim(artifact),
    )


def _to_levels(
    images: Float[np.ndarray, "n *shape"], preprocessing: AbstractPreprocessing | None
) -> tuple[UInt8[np.ndarray, "n *picture"], float, float]:
    """The pictures, and the values that the levels 0 and 255 stand for."""
    if preprocessing is not None:
        images = np.asarray(jax.vmap(preprocessing.inverse)(jnp.asarray(images)))
    pictures = to_pictures(images.astype(np.float64))
    low, high = float(pictures.min()), float(pictures.max())
    if low >= 0 and high <= 1 and high - low >= 0.5:
        low, high = 0.0, 1.0
    width = high - low or 1.0  # Images may be the same throughout.
    return np.rint(255 * (pictures - low) / width).astype(np.uint8), low, low + width


def _read_labels(
    distilled: DistilledSet,
    artifact: Artifact | None,
    class_names: Sequence[str] | None,
) -> tuple[Int[np.ndarray, " n"], dict[str, Any]]:
    """The class indices, and what a model is fitted to, as the recipe sees it."""
    labels = np.asarray(distilled.labels)
    if labels.ndim == 2:
        num_classes, indices = labels.shape[1], labels.argmax(axis=1)
    else:
        num_classes, indices = (
            max(int(labels.max()) + 1, len(class_names or ())),
            labels,
        )
    if artifact is not None and artifact.recipe is not None:
        distilled = artifact.recipe.prepare(distilled, num_classes)
        labels = np.asarray(distilled.labels)
    meaning: dict[str, Any] = {
        "loss": type(distilled.loss).__name__,
        "l2": np.asarray(distilled.l2),
    }
    if isinstance(distilled.loss, SquaredError):
        meaning["temperature"] = np.asarray(distilled.loss.temperature)
        targets = np.asarray(distilled.loss.targets(distilled.labels, num_classes))
    elif labels.ndim == 1:
        one_hot = labels[:, None] == np.arange(num_classes)
        targets = one_hot.astype(distilled.images.dtype)
    elif isinstance(distilled.loss, CrossEntropy):
        targets = scipy.special.softmax(labels, axis=1)
    else:  # Only the loss knows what they are.
        targets = labels
    return indices, {"targets": targets, **meaning}


def _names(
    artifact: Artifact | None, class_names: Sequence[str] | None, num_classes: int
) -> list[str]:
    if class_names is None and artifact is not None and artifact.dataset in SOURCES:
        format = SOURCES[artifact.dataset].format
        if isinstance(format, CifarBinary) and len(format.class_names) == num_classes:
            class_names = format.class_names
    if class_names is None:
        # Loaders sort the folders by their names.
        digits = len(str(num_classes - 1))
        return [f"{y:0{digits}}" for y in range(num_classes)]
    if not len(class_names) == len(set(class_names)) == num_classes:
        raise ValueError(
            f"`class_names` must have one name for each of the {num_classes} classes, "
            f"all different; got {len(class_names)}."
        )
    for name in class_names:
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(
                "`class_names` must be names of folders, which do not begin with a "
                f"dot; got {name!r}."
            )
    return list(class_names)


def _numbers(preprocessing: AbstractPreprocessing | None) -> dict[str, Any]:
    if preprocessing is None:
        return {"mean": 0.0, "deviation": 1.0}
    fields = ("mean", "whitening" if isinstance(preprocessing, ZCA) else "deviation")
    return {field: np.asarray(getattr(preprocessing, field)) for field in fields}


def _claim(artifact: Artifact | None) -> dict[str, Any]:
    if artifact is None:
        return {}
    claim = {
        "dataset": artifact.dataset,
        "claimed_accuracy": artifact.accuracy,
        "claimed_deviation": artifact.deviation,
    }
    return {name: value for name, value in claim.items() if value is not None}


def _recipe_in_words(distilled: DistilledSet, artifact: Artifact | None) -> str:
    if artifact is not None and artifact.recipe is not None:
        # The first paragraph of its documentation says what the recipe does.
        paragraph = (
            inspect.getdoc(getattr(recipes, artifact.recipe.name)) or ""
        ).split("\n\n")[0]
        words = re.sub(r"\[`([\w.]+)`\]\[\]", r"\1", " ".join(paragraph.split()))
        return f"{words} {artifact.classifier_description}"
    if artifact is not None and artifact.is_by_recipe:
        return artifact.classifier_description
    losses = {
        "CrossEntropy": "the cross-entropy of the outputs' softmax with `targets`",
        "SquaredError": "half the squared distance of the outputs from `targets`",
    }
    loss = type(distilled.loss).__name__
    words = (
        f"Minimise the mean over the images of {losses.get(loss, loss)}, plus l2 / 2 "
        "times the sum of the squares of the weights, but not of an intercept. The "
        "class is that of the largest output."
    )
    if artifact is None:
        return words
    return f"{words} {artifact.classifier_description} {artifact.inner_description}"
