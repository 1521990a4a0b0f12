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
# Pillow's pixel modes in these formats, except for 16-bit grey.
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "RGB", "RGBA", "RGBX", "CMYK")
# The number of images that a thread reads at a time.
_CHUNK = 64


def from_folder(
    path: str | os.PathLike, *, size: Sequence[int] | None = None
) -> Dataset:
    """Loads a folder that has one folder of images for each class.

    Classes are ordered by the names of their folders, and the images of a class by the
    names of the files. Files outside the class folders are ignored, and so is
    everything whose name begins with a dot.

    Images may be PNG, JPEG, GIF (the first frame is read), BMP or WebP. A rotation in
    their metadata is not applied. Images with one channel, with or without
    transparency, are grey. All others, including GIFs and images with a palette, become
    8-bit RGB. Transparent pixels get a black background.

    **Arguments:**

    - `path`: the folder.
    - `size`: the `(height, width)` to resize all images to, by Pillow's bicubic filter
        with antialiasing, without keeping the aspect ratio. By default, images are not
        resized. (Keyword only argument.)

    **Returns:**

    An [`eqdistill.Dataset`][] of `uint8` images, of shape `(height, width)` if they are
    grey, or `(3, height, width)` if they are in colour. Its `class_names` are the names
    of the folders.

    **Raises:**

    - A `FileNotFoundError` if `path` is not a folder.
    - A `ValueError` if `size` is not positive; if there is no class folder, or one has
        no images; if images differ in size and `size` is not given; if some are grey
        and some are in colour; or if anything in a class folder is not an image, is a
        grey image of more than 8 bits, has more pixels than Pillow considers safe
        (`PIL.Image.MAX_IMAGE_PIXELS`), or is a link to outside `path`.
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
            f"`path` must be an existing folder; got {str(path)!r}."
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
                f"`path` must have images of each class; {folder} is empty."
            )
        files += entries
        labels += [label] * len(entries)
    images = _read_all(files, height_and_width)
    if images.ndim == 4:
        images = np.moveaxis(images, 3, 1)
    names = tuple(folder.name for folder in folders)
    return Dataset(images, np.array(labels), class_names=names)


def _entries(folder: Path, root: Path) -> Iterator[Path]:
    """The entries of a folder in the order of their names, without hidden ones."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in sorted(visible, key=lambda entry: entry.name):
        path = folder / entry.name
        if entry.is_symlink():
            target = Path(os.path.realpath(path))
            if not target.is_relative_to(os.path.realpath(root)):
                raise ValueError(
                    f"`path` must not have links to outside the folder; {path} links "
                    f"to {target}."
                )
        yield path


def _read_all(files: list[Path], size: tuple[int, ...] | None) -> np.ndarray:
    """All images in one array, with channels last."""
    first = _read(files[0], size)
    images = np.empty((len(files), *first.shape), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(files))):
            image = _read(files[i], size)
            if image.shape != first.shape:
                raise _differ(files[0], first, files[i], image)
            images[i] = image

    # Pillow releases the GIL when it decodes.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(0, len(files), _CHUNK)):
            pass  # Iterating raises the first error.
    return images


def _differ(
    file: Path, image: np.ndarray, other: Path, found: np.ndarray
) -> ValueError:
    if image.ndim != found.ndim:
        kinds = {2: "grey", 3: "in colour"}
        return ValueError(
            "The images in `path` must be either all grey or all in colour; "
            f"{file} is {kinds[image.ndim]}, and {other} is {kinds[found.ndim]}."
        )
    (height, width), (other_height, other_width) = image.shape[:2], found.shape[:2]
    return ValueError(
        f"The images in `path` must have the same size; {file} is {height} x {width}, "
        f"and {other} is {other_height} x {other_width}. Pass `size=(height, width)` "
        "to resize them."
    )


def _read(file: Path, size: tuple[int, ...] | None) -> np.ndarray:
    """One image, of shape `(height, width)` or `(height, width, 3)`."""
    from PIL import Image

    if not file.is_file():  # Opening a pipe would block.
        raise _not_an_image(file, "not a file")
    try:
        with Image.open(file, formats=_FORMATS) as image:
            # Pillow itself warns, and raises only at twice this number.
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise Image.DecompressionBombError(
                    f"{image.width * image.height} pixels; the limit is {most}"
                )
            return _to_array(image, size)
    # Pillow raises these for truncated, corrupt and unknown files.
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
        "`path` must have only readable PNG, JPEG, GIF, BMP or WebP images in each "
        f"class folder; {file} is not one ({found})."
    )


def _to_array(image: "Image", size: tuple[int, ...] | None) -> np.ndarray:
    from PIL import Image

    if image.mode not in _GREY + _COLOUR:
        raise ValueError(
            f"Pillow's mode {image.mode!r}, which is not 8 bits per channel"
        )
    # Whether a GIF is grey depends on the program that wrote it.
    mode = "L" if image.mode in _GREY and image.format != "GIF" else "RGB"
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    image = image.convert(mode)
    if size is not None:
        height, width = size
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
