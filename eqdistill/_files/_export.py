import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Float, UInt8

from .._checks import needs
from .._data._class_names import count_classes
from .._data._distilled_set import DistilledSet
from .._data._pictures import are_pictures, to_pictures
from .._data._preprocessing import AbstractPreprocessing
from .._losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from ._artifact import Artifact


def export(
    folder: str | os.PathLike,
    distilled: DistilledSet | Artifact,
) -> None:
    r"""Exports a distilled set for use outside JAX: a file `distilled.npz` with the
    exact numbers and the recipe in words; a `README.txt`, which explains how to use
    them; and, if the set has images, a PNG of each, in one folder for each class.
    [Other frameworks](../how-to/elsewhere.md) shows how to retrain.

    The PNGs are greyscale or colour, with 8 bits per channel, in the units of the real
    images, from 0 to 1: the preprocessing of an artifact is undone. A level $k$ stands
    for

    $$a + (b - a) \, k / 255,$$

    to within $(b - a) / 510$. If all pixels are in [0, 1] and span at least half of it,
    then $a = 0$ and $b = 1$. Otherwise $a$ is the smallest and $b$ the largest value of
    all images. Each PNG stores `low` ($a$) and `high` ($b$) as text.

    `numpy.load` reads `distilled.npz`, which holds these arrays:

    - `images`: the exact distilled images, in the units in which they were learned;
    - `labels`: the class index of each image, or the index of its largest soft label.
        Absent for other targets;
    - `targets`: shape `(n, c)`. The class probabilities for cross-entropy, or the
        targets of the other losses;
    - `loss`: `"CrossEntropy"` with its `temperature`, `"BinaryCrossEntropy"` or
        `"SquaredError"`;
    - `weights`: the weight of each image, with a mean of one. Absent if all are one;
    - `l2`: the ridge, or the weight decay of the recipe;
    - `low`, `high`: $a$ and $b$, if there are PNGs;
    - `mean`, `deviation`: real images $x$ from 0 to 1, or the rows of a table, become
        $(x - \mathrm{mean}) / \mathrm{deviation}$ in the units of `images`. For an
        [`eqdistill.datasets.ZCA`][], `mean` and `whitening`;
    - `class_names`: the name of each class, which is also the name of its folder. By
        default, the class index;
    - `recipe`: how a model is trained, in words;
    - if the artifact has them: `dataset`, and for its claim, `claimed_metric` (such as
        `"accuracy"`), `claimed_score` and `claimed_std`.

    Targets of [`eqdistill.BinaryCrossEntropy`][] and of a regression have no class:
    all PNGs are in the folder `images`. Targets of the squared error are treated
    as class targets if the set has `class_names`, or if the artifact claims an accuracy
    or names a dataset.

    PNGs need Pillow, which `eqdistill[plot]` installs.

    **Arguments:**

    - `folder`: the folder to write to. It is created if necessary, and files with
        the same names are replaced.
    - `distilled`: a distilled set, or the result of [`eqdistill.load`][], which has the
        recipe, the score and the preprocessing too. Images are written as PNGs if
        their shape, apart from axes of size 1, is `(height, width)`; or, in colour,
        `(height, width, 3)` or `(3, height, width)`. Arrays of any other shape, such as
        the rows of a table, are only in `distilled.npz`. The `class_names` of the set,
        if there are any, must be valid folder names.

    **Raises:** a `FileExistsError` if the folders in `folder` contain other PNGs, which
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
    num_classes = count_classes(labels, distilled.class_names)
    metric, is_soft = known.get("metric"), labels.ndim == 2
    has_classes = not is_soft or metric == "accuracy"
    if is_soft and metric is None:
        has_classes = isinstance(distilled.loss, CrossEntropy)
        if isinstance(distilled.loss, SquaredError):
            is_named = bool(distilled.class_names) and num_classes > 1
            has_classes = is_named or bool(known.get("dataset"))
    if is_soft:
        labels = labels.argmax(axis=1) if has_classes else None
    names = _class_names(distilled.class_names, num_classes)

    folder = Path(folder)
    digits, files = len(str(len(images) - 1)), []
    if are_pictures(images.shape[1:]):
        places = len(images) * ["images"]
        if labels is not None:
            places = [names[y] for y in labels]
            _check_folders(names)
        files = [folder / name / f"{i:0{digits}}.png" for i, name in enumerate(places)]
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
    arrays |= {
        f"claimed_{name}": known.get(name) for name in ("metric", "score", "std")
    }
    arrays |= {"dataset": known.get("dataset")}
    if has_classes or distilled.class_names:
        arrays |= {"class_names": np.array(names)}
    arrays |= _inner_problem(distilled, known, num_classes)
    if has_classes:
        arrays["recipe"] += " The predicted class is that of the largest output."
    arrays = {name: x for name, x in arrays.items() if x is not None}
    np.savez(folder / "distilled.npz", **arrays)
    text = _read_me(arrays, known.get("num_models", 0))
    (folder / "README.txt").write_text(text, encoding="utf-8")


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


def _class_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    if class_names is None:
        # With leading zeros, because loaders sort the folders by name.
        digits = len(str(num_classes - 1))
        class_names = [str(y).zfill(digits) for y in range(num_classes)]
    return list(class_names)


def _check_folders(names: Sequence[str]) -> None:
    for name in names:
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(
                "`distilled` must have class names that are valid folder names and do "
                f"not begin with a dot; got {name!r}."
            )


def _inner_problem(
    distilled: DistilledSet, known: dict[str, Any], num_classes: int
) -> dict[str, Any]:
    """The inner problem as the recipe prepares it, in numbers and words."""
    prepare = known.get("prepare")
    if prepare is not None:
        distilled = prepare(distilled, num_classes)
    loss, targets, temperature = distilled.loss, np.asarray(distilled.labels), None
    is_soft, term = targets.ndim == 2, type(loss).__name__
    if not is_soft:
        targets = np.eye(num_classes, dtype=distilled.images.dtype)[targets]
    if isinstance(loss, CrossEntropy):
        logarithm = loss.log_temperature
        temperature = 1.0 if logarithm is None else np.exp(np.asarray(logarithm))
        targets = scipy.special.softmax(targets, axis=1) if is_soft else targets
        divided = "" if temperature == 1 else f" / {temperature:.6g}"
        term = f"the cross-entropy of `targets` and the softmax of the outputs{divided}"
    if isinstance(loss, BinaryCrossEntropy):
        term = (
            "the sum over the columns of `targets` of their cross-entropy with the "
            "logistic function of the outputs"
        )
    if isinstance(loss, SquaredError):
        targets = np.asarray(loss.targets(distilled.labels, num_classes))
        term = "half the squared distance of the outputs from `targets`"
    description = known.get("recipe_description") or ""
    l2, weights = float(distilled.l2), distilled.weights
    if weights is not None:  # Learned weights may have a different mean.
        scale = float(jnp.mean(weights))
        weights, l2 = np.asarray(weights) / scale, l2 / scale
    mean = "mean" if weights is None else "mean, weighted by `weights`,"
    words = (
        f"Minimise the {mean} over the images of {term}, plus l2 / 2 times the sum of "
        f"the squares of the weights, excluding any intercept. l2 is {l2:.6g}."
    )
    if description and not description.startswith("Recipe("):
        # Published recipes may have several stages.
        words = f"The loss is the {mean} over the images of {term}. l2 is {l2:.6g}."
    if description and prepare is None:
        words += " `prepare` of the recipe may change the loss, the targets and l2."
    if description:
        words += f" {description.rstrip('.')}."
    return {
        "targets": targets,
        "loss": type(loss).__name__,
        "temperature": temperature,
        "l2": np.asarray(l2, distilled.images.dtype),
        "weights": weights,
        "recipe": words,
    }


def _read_me(arrays: dict[str, Any], num_models: int) -> str:
    """What `distilled.npz` and the PNGs are, and how to use them."""
    n, *shape = arrays["images"].shape
    has_pictures = "low" in arrays
    real = "a real image with values from 0 to 1" if has_pictures else "a real row"
    units = f"`images` are in the units of {real}."
    if "whitening" in arrays:
        units = (
            "`images` are in the units of whitening @ (x - mean), for the vector x of "
            f"{real}. To undo it, solve for x."
        )
    elif not {"mean", "deviation"} <= {*arrays}:
        units = "`images` are in the units of a custom preprocessing step."
    elif np.ndim(arrays["mean"]):
        units = (
            "`images` are in the units of z = (x - mean) / deviation, where x is "
            f"{real}. To undo it: x = mean + deviation * z."
        )
        if np.size(arrays["mean"]) <= 3:
            mean, deviation = (np.ravel(arrays[x]) for x in ("mean", "deviation"))
            units += f" The mean is {mean}, the deviation {deviation}."
    pictures = ""
    if has_pictures:
        low, high = arrays["low"], arrays["high"]
        pictures = (
            "PNGs: the PNG of row i has the number i. A level k from 0 to 255 stands "
            f"for {low:.6g} + {high - low:.6g} * k / 255, where real images are from 0 "
            "to 1."
        )
    order = ""
    if "labels" in arrays:
        order = " Class indices are in the order of `class_names`"
        order += ", and each class has a folder." if has_pictures else "."
    expect = "Nothing is claimed."
    if num_models:
        show = "{:.2%}" if arrays["claimed_metric"] == "accuracy" else "{:.4g}"
        std = f" ± {show.format(arrays['claimed_std'])}" if num_models > 1 else ""
        expect = (
            f"{arrays['claimed_metric']} on the test split: "
            f"{show.format(arrays['claimed_score'])}{std} ({num_models} "
            f"model{'s' * (num_models > 1)})."
        )
    lines = (
        f"A distilled set of {n} images of shape {tuple(shape)}, from the dataset "
        f"{arrays.get('dataset', '(no name)')}. Read distilled.npz with numpy.load.",
        f"Training: {arrays['recipe']}",
        f"Units: {units}",
        pictures,
        "Order: row i of `labels` and row i of `targets` belong to row i of `images`."
        f"{order}",
        f"Expect: {expect}",
    )
    return "".join(f"{textwrap.fill(line, 80)}\n" for line in lines if line)
