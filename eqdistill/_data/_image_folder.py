import concurrent.futures
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .._checks import needs
from .._conversions import as_ints
from ._dataset import Dataset


_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
# Pillow's pixel modes in these formats, except for 16-bit grey.
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "RGB", "RGBA", "RGBX", "CMYK")


def from_folder(
    path: str | os.PathLike,
    *,
    size: Sequence[int] | None = None,
    class_names: list[str] | tuple[str, ...] | None = None,
) -> Dataset:
    """Loads a folder that has one folder of images for each class.

    Classes and their images are ordered by the names of folders and files. If all
    folder names are numbers, the classes are in numerical order. Files outside the
    class folders are ignored, as are files and folders whose names begin with a dot.

    Images may be PNG, JPEG, GIF (the first frame is read), BMP or WebP. A rotation in
    their metadata is not applied. Images with one channel, with or without
    transparency, are grey. All others, including GIFs and images with a palette, become
    8-bit RGB. Transparent pixels become black.

    **Arguments:**

    - `path`: the folder.
    - `size`: the `(height, width)` to resize all images to, with Pillow's bicubic
        filter and antialiasing, without keeping the aspect ratio. By default, images
        are not resized.
    - `class_names`: the names of all folders in the order of the class indices, such
        as `train.class_names` for test images. Folders may then be empty or missing.

    **Returns:** an [`eqdistill.Dataset`][] of `uint8` images, of shape
    `(height, width)` if they are grey, or `(3, height, width)` in colour. Its
    `class_names` are those of the folders.

    **Raises:** a `ValueError` if a folder is empty or not in `class_names`; if images
    differ in size and `size` is not given; if some are grey and some are in colour; or
    if anything in a class folder is not an image, is a grey image of more than 8 bits,
    has more pixels than Pillow's `PIL.Image.MAX_IMAGE_PIXELS`, or is a link that points
    outside `path`.
    """
    with needs("`eqdistill.datasets.from_folder`", "Pillow", "data"):
        import PIL  # noqa: F401
    if size is not None:
        size = as_ints("size", size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"`size` must be a positive (height, width); got {size}.")
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"`path` must be an existing folder; got '{root}'.")
    found = {entry.name: entry for entry in _entries(root, root) if entry.is_dir()}
    names = _ordered(list(found)) if class_names is None else list(class_names)
    if unknown := sorted(found.keys() - {*names}):
        raise ValueError(
            f"`class_names` must have the name of each folder in {root}; "
            f"{unknown[0]!r} is missing."
        )
    files = [_entries(found[x], root) if x in found else [] for x in names]
    if not any(files) or (class_names is None and [] in files):
        empty = root / names[files.index([])] if found else root
        raise ValueError(
            f"`path` must have one folder of images for each class; {empty} has none. "
            "Pass `class_names` if some classes have no images."
        )
    images = _read_all([file for entries in files for file in entries], size)
    if images.ndim == 4:
        images = np.moveaxis(images, 3, 1)
    labels = np.repeat(np.arange(len(files)), [len(entries) for entries in files])
    return Dataset(images, labels, class_names=names)


def _ordered(names: list[str]) -> list[str]:
    """The names of classes in order: numbers by their value, so that 10 follows 9."""
    are_numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=int) if are_numbers else names


def _entries(folder: Path, root: Path) -> list[Path]:
    """The entries of a folder in the order of their names, without hidden ones."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    paths = [folder / name for name in names]
    for path in filter(Path.is_symlink, paths):
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(os.path.realpath(root)):
            raise ValueError(
                f"`path` must not contain links that point outside it; {path} links to "
                f"{target}."
            )
    return paths


def _read_all(files: list[Path], size: Sequence[int] | None) -> np.ndarray:
    """All images in one array, with channels last."""
    first = _read(files[0], size)
    images = np.empty((len(files), *first.shape), np.uint8)

    def fill(i: int) -> None:
        image = _read(files[i], size)
        if image.shape != first.shape:
            words = {2: "{} x {} and grey", 3: "{} x {} and in colour"}
            a, b = (words[x.ndim].format(*x.shape) for x in (first, image))
            raise ValueError(
                "The images in `path` must have the same size, and be all grey or all "
                f"in colour; {files[0]} is {a}, and {files[i]} is {b}. Pass "
                "`size=(height, width)` to resize them."
            )
        images[i] = image

    # Pillow releases the GIL when it decodes.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(len(files))))  # Raises the first error.
    return images


def _read(file: Path, size: Sequence[int] | None) -> np.ndarray:
    """One image, of shape `(height, width)` or `(height, width, 3)`."""
    from PIL import Image

    bombs = Image.DecompressionBombError, Image.DecompressionBombWarning
    try:
        if not file.is_file():  # Opening a pipe would block.
            raise ValueError("not a file")
        with Image.open(file, formats=_FORMATS) as image:
            # Pillow itself only warns here, and raises at twice this number.
            pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if most is not None and pixels > most:
                raise ValueError(f"it has {pixels} pixels; the limit is {most}")
            if image.mode not in _GREY + _COLOUR:
                raise ValueError(f"its mode {image.mode!r} is not 8 bits per channel")
            # Whether a GIF is grey depends on the program that wrote it.
            mode = "L" if image.mode in _GREY and image.format != "GIF" else "RGB"
            if image.has_transparency_data:
                black = Image.new("RGBA", image.size, "black")
                image = Image.alpha_composite(black, image.convert("RGBA"))
            image = image.convert(mode)
            if size is not None:
                image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            return np.asarray(image)
    # Pillow raises these for truncated, corrupt and unknown files.
    except (OSError, SyntaxError, ValueError, *bombs) as e:
        raise ValueError(
            "`path` must have only readable PNG, JPEG, GIF, BMP or WebP images in each "
            f"class folder; {file} is not one ({e})."
        ) from e
