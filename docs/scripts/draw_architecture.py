"""Draws the architecture of the package from the imports in its code.

An arrow leads from each part to the parts that it imports from, unless other arrows
lead there too. Writes `docs/images/architecture.png`. Fails if a part imports from a
part below it, or the inner solvers from the networks. Run it as
`python docs/scripts/draw_architecture.py`.
"""

import ast
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "eqdistill"
PUBLIC = "the public face"
# From the top: each part may import only from parts above it. With the left edge, the
# right edge, the bottom and the top of its box, and what is in it.
PARTS = {
    "the basics": (0, 10, 0, 1.2, "linear models, losses, checks, devices"),
    "_nn": (7.1, 10, -6.1, -0.7, "convolutions that are fast on a CPU, networks"),
    "_data": (0, 6.9, -2.1, -0.7, "real and distilled sets, augmentation, readers"),
    "_inner": (0, 6.9, -4.1, -2.7, "inner solvers and their derivatives"),
    "_models": (0, 6.9, -6.1, -4.7, "sources of models: fixed, fresh, pool"),
    "_outer": (
        *(0, 10, -8.1, -6.7),
        "objectives, data in a step, loop, callbacks, evaluation, recipes",
    ),
    "_files": (0, 10, -10.1, -8.7, "saved sets, exports, checkpoints"),
    PUBLIC: (0, 10, -12.1, -10.7, ""),
}
PUBLIC_MODULES = (
    *("nn", "augment", "datasets", "recipes", "plot", "linear", "adjoints"),
    "__main__",
)
FORBIDDEN = {("_inner", "_nn")}


def part_of(file: Path) -> str:
    """The folder of a file or module; or the group of a module beside the folders."""
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if first in PARTS:
        return first
    return first if first in PUBLIC_MODULES else "the basics"


def imports(file: Path) -> set[str]:
    """The parts, and the public modules, that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = file.parents[node.level - 1]
            parts = node.module.split(".") if node.module else []
            names = [base.joinpath(*parts, alias.name) for alias in node.names]
            names = names if not parts else [base.joinpath(*parts)]
            found |= {part_of(name) for name in names}
    return found


def survey() -> tuple[dict[str, int], set[tuple[str, str]]]:
    """The number of modules in each part, and the arrows between parts. An import from
    a public module counts as an import from the parts that this module imports from."""
    behind = {name: imports(PACKAGE / f"{name}.py") for name in PUBLIC_MODULES}
    num_modules, arrows = dict.fromkeys(PARTS, 0), set()
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name == "__init__.py":
            continue
        part = part_of(file)
        part = PUBLIC if part in behind else part
        num_modules[part] += 1
        for other in imports(file):
            arrows |= {(part, x) for x in behind.get(other, {other})}
    return num_modules, {(a, b) for a, b in arrows if a != b and b in PARTS}


def check(num_modules: dict[str, int], arrows: set[tuple[str, str]]) -> None:
    floors = list(PARTS)
    empty = [part for part, num in num_modules.items() if num == 0]
    if empty:
        raise SystemExit(f"Without any module: {', '.join(empty)}.")
    for part, other in sorted(arrows):
        is_below = floors.index(other) > floors.index(part)
        if is_below or (part, other) in FORBIDDEN:
            raise SystemExit(f"`{part}` must not import from `{other}`.")


def reduced(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows without those that a path of other arrows replaces."""

    def reaches(part: str, other: str) -> bool:
        after = {b for a, b in arrows if a == part}
        return other in after or any(reaches(b, other) for b in after)

    return {
        (part, other)
        for part, other in arrows
        if not any(reaches(b, other) for a, b in arrows if a == part)
    }


def draw_boxes(axis: Axes, num_modules: dict[str, int]) -> None:
    for part, (left, right, bottom, top, words) in PARTS.items():
        style = {"facecolor": "0.96", "edgecolor": "0.35", "linewidth": 0.8}
        size = right - left, top - bottom
        axis.add_patch(Rectangle((left, bottom), *size, zorder=2, **style))
        title = f"{part}  ({num_modules[part]} modules)"
        if part == PUBLIC:
            words = "   ".join(PUBLIC_MODULES)
        text = textwrap.fill(words, 24 if size[0] < 4 else 80)
        centre, middle = (left + right) / 2, (bottom + top) / 2
        axis.text(centre, middle + 0.06, title, ha="center", va="bottom", fontsize=10)
        axis.text(
            *(centre, middle - 0.1, text),
            ha="center",
            va="top",
            fontsize=9,
            color="0.3",
        )


def draw_arrows(axis: Axes, arrows: set[tuple[str, str]]) -> None:
    """Vertical arrows, at the middle of the narrower box."""
    style = {"arrowstyle": "-|>", "color": "0.4", "shrinkA": 0, "shrinkB": 0}
    for part, other in sorted(arrows):
        boxes = PARTS[part][:4], PARTS[other][:4]
        left, right, _, _ = min(boxes, key=lambda box: box[1] - box[0])
        middle = (left + right) / 2
        ends = (middle, PARTS[other][2]), (middle, PARTS[part][3])
        axis.annotate("", *ends, arrowprops=style, zorder=1)


def main() -> None:
    num_modules, arrows = survey()
    check(num_modules, arrows)
    # As wide as a page of the documentation: fonts are shown in their true size.
    figure = Figure(figsize=(7.4, 5.8), dpi=200)
    axis = figure.add_axes((0, 0, 1, 1))
    draw_arrows(axis, reduced(arrows))
    draw_boxes(axis, num_modules)
    axis.set_xlim(-0.1, 10.1)
    axis.set_ylim(-12.2, 1.3)
    axis.set_axis_off()
    file = ROOT / "docs" / "images" / "architecture.png"
    figure.savefig(file)
    print(f"{sum(num_modules.values())} modules: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
