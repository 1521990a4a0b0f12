import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Float, UInt8

from .. import recipes
from .._checks import needs
from .._data._distilled_set import DistilledSet
from .._data._pictures import are_pictures, to_pictures
from .._data._preprocessing import AbstractPreprocessing
from .._data._readers import _CLASSES
from .._losses import CrossEntropy, SquaredError
from ._artifact import Artifact


def export(
    folder: str | os.PathLike,
    distilled: DistilledSet | Artifact,
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    r"""Exports a distilled set for use outside JAX: a file `distilled.npz` with the
    exact numbers and the recipe in words; and if it has images, one PNG for each, in a
    folder for each class. [Use them elsewhere](../elsewhere.md) shows how to retrain.

    The PNGs are greyscale or colour, with 8 bits, in the units of the real images, from
    0 to 1: the preprocessing of an artifact is undone. A level $k$ stands for

    $$a + (b - a) \, k / 255,$$

    to within $(b - a) / 510$. If all pixels are in [0, 1] and span at least half of it,
    then $a = 0$ and $b = 1$. Otherwise $a$ is the smallest and $b$ the largest value of
    all images. Each PNG stores `low` ($a$) and `high` ($b$) as text.

    `numpy.load` reads `distilled.npz`, which holds these arrays:

    - `images`: the exact distilled images, in the units in which they were learned;
    - `labels`: the class index of each image, or of the largest of its soft labels;
    - `targets`: shape `(n, c)`. The class probabilities for cross-entropy, or the
        targets for squared error;
    - `loss`: `"CrossEntropy"` with its `temperature`, or `"SquaredError"`;
    - `l2`: the ridge, or the weight decay of the recipe;
    - `low`, `high`: $a$ and $b$, if there are PNGs;
    - `mean`, `deviation`: real images $x$ from 0 to 1, or the rows of a table, become
        $(x - \mathrm{mean}) / \mathrm{deviation}$ in the units of `images`. For an
        [`eqdistill.datasets.ZCA`][], `mean` and `whitening`;
    - `class_names`: the name of each class, which is also the name of its folder;
    - `recipe`: how a model is trained, in words;
    - if the artifact has them, `dataset`, `claimed_accuracy` and `claimed_std`.

    PNGs need Pillow, which `eqdistill[plot]` installs.

    **Arguments:**

    - `folder`: the folder to write to. It is created if necessary, and files of the
        same names are replaced.
    - `distilled`: a distilled set, or the result of [`eqdistill.load`][], which has the
        recipe, the accuracy and the preprocessing too. Images are written as PNGs if
        their shape is `(height, width)`, apart from axes of size 1; or in colour,
        `(height, width, 3)` or `(3, height, width)`. Arrays of any other shape, such as
        the rows of a table, are only in `distilled.npz`.
    - `class_names`: the name of each class: all different, and valid names of folders.
        Defaults to the names of CIFAR-10 for an artifact of that dataset, or to the
        class indices.

    **Raises:** a `FileExistsError` if the folders in `folder` have other PNGs, which
    loaders would mistake for images of this set.
    """
    known: dict[str, Any] = {}
    if isinstance(distilled, Artifact):
        known, distilled = vars(distilled), distilled.distilled
    images = np.asarray(distilled.images)
    if not np.isfinite(images).all():
        raise ValueError(
            "`distilled` must have finite images; some pixels are NaN or infinite."
        )
    preprocessing = known.get("preprocessing")
    labels = np.asarray(distilled.labels)
    num_classes = max(int(labels.max()) + 1, len(class_names or ()))
    if labels.ndim == 2:
        num_classes, labels = labels.shape[1], labels.argmax(axis=1)
    is_cifar10 = known.get("dataset") == "cifar10" and num_classes == len(_CLASSES)
    if class_names is None and is_cifar10:
        class_names = _CLASSES
    names = _folder_names(class_names, num_classes)

    folder = Path(folder)
    digits, files = len(str(len(images) - 1)), []
    if are_pictures(images.shape[1:]):
        files = [folder / names[y] / f"{i:0{digits}}.png" for i, y in enumerate(labels)]
    others = set(folder.glob("*/*.png")) - set(files)
    if others:
        raise FileExistsError(
            "`folder` must have no PNGs of another set in its folders; got "
            f"{min(others)}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"images": images, "labels": labels}
    arrays |= _write_pictures(files, images, preprocessing) if files else {}
    arrays |= vars(preprocessing) if preprocessing else {"mean": 0.0, "deviation": 1.0}
    arrays |= {f"claimed_{name}": known.get(name) for name in ("accuracy", "std")}
    arrays |= {"dataset": known.get("dataset")}
    arrays |= _inner_problem(distilled, known, num_classes)
    arrays = {name: x for name, x in arrays.items() if x is not None}
    np.savez(folder / "distilled.npz", class_names=np.array(names), **arrays)


def _write_pictures(
    files: list[Path],
    images: Float[np.ndarray, "n *shape"],
    preprocessing: AbstractPreprocessing | None,
) -> dict[str, float]:
    """Writes one PNG for each image. Returns the values of the levels 0 and 255."""
    with needs("`eqdistill.export` of images", "Pillow", "plot"):
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo
    levels, low, high = _to_levels(images, preprocessing)
    text = PngInfo()
    text.add_text("low", repr(low))
    text.add_text("high", repr(high))
    for file, level in zip(files, levels, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(level).save(file, pnginfo=text)
    return {"low": low, "high": high}


def _to_levels(
    images: Float[np.ndarray, "n *shape"], preprocessing: AbstractPreprocessing | None
) -> tuple[UInt8[np.ndarray, "n *picture"], float, float]:
    """The pictures, and the values of the levels 0 and 255."""
    if preprocessing is not None:
        images = np.asarray(jax.vmap(preprocessing.inverse)(jnp.asarray(images)))
    pictures = to_pictures(images.astype(np.float64))
    low, high = float(pictures.min()), float(pictures.max())
    if low > -1e-6 and high < 1 + 1e-6 and high - low >= 0.5:  # Up to rounding.
        low, high = 0.0, 1.0
    width = high - low or 1.0  # Images may be constant.
    return np.rint(255 * (pictures - low) / width).astype(np.uint8), low, low + width


def _folder_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    if class_names is None:
        # With leading zeros, because loaders sort the folders by name.
        digits = len(str(num_classes - 1))
        class_names = [str(y).zfill(digits) for y in range(num_classes)]
    if not len(class_names) == len(set(class_names)) == num_classes:
        raise ValueError(
            f"`class_names` must have one name for each of the {num_classes} classes, "
            f"all different; got {len(class_names)}."
        )
    for name in class_names:
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(
                "`class_names` must be names of folders that do not begin with a dot; "
                f"got {name!r}."
            )
    return list(class_names)


def _inner_problem(
    distilled: DistilledSet, known: dict[str, Any], num_classes: int
) -> dict[str, Any]:
    """The inner problem as the recipe prepares it, in numbers and words."""
    recipe = known.get("recipe")
    if recipe is not None:
        distilled = recipe.prepare(distilled, num_classes)
    loss, targets, temperature = distilled.loss, np.asarray(distilled.labels), None
    is_soft, term = targets.ndim == 2, type(loss).__name__
    if not is_soft:
        targets = np.eye(num_classes, dtype=distilled.images.dtype)[targets]
    if isinstance(loss, CrossEntropy):
        logarithm = loss.log_temperature
        temperature = 1.0 if logarithm is None else np.exp(np.asarray(logarithm))
        targets = scipy.special.softmax(targets, axis=1) if is_soft else targets
        term = "the cross-entropy of `targets` and the softmax of outputs / temperature"
    if isinstance(loss, SquaredError):
        targets = np.asarray(loss.targets(distilled.labels, num_classes))
        term = "half the squared distance of the outputs from `targets`"
    words = (
        f"Minimise the mean over the images of {term}, plus l2 / 2 times the sum of "
        "the squares of the weights, but not of an intercept. The predicted class is "
        "that of the largest output."
    )
    if recipe is not None and recipe.name != "custom":
        # The first paragraph of its docstring says what a published recipe does.
        doc = getattr(recipes, recipe.name).__doc__.split("\n\n")[0]
        words = re.sub(r"\[`([\w.]+)`\]\[\]", r"\1", doc)
    words = f"{words} {known.get('recipe_description') or ''}"
    return {
        "targets": targets,
        "loss": type(loss).__name__,
        "temperature": temperature,
        "l2": np.asarray(distilled.l2),
        "recipe": " ".join(words.split()),
    }
