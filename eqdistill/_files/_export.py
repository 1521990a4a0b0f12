import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special

from .._data._distilled_set import DistilledSet
from .._data._pictures import to_pictures
from .._losses import CrossEntropy


def export(folder: str | os.PathLike, distilled: DistilledSet) -> None:
    r"""Exports a distilled set for people outside JAX: one PNG for each image, and a
    file `export.json` that tells how to read them.

    Distilled images have pixels of either sign, and PNGs do not. All images share one
    linear scale, on which mid-grey is zero: a pixel of value $v$ is stored as the level
    $\mathrm{round}(v / s) + z$. It is recovered as $s (\mathrm{level} - z)$, to within
    $s / 2$. Grey images have 16 bits ($z$ = 32768) and colour images 8
    ($z$ = 128). For exact values use [`eqdistill.save`][].

    `export.json` holds

    - `bits`, `scale` ($s$) and `zero` ($z$);
    - `shape`, the shape of an image as it was before axes of size 1 were dropped and
        colours put last;
    - `l2`, the ridge $\lambda$, and `loss`, the name of the loss;
    - `images`, for each image its `file` and its `label`; or for labels in floating
        point the `probabilities` of the classes, with cross-entropy, or the `targets`.

    Needs Pillow, of `eqdistill[plot]`.

    **Arguments:**

    - `folder`: where to write. It is made if it does not exist; files of the same
        names in it are overwritten.
    - `distilled`: a distilled set of grey images, of shape `(height, width)` but for
        axes of size 1, or of colour images, of shape `(height, width, 3)` or
        `(3, height, width)`.

    **Raises:**

    - A `ValueError` for images of any other shape, or that are not finite.
    - An `ImportError` without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as e:
        raise ImportError(
            "`eqdistill.export` needs Pillow: pip install 'eqdistill[plot]'."
        ) from e
    images = np.asarray(distilled.images, np.float64)
    if not np.isfinite(images).all():
        raise ValueError(
            "`distilled` must have finite images; some pixels are NaN or infinite."
        )
    shape = images.shape[1:]
    pictures = to_pictures(images)
    bits = 16 if pictures.ndim == 3 else 8
    zero = 2 ** (bits - 1)
    # Not zero, if all of the pixels are.
    limit = max(float(np.abs(pictures).max()), float(np.finfo(np.float32).tiny))
    scale = limit / (zero - 1)
    levels = (np.rint(pictures / scale) + zero).astype(f"uint{bits}")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(levels) - 1))
    entries = []
    for i, (picture, label) in enumerate(zip(levels, _labels(distilled), strict=True)):
        file = f"{i:0{digits}}.png"
        Image.fromarray(picture).save(folder / file)
        entries.append({"file": file, **label})
    description = {
        "bits": bits,
        "scale": scale,
        "zero": zero,
        "value": "scale * (level - zero)",
        "shape": shape,
        "l2": math.exp(float(distilled.log_l2)),
        "loss": type(distilled.loss).__name__,
        "images": entries,
    }
    text = json.dumps(description, indent=2, allow_nan=False)
    (folder / "export.json").write_text(text + "\n", encoding="utf-8")


def _labels(distilled: DistilledSet) -> list[dict[str, Any]]:
    if distilled.labels.ndim == 1:
        return [{"label": label} for label in np.asarray(distilled.labels).tolist()]
    labels = np.asarray(distilled.labels, np.float64)
    if isinstance(distilled.loss, CrossEntropy):
        rows = scipy.special.softmax(labels, axis=1).tolist()
        return [{"probabilities": row} for row in rows]
    return [{"targets": row} for row in labels.tolist()]
