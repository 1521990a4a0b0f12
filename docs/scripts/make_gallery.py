"""Makes the gallery of the documentation from the pictures that the examples draw.

`gallery.toml` lists the pictures and the commands that draw them. Pictures in the
folder `output` are copied into `docs/images`, and shrunk if they are large. Then
`docs/results/gallery.md` is written, with all pictures in `docs/images`. Run it as
`python docs/scripts/make_gallery.py`. With `--run` it first runs each command whose
pictures are not in `output`: some take hours.
"""

import argparse
import itertools
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

from PIL import Image


DOCS = Path(__file__).parents[1]
IMAGES = DOCS / "images"
MOST_BYTES = 150_000
PAGE = DOCS / "results" / "gallery.md"
HEAD = """\
# Gallery

Pictures that the examples draw, each above its command. Click on one to enlarge it.
`python docs/scripts/make_gallery.py` writes this page, and with `--run` runs these
commands first.
"""
FIGURE = """\
<figure markdown>
[![{sentence}](../images/{image})](../images/{image})
<figcaption markdown="span">{sentence}<br>`python examples/{command}`</figcaption>
</figure>
"""


class Picture(NamedTuple):
    section: str
    command: str
    folder: str
    file: str
    image: str
    sentence: str


def read() -> list[Picture]:
    table = tomllib.loads((DOCS / "scripts" / "gallery.toml").read_text())
    return [Picture(**entry) for entry in table["picture"]]


def run(picture: Picture, output: Path) -> None:
    name, *arguments = shlex.split(picture.command)
    script = DOCS.parent / "examples" / name
    command = [sys.executable, script, *arguments, "--output", output / picture.folder]
    print(shlex.join(map(str, command)), flush=True)
    subprocess.run(command, check=True)


def shrink(source: Path, target: Path) -> None:
    """Copies a picture: with fewer colours if it has too many bytes, and then with
    fewer pixels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    picture = Image.open(source).convert("RGB")
    width = picture.width
    while target.stat().st_size > MOST_BYTES:
        size = (width, round(picture.height * width / picture.width))
        # Plots and grey images do not need more colours.
        small = picture.resize(size, Image.Resampling.BOX)
        small.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
        width = round(0.9 * width)


def page(pictures: list[Picture]) -> str:
    drawn = [picture for picture in pictures if (IMAGES / picture.image).exists()]
    lines = [HEAD]
    for section, some in itertools.groupby(drawn, key=lambda picture: picture.section):
        figures = (FIGURE.format_map(picture._asdict()) for picture in some)
        grid = '<div class="gallery" markdown>\n', *figures, "</div>\n"
        lines += f"## {section}\n", *grid
    return "\n".join(lines)


def main(output: Path, *, runs: bool) -> None:
    pictures = read()
    for picture in pictures:
        source = output / picture.folder / picture.file
        if runs and not source.exists():
            run(picture, output)
        if source.exists():
            target = IMAGES / picture.image
            shrink(source, target)
            print(f"{target.stat().st_size:7,} bytes  {target.relative_to(DOCS)}")
    PAGE.write_text(page(pictures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "output",
        type=Path,
        nargs="?",
        default=DOCS.parent / "output",
        help="the folder with the folders that the commands draw into",
    )
    parser.add_argument(
        "--run", action="store_true", help="first run the commands without pictures"
    )
    args = parser.parse_args()
    main(args.output.resolve(), runs=args.run)
