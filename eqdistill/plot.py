"""Pictures of distilled sets and of their training. Needs `eqdistill[plot]`.

Each function returns a `matplotlib.figure.Figure`, and touches no global state of
Matplotlib: save it by `figure.savefig("name.png")`.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import scipy.special

from ._data._distilled_set import DistilledSet
from ._losses import CrossEntropy
from ._outer._distillation import History


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def images(distilled: DistilledSet, *, columns: int = 5) -> "Figure":
    """Draws the images of a distilled set on a symmetric grey scale, which they share:
    ink is positive, white is negative, and mid-grey is zero.

    **Arguments:**

    - `distilled`: a distilled set of grey images, of shape `(height, width)` but for
        axes of size 1.
    - `columns`: the most images in a row. (Keyword only argument.)

    **Returns:**

    A figure, each image under its label: for soft labels, under the most likely class
    and its probability.

    **Raises:**

    A `ValueError` if the images are not grey.
    """
    pixels = [np.squeeze(np.asarray(image)) for image in distilled.images]
    if pixels[0].ndim != 2:
        raise ValueError(
            "`distilled` must have images of shape (height, width), but for axes of "
            f"size 1; got {distilled.images.shape[1:]}."
        )
    columns = min(columns, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    limit = max(float(np.abs(distilled.images).max()), np.finfo(np.float32).tiny)
    figure = _figure(1.2 * columns + 0.6, 1.35 * rows)
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axis, image, title in zip(axes, pixels, _titles(distilled), strict=False):
        axis.imshow(image, cmap="gray_r", vmin=-limit, vmax=limit)
        axis.set_title(title, fontsize=9, pad=3)
    for axis in axes:
        axis.set_axis_off()
    bar = figure.colorbar(axes[0].images[0], ax=axes, fraction=0.03, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.5)
    return figure


def history(history: History) -> "Figure":
    """Draws the outer loss, and the norms of the hypergradient and of the inner
    residual, against the step.

    **Arguments:**

    - `history`: the `history` of a [`eqdistill.Distillation`][].

    **Returns:**

    A figure of two panels.
    """
    figure = _figure(7.0, 2.6)
    left, right = figure.subplots(1, 2)
    left.plot(history.loss, color="black")
    left.set_ylabel("outer loss (nats per image)")
    right.semilogy(history.gradient_norm, color="black", label="hypergradient")
    right.semilogy(history.inner_residual, color="tab:orange", label="inner residual")
    right.set_ylabel("norm")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("outer step")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(
            "`eqdistill.plot` needs Matplotlib: pip install 'eqdistill[plot]'."
        ) from e
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def _titles(distilled: DistilledSet) -> list[str]:
    labels = np.asarray(distilled.labels)
    if labels.ndim == 1:
        return [str(label) for label in labels]
    if not isinstance(distilled.loss, CrossEntropy):
        return [str(row.argmax()) for row in labels]
    probabilities = scipy.special.softmax(labels, axis=1)
    return [f"{p.argmax()} ({p.max():.0%})" for p in probabilities]
