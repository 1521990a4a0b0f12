"""Imports Matplotlib, which `eqdistill` itself does without."""

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that a notebook shows as the value of a cell, without `pyplot`."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = io.BytesIO()
        self.savefig(file, format="png")
        # In the size that a figure of 100 dots an inch has, whatever its resolution.
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}
