"""Plots of distilled sets and of training runs. Needs `eqdistill[plot]`.

Each function returns a `matplotlib.figure.Figure` without touching Matplotlib's global
state. Save it with `figure.savefig("name.png")`. Jupyter displays it as the value of a
cell. Pass `ax` to draw into your own axes.
"""

import math
from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

import numpy as np
import scipy.special

from ._checks import check_at_least
from ._data._distilled_set import DistilledSet
from ._data._pictures import to_pictures
from ._losses import CrossEntropy
from ._outer._distillation import History


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# More images than this are drawn as a mosaic.
_MAX_WITH_TITLES = 50
# The default number of columns of a mosaic.
_MOSAIC_COLUMNS = 50
# More steps than this are drawn with their medians.
_MAX_STEPS = 500


def images(
    distilled: DistilledSet,
    *,
    columns: int | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    r"""Draws the images of a distilled set on a common scale.

    Grey images have a symmetric scale: positive is black, negative is white, and zero
    is mid-grey. Colour images are mapped by $(v - v_\min) / (v_\max - v_\min)$, where
    the minimum and the maximum are over all images and channels.

    Up to 50 images are drawn with their labels as titles. More images, or any number if
    `ax` is given, are drawn as a mosaic, with the images of each class side by side and
    the class on the left.

    **Arguments:**

    - `distilled`: a distilled set of grey images of shape `(height, width)`, up to axes
        of size 1, or of colour images of shape `(3, height, width)` or
        `(height, width, 3)`.
    - `columns`: the largest number of images in a row. Defaults to 5, or to 50 in a
        mosaic. (Keyword only argument.)
    - `ax`: the axes to draw into. Defaults to a new figure, which has a colour bar for
        grey images. (Keyword only argument.)

    **Returns:**

    The figure. Soft labels are shown as the most likely class, with its probability in
    titles.

    **Raises:**

    A `ValueError` if the images have another shape, or `columns` is not positive. A
    `TypeError` if `ax` is not a Matplotlib `Axes`.
    """
    check_at_least(1, columns=columns)
    pictures = to_pictures(np.asarray(distilled.images, np.float32))
    tiny = np.finfo(np.float32).tiny  # Avoids 0 / 0 if all pixels are equal.
    if pictures.ndim == 4:
        low, high = float(pictures.min()), float(pictures.max())
        pictures = (pictures - low) / max(high - low, tiny)
        scale = {}
    else:
        limit = max(float(np.abs(pictures).max()), tiny)
        scale = {"cmap": "gray_r", "vmin": -limit, "vmax": limit}
    if ax is not None or len(pictures) > _MAX_WITH_TITLES:
        mosaic = _Mosaic(pictures, _classes(distilled), columns or _MOSAIC_COLUMNS)
        if ax is not None:
            _check_ax(ax)
            mosaic.draw(ax, scale)
            return _figure_of(ax)
        return _with_mosaic(mosaic, scale)
    return _with_titles(pictures, _titles(distilled), columns or 5, scale)


def _with_titles(
    pictures: np.ndarray, titles: list[str], columns: int, scale: dict
) -> "Figure":
    """Draws each picture in its own axes."""
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = _figure(1.2 * columns + (0.6 if scale else 0), 1.35 * rows)
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axis, picture, title in zip(axes, pictures, titles, strict=False):
        axis.imshow(picture, **scale)
        axis.set_title(title, fontsize=9, pad=3)
    for axis in axes:
        axis.set_axis_off()
    if scale:
        _add_bar(figure, axes)
    return figure


class _Mosaic:
    """Draws all pictures as one, because Matplotlib takes seconds for many axes."""

    def __init__(self, pictures: np.ndarray, classes: np.ndarray, columns: int):
        _, height, width, *channels = pictures.shape
        members = {int(c): np.flatnonzero(classes == c) for c in np.unique(classes)}
        most = max(len(indices) for indices in members.values())
        columns = min(columns, most)
        gap = math.ceil(width / 14)
        # A class with more images than columns has several rows, and a gap below them.
        rows = math.ceil(most / columns)
        class_height = rows * (height + gap) + (height // 4 if rows > 1 else 0)
        # One column is left for the label.
        class_width = (columns + 1) * (width + gap)
        # Blocks of classes stand side by side until the mosaic is wider than high.
        beside = next(
            k
            for k in range(1, len(members) + 1)
            if k == len(members)
            or math.ceil(len(members) / k) * class_height <= k * class_width
        )
        below = math.ceil(len(members) / beside)
        shape = (below * class_height, beside * class_width)
        # Empty space is white: NaN for a colour map, 1 for RGB.
        self.canvas = np.full(
            (*shape, *channels), 1 if channels else np.nan, np.float32
        )
        self.picture_width = width
        self._labels = []
        for i, (class_, indices) in enumerate(members.items()):
            top = i % below * class_height
            left = i // below * class_width + width + gap
            for j, index in enumerate(indices):
                y = top + j // columns * (height + gap)
                x = left + j % columns * (width + gap)
                self.canvas[y : y + height, x : x + width] = pictures[index]
            self._labels.append((left - 2 * gap, top + height / 2, str(class_)))

    def draw(self, ax: "Axes", scale: dict) -> None:
        for x, y, label in self._labels:
            ax.text(x, y, label, fontsize=8, ha="right", va="center")
        ax.imshow(self.canvas, **scale)
        ax.set_axis_off()


def _with_mosaic(mosaic: _Mosaic, scale: dict) -> "Figure":
    height, width = mosaic.canvas.shape[:2]
    # A quarter of an inch per image, but at most 16 inches in all; and at least one dot
    # per pixel, up to 600 dpi.
    inches = min(0.25, 16 / (max(height, width) / mosaic.picture_width))
    inches /= mosaic.picture_width
    figure = _figure(
        inches * width + (0.6 if scale else 0),
        max(inches * height, 1.0),
        dpi=min(max(200, round(1 / inches)), 600),
    )
    ax = figure.subplots()
    mosaic.draw(ax, scale)
    if scale:
        _add_bar(figure, [ax])
    return figure


def _add_bar(figure: "Figure", axes: Sequence["Axes"]) -> None:
    width = figure.get_figwidth()
    bar = figure.colorbar(
        axes[0].images[0], ax=axes, fraction=0.2 / width, pad=0.13 / width
    )
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.5)


def history(
    history: History, *, ax: "Sequence[Axes] | np.ndarray | None" = None
) -> "Figure":
    """Draws the outer loss on the left, and the norm of its gradient and all metrics on
    the right, against the step.

    For more than 500 steps, pale lines show the noisy values of each step, and dark
    lines the medians over each hundredth of the run.

    **Arguments:**

    - `history`: the `history` of the result of [`eqdistill.distill`][].
    - `ax`: the two axes to draw into. Defaults to a new figure. (Keyword only
        argument.)

    **Returns:**

    The figure, with two panels.

    **Raises:**

    A `ValueError` or `TypeError` if `ax` is not two Matplotlib `Axes`.
    """
    if ax is None:
        ax = tuple(_figure(7.0, 2.6).subplots(1, 2))
    else:
        ax = tuple(np.ravel(np.asarray(ax, object)))
        if len(ax) != 2:
            raise ValueError(f"`ax` must be two Matplotlib `Axes`; got {len(ax)}.")
        for axis in ax:
            _check_ax(axis)
    left, right = ax
    _draw_series(left, history.loss, "black", None)
    left.set_ylabel("outer loss")
    right.set_yscale("log")
    _draw_series(right, history.gradient_norm, "black", "gradient norm")
    for i, (name, values) in enumerate(history.metrics.items(), 1):
        _draw_series(right, values, f"C{i}", name.replace("_", " "))
    # Above the axes, where no line can be.
    right.legend(
        frameon=False,
        fontsize=8,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0,
    )
    for axis in (left, right):
        axis.set_xlabel("outer step")
        axis.spines[["top", "right"]].set_visible(False)
    return _figure_of(left)


def _draw_series(axis: "Axes", values: np.ndarray, color: str, label: str | None):
    if len(values) <= _MAX_STEPS:
        axis.plot(values, color=color, label=label)
        return
    axis.plot(values, color=color, alpha=0.25, linewidth=0.4)
    hundredths = np.array_split(np.arange(len(values)), 100)
    middles = [steps.mean() for steps in hundredths]
    medians = [np.median(values[steps]) for steps in hundredths]
    axis.plot(middles, medians, color=color, label=label)


def _figure(width: float, height: float, dpi: int = 200) -> "Figure":
    try:
        from ._data._shown_figure import ShownFigure
    except ImportError as e:
        raise ImportError(
            "`eqdistill.plot` needs Matplotlib: pip install 'eqdistill[plot]'."
        ) from e
    return ShownFigure(figsize=(width, height), dpi=dpi, layout="constrained")


def _check_ax(ax: Any) -> None:
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise TypeError(f"`ax` must be Matplotlib `Axes`; got a {type(ax).__name__}.")


def _figure_of(ax: "Axes") -> "Figure":
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _classes(distilled: DistilledSet) -> np.ndarray:
    """The class of each image, which is the largest entry of soft labels or targets."""
    labels = np.asarray(distilled.labels)
    return labels if labels.ndim == 1 else labels.argmax(axis=1)


def _titles(distilled: DistilledSet) -> list[str]:
    classes = _classes(distilled)
    if distilled.labels.ndim == 1 or not isinstance(distilled.loss, CrossEntropy):
        return [str(class_) for class_ in classes]
    probabilities = scipy.special.softmax(np.asarray(distilled.labels), axis=1)
    return [
        f"{class_} ({row.max():.0%})"
        for class_, row in zip(classes, probabilities, strict=True)
    ]
