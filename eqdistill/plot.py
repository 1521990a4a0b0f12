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

from ._checks import check_at_least, needs
from ._data._distilled_set import DistilledSet
from ._data._pictures import to_pictures
from ._losses import BinaryCrossEntropy, CrossEntropy
from ._outer._distillation import History
from ._typechecking import describe


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def images(
    distilled: DistilledSet, *, columns: int | None = None, ax: "Axes | None" = None
) -> "Figure":
    r"""Draws the images of a distilled set on a common scale.

    Grey images have a symmetric scale: positive is black, negative is white, and zero
    is mid-grey. Colour images are mapped by $(v - v_\min) / (v_\max - v_\min)$, where
    the minimum and the maximum are over all images and channels.

    Up to 50 images are drawn with their labels as titles: classes, by name if the set
    has `class_names`; the most likely class of soft labels, with its probability; the
    classes above one half, for [`eqdistill.BinaryCrossEntropy`][]; or targets, as
    numbers if there are one or two, and otherwise as the column of the largest one.
    More images, or any number if `ax` is given, are drawn as a mosaic, with the images
    of each class side by side and the class on the left. Examples without a class form
    one block.

    **Arguments:**

    - `distilled`: a distilled set of grey images of shape `(height, width)`, apart from
        axes of size 1, or of colour images of shape `(3, height, width)` or
        `(height, width, 3)`.
    - `columns`: the largest number of images in a row. Defaults to 5, or to 50 in a
        mosaic.
    - `ax`: the axes to draw into. Defaults to a new figure, which has a colour bar for
        grey images.

    **Returns:** the figure.
    """
    check_at_least(1, columns=columns)
    pictures = to_pictures(np.asarray(distilled.images, np.float32))
    labels, names = np.asarray(distilled.labels), distilled.class_names
    classes = labels if labels.ndim == 1 else labels.argmax(axis=1)
    titles, has_classes = [_name(class_, names) for class_ in classes], True
    is_binary = isinstance(distilled.loss, BinaryCrossEntropy)
    if labels.ndim == 2 and isinstance(distilled.loss, CrossEntropy):
        most = scipy.special.softmax(labels, axis=1).max(axis=1)
        titles = [f"{a} ({b:.0%})" for a, b in zip(titles, most, strict=True)]
    elif labels.ndim == 2 and (is_binary or labels.shape[1] <= 2):
        classes, has_classes = np.zeros(len(labels), int), False
        has = lambda row: [_name(int(y), names) for y in np.flatnonzero(row > 0.5)]
        titles = [
            ", ".join(has(row) if is_binary else [f"{y:.3g}" for y in row])
            for row in labels
        ]
    tiny = np.finfo(np.float32).tiny  # Avoids 0 / 0 if all pixels are equal.
    limit, scale = max(float(np.abs(pictures).max()), tiny), {}
    if pictures.ndim == 4:
        pictures = pictures - pictures.min()
        pictures = pictures / max(float(pictures.max()), tiny)
    else:
        scale = {"cmap": "gray_r", "vmin": -limit, "vmax": limit}
    if ax is None and len(pictures) <= 50:
        return _with_titles(pictures, titles, columns or 5, scale)
    canvas, texts = _mosaic(pictures, classes, names, columns or 50)
    panel: Any = ax
    if ax is None:
        height, width = canvas.shape[:2]
        # A quarter of an inch per image, but at most 16 inches in all; and at least one
        # dot per pixel, up to 600 dpi.
        inches = min(0.25 / pictures.shape[2], 16 / max(height, width))
        size = inches * width + (0.6 if scale else 0), max(inches * height, 1.0)
        panel = _figure(*size, dpi=min(max(200, round(1 / inches)), 600)).subplots()
    figure = _figure_of(panel)
    for x, y, text in texts if has_classes else ():
        panel.text(x, y, text, fontsize=8, ha="right", va="center")
    panel.imshow(canvas, **scale)
    panel.set_axis_off()
    return figure if ax is not None else _with_bar(figure, scale)


def _with_titles(
    pictures: np.ndarray, titles: list[str], columns: int, scale: dict
) -> "Figure":
    """Draws each picture in its own axes."""
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = _figure(1.2 * columns + (0.6 if scale else 0), 1.35 * rows)
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True), 1):
        axis = figure.add_subplot(rows, columns, i)
        axis.imshow(picture, **scale)
        axis.set_title(title, fontsize=9, pad=3)
        axis.set_axis_off()
    return _with_bar(figure, scale)


def _mosaic(
    pictures: np.ndarray,
    classes: np.ndarray,
    names: tuple[str, ...] | None,
    columns: int,
) -> tuple[np.ndarray, list[tuple]]:
    """All pictures as one, because Matplotlib takes seconds for many axes; and the
    classes with their coordinates."""
    _, height, width, *channels = pictures.shape
    members = {int(c): np.flatnonzero(classes == c) for c in np.unique(classes)}
    most = max(len(indices) for indices in members.values())
    columns = min(columns, most)
    gap = math.ceil(width / 14)
    # A class with more images than columns has several rows, and a gap below them.
    rows = math.ceil(most / columns)
    class_height = rows * (height + gap) + (height // 4 if rows > 1 else 0)
    # One column is reserved for every four characters of the label.
    label_columns = math.ceil(max(len(_name(c, names)) for c in members) / 4)
    class_width = (columns + label_columns) * (width + gap)
    # Blocks of classes stand side by side, so that the mosaic is about square.
    beside = math.ceil(math.sqrt(len(members) * class_height / class_width))
    beside = min(beside, len(members))
    below = math.ceil(len(members) / beside)
    shape = (below * class_height, beside * class_width, *channels)
    # Empty space is white: NaN for a colour map, 1 for RGB.
    canvas = np.full(shape, 1 if channels else np.nan, np.float32)
    texts = []
    for i, (class_, indices) in enumerate(members.items()):
        top = i % below * class_height
        left = i // below * class_width + label_columns * (width + gap)
        for j, index in enumerate(indices):
            y = top + j // columns * (height + gap)
            x = left + j % columns * (width + gap)
            canvas[y : y + height, x : x + width] = pictures[index]
        texts.append((left - 2 * gap, top + height / 2, _name(class_, names)))
    return canvas, texts


def _name(class_: int, names: tuple[str, ...] | None) -> str:
    return str(class_) if names is None else names[class_]


def _with_bar(figure: "Figure", scale: dict) -> "Figure":
    if scale:  # Only grey images have one.
        fraction, pad = 0.2 / figure.get_figwidth(), 0.13 / figure.get_figwidth()
        axes = figure.axes
        bar = figure.colorbar(axes[0].images[0], ax=axes, fraction=fraction, pad=pad)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_linewidth(0.5)
    return figure


def history(
    history: History, *, ax: "Sequence[Axes] | np.ndarray | None" = None
) -> "Figure":
    """Draws the outer loss on the left, and the norm of its gradient and all metrics on
    the right, against the step.

    For more than 500 steps, pale lines show the noisy values of each step, and dark
    lines the medians over each hundredth of the run.

    **Arguments:**

    - `history`: the `history` of the result of [`eqdistill.distill`][].
    - `ax`: the two axes to draw into. Defaults to a new figure.
    """
    axes = _figure(7.0, 2.6).subplots(1, 2) if ax is None else ax
    axes = np.ravel(np.asarray(axes, object))
    if len(axes) != 2:
        raise ValueError(f"`ax` must be two Matplotlib `Axes`; got {len(axes)}.")
    (left, right), (figure, _) = axes, map(_figure_of, axes)
    _draw_series(left, history.loss, "black", None)
    left.set_ylabel("outer loss")
    right.set_yscale("log")
    _draw_series(right, history.gradient_norm, "black", "gradient norm")
    for i, (name, values) in enumerate(history.metrics.items(), 1):
        _draw_series(right, values, f"C{i}", name.replace("_", " "))
    # Above the axes, where no line can be.
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    right.legend(frameon=False, fontsize=8, ncols=2, **place)
    for axis in axes:
        axis.set_xlabel("outer step")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_series(axis: "Axes", values: np.ndarray, color: str, label: str | None):
    if len(values) <= 500:
        axis.plot(values, color=color, label=label)
        return
    axis.plot(values, color=color, alpha=0.25, linewidth=0.4)
    hundredths = np.array_split(np.arange(len(values)), 100)
    medians = [np.median(values[steps]) for steps in hundredths]
    axis.plot([*map(np.mean, hundredths)], medians, color=color, label=label)


def _figure(width: float, height: float, dpi: int = 200) -> "Figure":
    with needs("`eqdistill.plot`", "Matplotlib", "plot"):
        from ._data._shown_figure import ShownFigure
    return ShownFigure(figsize=(width, height), dpi=dpi, layout="constrained")


def _figure_of(ax: Any) -> "Figure":
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise TypeError(f"`ax` must be Matplotlib `Axes`; got {describe(ax)}.")
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure
