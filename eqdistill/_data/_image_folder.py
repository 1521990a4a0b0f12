import concurrent.futures
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._conversions import as_ints
from ._dataset import Dataset


if TYPE_CHECKING:
    from PIL.Image import Image


_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
# Pillow's names of the kinds of pixels in these formats, but for grey of 16 bits.
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "RGB", "RGBA", "RGBX", "CMYK")
# How many images a thread reads at a time.
_CHUNK = 64


def from_folder(
    path: str | os.PathLike, *, size: Sequence[int] | None = None
) -> Dataset:
    """Loads a folder that has one folder of images for each class.

    The classes are the folders in the order of their names, and the images of a class
    the files in the order of theirs. Files beside the folders of the classes are not
    read, and neither is anything whose name begins with a dot.

    Images are PNG, JPEG, GIF (the first frame), BMP or WebP, and are read as they are
    stored: a rotation in their metadata is not applied. An image of one channel, with
    or without transparency, is grey. Any other becomes RGB of 8 bits, and so does each
    image with a palette, and each GIF. Transparent pixels are laid on black.

    **Arguments:**

    - `path`: the folder.
    - `size`: the `(height, width)` to which all images are resized, by Pillow's bicubic
        filter with antialiasing, whatever their aspect ratio. Defaults to the size that
        all of the images have. (Keyword only argument.)

    **Returns:**

    An [`eqdistill.Dataset`][] of `uint8` images, of shape `(height, width)` if they are
    grey, and `(3, height, width)` if they are in colour. Its `class_names` are the
    names of the folders.

    **Raises:**

    - A `FileNotFoundError` if `path` is not a folder.
    - A `ValueError` if `size` is not positive; if there is no folder of a class, or one
        without images; if the images are of several sizes and `size` is not given, or
        are partly grey and partly in colour; or if anything in the folder of a class
        is not an image, is a grey image of more than 8 bits, has more pixels than
        Pillow considers safe (`PIL.Image.MAX_IMAGE_PIXELS`), or is a link that leads
        out of `path`.
    - An `ImportError` without Pillow.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as e:
        raise ImportError(
            "`eqdistill.datasets.from_folder` needs Pillow: pip install "
            "'eqdistill[data]'."
        ) from e
    height_and_width = None
    if size is not None:
        height_and_width = as_ints("size", size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"`size` must be a positive (height, width); got {size}.")
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(
            f"`path` must name a folder that exists; got {str(path)!r}."
        )
    folders = [entry for entry in _entries(root, root) if entry.is_dir()]
    if not folders:
        raise ValueError(
            f"`path` must have one folder of images for each class; {root} has no "
            "folders."
        )
    files, labels = [], []
    for label, folder in enumerate(folders):
        entries = list(_entries(folder, root))
        if not entries:
            raise ValueError(
                f"`path` must have images of each class; {folder} has none."
            )
        files += entries
        labels += [label] * len(entries)
    images = _read_all(files, height_and_width)
    if images.ndim == 4:
        images = np.moveaxis(images, 3, 1)
    names = tuple(folder.name for folder in folders)
    return Dataset(images, np.array(labels), class_names=names)


def _entries(folder: Path, root: Path) -> Iterator[Path]:
    """What is in a folder, by name, if the name does not begin with a dot."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in sorted(visible, key=lambda entry: entry.name):
        path = folder / entry.name
        if entry.is_symlink():
            target = Path(os.path.realpath(path))
            if not target.is_relative_to(os.path.realpath(root)):
                raise ValueError(
                    f"`path` must have no links that lead out of it; {path} leads to "
                    f"{target}."
                )
        yield path


def _read_all(files: list[Path], size: tuple[int, ...] | None) -> np.ndarray:
    """All images in one array, colours last."""
    first = _read(files[0], size)
    images = np.empty((len(files), *first.shape), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(files))):
            image = _read(files[i], size)
            if image.shape != first.shape:
                raise _differ(files[0], first, files[i], image)
            images[i] = image

    # Pillow decodes outside of Python's lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(0, len(files), _CHUNK)):
            pass  # Raises the first error.
    return images


def _differ(
    file: Path, image: np.ndarray, other: Path, found: np.ndarray
) -> ValueError:
    if image.ndim != found.ndim:
        kinds = {2: "grey", 3: "in colour"}
        return ValueError(
            "The images in `path` must be either all grey or all in colour; "
            f"{file} is {kinds[image.ndim]}, and {other} {kinds[found.ndim]}."
        )
    (height, width), (other_height, other_width) = image.shape[:2], found.shape[:2]
    return ValueError(
        "The images in `path` must be of one size, or resized by `size=(height, "
        f"width)`; {file} is {height} x {width}, and {other} is {other_height} x "
        f"{other_width}."
    )


def _read(file: Path, size: tuple[int, ...] | None) -> np.ndarray:
    """One image, of shape `(height, width)` or `(height, width, 3)`."""
    from PIL import Image

    if not file.is_file():  # To open a pipe would wait for ever.
        raise _not_an_image(file, "not a file")
    try:
        with Image.open(file, formats=_FORMATS) as image:
            # Pillow raises an error only for twice as many, and first warns.
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise Image.DecompressionBombError(
                    f"{image.width * image.height} pixels, where {most} are safe"
                )
            return _to_array(image, size)
    # What Pillow raises for a file that is truncated, corrupt, or of another kind.
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as e:
        raise _not_an_image(file, str(e)) from e


def _not_an_image(file: Path, found: str) -> ValueError:
    return ValueError(
        "`path` must have nothing but images in the folder of a class: PNG, JPEG, GIF, "
        f"BMP or WebP, which can be read; {file} is not ({found})."
    )


def _to_array(image: "Image", size: tuple[int, ...] | None) -> np.ndarray:
    from PIL import Image

    if image.mode not in _GREY + _COLOUR:
        raise ValueError(
            f"its pixels are of Pillow's mode {image.mode!r}, where 8 bits for each "
            "channel were wanted"
        )
    # Whether the palette of a GIF is grey is up to the program that has written it.
    mode = "L" if image.mode in _GREY and image.format != "GIF" else "RGB"
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    image = image.convert(mode)
    if size is not None:
        height, width = size
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
