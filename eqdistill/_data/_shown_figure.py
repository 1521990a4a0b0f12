"""In its own module, so that `eqdistill` can be imported without Matplotlib."""

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that notebooks display as the value of a cell, without `pyplot`."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = io.BytesIO()
        self.savefig(file, format="png")
        # Display at 100 dots per inch, whatever the resolution of the file.
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}
