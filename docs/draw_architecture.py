"""Draws the architecture of the package from the imports in its code.

A room is a folder, or a module beside the folders. An arrow leads to each room that it
imports from, except where other arrows lead there too. Writes
`docs/images/architecture.png`. Fails if a room imports from one on a floor below it.
Run it by `python docs/draw_architecture.py`.
"""

import ast
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "eqdistill"
# From the top: a room may import only from rooms above it.
FLOORS = [
    (
        "what all need",
        [
            "_typechecking",
            "_conversions",
            "_error",
            "_classifier",
            "_losses",
            "_softmax",
            "_checks",
        ],
    ),
    ("networks", ["_nn"]),
    ("real data and distilled sets", ["_data"]),
    ("the inner problem", ["_inner"]),
    ("the outer problem", ["_outer"]),
    ("files", ["_files"]),
    ("the public face", ["datasets", "nn", "recipes", "plot", "__main__"]),
]
# The most letters in a line of the names of modules.
MOST_LETTERS = 130


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = file.parents[node.level - 1]
            parts = node.module.split(".") if node.module else []
            names = [base.joinpath(*parts, alias.name) for alias in node.names]
            names = names if not parts else [base.joinpath(*parts)]
            found |= {room_of(name) for name in names}
    return found


def survey() -> tuple[dict[str, list[str]], set[tuple[str, str]]]:
    """The modules in each room, and the arrows between rooms."""
    modules, arrows = {}, set()
    for file in sorted(PACKAGE.rglob("*.py")):
        room = room_of(file)
        if file.name == "__init__.py":
            continue
        modules.setdefault(room, []).append(file.stem)
        arrows |= {(room, other) for other in imports(file) if other != room}
    return modules, arrows


def check(modules: dict[str, list[str]], arrows: set[tuple[str, str]]) -> None:
    floor = {room: i for i, (_, rooms) in enumerate(FLOORS) for room in rooms}
    missing = set(modules) - set(floor)
    if missing:
        raise SystemExit(f"Not on any floor: {', '.join(sorted(missing))}.")
    for room, other in sorted(arrows):
        if floor[other] > floor[room]:
            raise SystemExit(f"`{room}` imports from `{other}`, which is below it.")


def place() -> dict[str, tuple[float, float, float, float]]:
    """The left edge, the bottom, the width and the height of each room."""
    places, bottom = {}, 0.0
    for _, rooms in FLOORS:
        height = 1.0 if len(rooms) > 1 else 1.7
        bottom -= height + 0.75
        width = 12.0 / len(rooms)
        for i, room in enumerate(rooms):
            places[room] = (i * width + 0.08, bottom, width - 0.16, height)
    return places


def in_lines(names: list[str]) -> str:
    """The names in at least two lines of about the same length, none too long."""
    total = sum(len(name) + 3 for name in names)
    longest = total / max(2, math.ceil(total / MOST_LETTERS))
    lines, length = [[]], 0
    for name in names:
        # A name is in the line that holds its middle.
        if (length + len(name) / 2) > longest * len(lines):
            lines.append([])
        lines[-1].append(name)
        length += len(name) + 3
    return "\n".join("   ".join(line) for line in lines)


def draw_rooms(axis: Axes, modules: dict[str, list[str]], places: dict) -> None:
    centred = {"ha": "center", "va": "center", "fontsize": 8}
    for name, rooms in FLOORS:
        _, bottom, _, height = places[rooms[0]]
        axis.text(-0.15, bottom + height / 2, name, ha="right", va="center", fontsize=8)
        for room in rooms:
            left, bottom, width, height = places[room]
            style = {"facecolor": "0.96", "edgecolor": "0.35", "linewidth": 0.8}
            axis.add_patch(Rectangle((left, bottom), width, height, zorder=2, **style))
            middle = left + width / 2
            if modules[room] == [room]:
                axis.text(middle, bottom + height / 2, room, **centred)
                continue
            axis.text(middle, bottom + height - 0.3, room, **centred)
            names = [name.removeprefix("_") for name in modules[room]]
            text = in_lines(names)
            style = {**centred, "fontsize": 6.5, "color": "0.3", "linespacing": 1.4}
            axis.text(middle, bottom + (height - 0.4) / 2, text, **style)


def draw_arrows(axis: Axes, arrows: set[tuple[str, str]], places: dict) -> None:
    """Vertical arrows, which pass behind the rooms between."""
    style = {"arrowstyle": "-|>", "color": "0.4", "linewidth": 0.8}
    for room, other in sorted(arrows):
        (left, bottom, width, height), target = places[room], places[other]
        if target[1] == bottom:  # On the same floor.
            continue
        # At the middle of the narrower room, over which the other one stands.
        if target[2] < width:
            left, width = target[0], target[2]
        middle = left + width / 2
        ends = (middle, target[1]), (middle, bottom + height)
        arrow = {**style, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", *ends, arrowprops=arrow, zorder=1)


def reduced(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows without those that a path of other arrows makes up for."""

    def reaches(room: str, other: str, length: int) -> bool:
        after = {b for a, b in arrows if a == room}
        return (length > 1 and other in after) or any(
            reaches(b, other, length + 1) for b in after
        )

    return {
        (room, other)
        for room, other in arrows
        if not any(reaches(b, other, 2) for a, b in arrows if a == room)
    }


def main() -> None:
    modules, arrows = survey()
    check(modules, arrows)
    places = place()
    figure = Figure(figsize=(9.0, 6.2), dpi=200, layout="constrained")
    axis = figure.add_subplot()
    draw_arrows(axis, reduced(arrows), places)
    draw_rooms(axis, modules, places)
    axis.set_xlim(-3.0, 12.1)
    axis.set_ylim(min(bottom for _, bottom, _, _ in places.values()) - 0.1, -0.3)
    axis.set_axis_off()
    file = ROOT / "docs" / "images" / "architecture.png"
    figure.savefig(file)
    num_modules = sum(map(len, modules.values()))
    print(f"{num_modules} modules in {len(modules)} rooms: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
