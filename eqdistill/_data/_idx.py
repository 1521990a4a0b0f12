import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ._dataset import Dataset
from ._format import AbstractFormat, cannot_read


# What is published under each name: a file that is larger is not unpacked.
_SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


class Idx(AbstractFormat):
    """The four IDX files of MNIST and of what is modelled on it, compressed by gzip or
    not."""

    sha256: dict[str, str]
    subfolders: tuple[str, ...] = ("",)

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        return {stem: (f"{stem}.gz", stem) for stem in self.sha256}

    @property
    def downloads(self) -> tuple[str, ...]:
        return tuple(f"{stem}.gz" for stem in self.sha256)

    def accept(self, download: Path) -> None:
        read_idx(download, self.sha256[download.stem])

    def read(self, paths: dict[str, Path]) -> tuple[Dataset, Dataset]:
        arrays = {
            stem: read_idx(path, self.sha256[stem]) for stem, path in paths.items()
        }
        train, test = (
            Dataset(
                arrays[f"{split}-images-idx3-ubyte"],
                arrays[f"{split}-labels-idx1-ubyte"],
            )
            for split in ("train", "t10k")
        )
        return train, test


def read_idx(path: Path, sha256: str) -> np.ndarray:
    """Reads an array of bytes from an IDX file of MNIST or of what is modelled on it,
    which may be compressed by gzip.

    `sha256` is that of the uncompressed file, and so the same for every compression.
    No more is unpacked than the published file has.

    **Raises:**

    A `ValueError` that says which file is not what it should be, and how.
    """
    stem = path.name.removesuffix(".gz")
    wanted = _SHAPES[stem]
    header = 4 + 4 * len(wanted)
    size = header + math.prod(wanted)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise cannot_read(path, f"it is truncated or not a gzip file ({e})") from e
    # Four bytes of magic, of which the third is the type (8: unsigned bytes) and the
    # fourth the number of axes; then the length of each axis, big-endian.
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise cannot_read(
            path, f"it is not an IDX file of bytes: it begins with {data[:4]!r}"
        )
    if len(data) < 4 + 4 * data[3]:
        raise cannot_read(
            path,
            f"it ends within its header, which has {4 + 4 * data[3]} bytes for "
            f"{data[3]} axes: it has {len(data)}",
        )
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    if shape != wanted:
        raise cannot_read(
            path,
            f"its header promises shape {shape}, where {wanted} was wanted",
        )
    if len(data) != size:
        has = f"only {len(data)}" if len(data) < size else "more"
        raise cannot_read(
            path,
            f"its header promises shape {shape}, which is {size} bytes in all, but it "
            f"has {has}",
        )
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise cannot_read(
            path,
            f"it is an IDX file of shape {shape}, but its contents are not the "
            f"published ones: SHA-256 {found} where {sha256} was wanted",
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
