"""Makes the gallery of the documentation from the pictures that the examples draw.

`docs/gallery.toml` lists the pictures and the commands that draw them. Pictures in the
folder `output` are copied into `docs/images`, and shrunk if they are large. Then
`docs/gallery.md` is written, with all pictures in `docs/images`. Run it as
`python docs/make_gallery.py`. With `--run` it first runs each command whose pictures
are not in `output`: some take hours.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

from PIL import Image


DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
MOST_BYTES = 150_000
# The longest command on one line.
MOST_LETTERS = 72
HEAD = """\
# Gallery

Pictures that the examples draw, each below its command. `python docs/make_gallery.py`
writes this page, and with `--run` runs these commands first.
"""


class Picture(NamedTuple):
    section: str
    command: str
    folder: str
    file: str
    image: str
    sentence: str

    def full_command(self) -> str:
        parts = f"python examples/{self.command}", f"--output output/{self.folder}"
        fits = sum(map(len, parts)) < MOST_LETTERS
        return (" " if fits else " \\\n    ").join(parts)


def read() -> list[Picture]:
    table = tomllib.loads((DOCS / "gallery.toml").read_text())
    return [Picture(**entry) for entry in table["picture"]]


def run(picture: Picture, output: Path) -> None:
    name, *arguments = shlex.split(picture.command)
    script = DOCS.parent / "examples" / name
    command = [sys.executable, script, *arguments, "--output", output / picture.folder]
    print(picture.full_command(), flush=True)
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
    lines, section, command = [HEAD], None, None
    for picture in pictures:
        if not (IMAGES / picture.image).exists():
            continue
        if picture.section != section:
            lines.append(f"## {picture.section}\n")
        if picture.full_command() != command:
            lines.append(f"```bash\n{picture.full_command()}\n```\n")
        section, command = picture.section, picture.full_command()
        lines.append(f"![{picture.sentence}](images/{picture.image})\n")
        lines.append(f"*{picture.sentence}*\n")
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
    (DOCS / "gallery.md").write_text(page(pictures))


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
