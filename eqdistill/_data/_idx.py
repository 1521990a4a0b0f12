import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np

from ._dataset import Dataset
from ._format import AbstractFormat, cannot_read


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
    """Reads an array of bytes from an IDX file, the format of MNIST, which may be
    compressed by gzip.

    `sha256` is that of the uncompressed file, and so the same for every compression.

    **Raises:**

    A `ValueError` that says which file is not what it should be, and how.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise cannot_read(path, f"it is truncated or not a gzip file ({e})") from e
    # Four bytes of magic, of which the third is the type (8: unsigned bytes) and the
    # fourth the number of axes; then the length of each axis, big-endian.
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise cannot_read(
            path, f"it is not an IDX file of bytes: it begins with {data[:4]!r}"
        )
    ndim = data[3]
    header = 4 + 4 * ndim
    shape = tuple(np.frombuffer(data[4:header], ">u4").tolist())
    if len(data) != header + math.prod(shape) or len(shape) != ndim:
        raise cannot_read(
            path,
            f"its header promises shape {shape}, which is {header + math.prod(shape)} "
            f"bytes in all, but it has {len(data)}",
        )
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise cannot_read(
            path,
            f"it is an IDX file of shape {shape}, but its contents are not the "
            f"published ones: SHA-256 {found} where {sha256} was wanted",
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
