import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ._dataset import Dataset


CIFAR10_IMAGES = 10_000  # In each of the six files.
_RECORD = 1 + 3 * 32 * 32  # The label, then the pixels.
_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def read_idx(paths: Sequence[Path], sha256: Sequence[str]) -> tuple[Dataset, Dataset]:
    """Reads the training and the test images and labels from IDX files that may be
    compressed with gzip. `sha256` holds the hashes of the decompressed files."""
    images, labels, test_images, test_labels = map(_read_idx, paths, sha256)
    return Dataset(images, labels), Dataset(test_images, test_labels)


def _read_idx(path: Path, sha256: str) -> np.ndarray:
    n = 60_000 if path.name.startswith("train") else 10_000
    shape = (n, 28, 28) if "images" in path.name else (n,)
    # The header has four bytes, and four more for the length of each axis.
    header = 4 + 4 * len(shape)
    size = header + int(np.prod(shape))
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(size + 1)  # Larger files are not unpacked in full.
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise _cannot_read(path, f"it is truncated or not a gzip file ({e})") from e
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        has = f"{len(data)} bytes" if len(data) <= size else f"more than {size} bytes"
        published = f"the published file has {size} bytes and SHA-256 {sha256}"
        problem = f"{published}, but this one has {has} and SHA-256 {found}"
        raise _cannot_read(path, problem)
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_cifar10(paths: Sequence[Path], _) -> tuple[Dataset, Dataset]:
    """Reads the binary version of CIFAR-10: the five training files and the test file,
    or the archive that contains them."""
    if len(paths) == 1:
        contents, paths = _unpack(paths[0]), 6 * [paths[0]]
    else:
        contents = [path.read_bytes() for path in paths]
    size = CIFAR10_IMAGES * _RECORD
    for path, content in zip(paths, contents, strict=True):
        if len(content) != size:
            problem = f"each file of CIFAR-10 has {size} bytes; got {len(content)}"
            raise _cannot_read(path, problem)
    train = _cifar10_dataset(b"".join(contents[:5]), paths[0])
    return train, _cifar10_dataset(contents[5], paths[5])


def _unpack(path: Path) -> list[bytes]:
    contents = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None and member.name.endswith(".bin"):
                    contents[member.name] = file.read(CIFAR10_IMAGES * _RECORD + 1)
    except (EOFError, OSError, tarfile.TarError, zlib.error) as e:
        raise _cannot_read(path, f"it cannot be unpacked ({e})") from e
    if len(contents) != 6:
        raise _cannot_read(path, f"it has {len(contents)} '.bin' files; expected 6")
    return [contents[name] for name in sorted(contents)]  # The test file comes last.


def _cifar10_dataset(content: bytes, path: Path) -> Dataset:
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    counts = np.bincount(records[:, 0]).tolist()
    if counts != len(_CLASSES) * [len(records) // len(_CLASSES)]:
        problem = "labels must be in [0, 10), with the same number of images each; got"
        raise _cannot_read(path, f"{problem} {counts}")
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return Dataset(images, records[:, 0], class_names=_CLASSES)


def _cannot_read(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"Cannot read {path}: {problem}. Delete it, or pass another `data_dir`."
    )
