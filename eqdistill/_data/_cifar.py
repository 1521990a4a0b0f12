import hashlib
import shutil
import tarfile
import zlib
from pathlib import Path

import equinox as eqx
import numpy as np

from ._dataset import Dataset
from ._format import AbstractFormat, cannot_read


_FOLDER = "cifar-10-batches-bin"
_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_TEST = "test_batch.bin"
_SHAPE = (3, 32, 32)
# A byte for the label, and one for each pixel.
_RECORD = 1 + 3 * 32 * 32


class CifarBinary(AbstractFormat):
    """The six files of the binary version of CIFAR-10, which are published in one
    archive.

    `md5` is that of the archive, and `records` the number of images in each file. Each
    class has the same number of images, both for training and for testing.
    """

    archive: str
    md5: str
    records: int
    class_names: tuple[str, ...]
    subfolders: tuple[str, ...] = ("", _FOLDER)
    sha256: dict[str, str] = eqx.field(default_factory=dict)  # None is published.

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        return {name: (name,) for name in (*_TRAIN, _TEST)}

    @property
    def downloads(self) -> tuple[str, ...]:
        return (self.archive,)

    def accept(self, download: Path) -> None:
        with download.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != self.md5:
            raise cannot_read(
                download,
                "it is not the published archive: MD5 "
                f"{found} where {self.md5} was wanted",
            )
        try:
            with tarfile.open(download, "r:gz") as archive:
                for name in self.files:
                    self._unpack(archive, name, download)
        except (EOFError, OSError, KeyError, tarfile.TarError, zlib.error) as e:
            raise cannot_read(download, f"it cannot be unpacked ({e})") from e
        download.unlink()

    def _unpack(self, archive: tarfile.TarFile, name: str, download: Path) -> None:
        member = archive.getmember(f"{_FOLDER}/{name}")
        size = self.records * _RECORD
        content = archive.extractfile(member) if member.isreg() else None
        if content is None or member.size != size:
            raise cannot_read(
                download, f"its {member.name} is not a regular file of {size} bytes"
            )
        # The path is ours, whatever the archive says.
        with content, (download.parent / name).open("xb") as file:
            shutil.copyfileobj(content, file)

    def read(self, paths: dict[str, Path]) -> tuple[Dataset, Dataset]:
        train = self._read([paths[name] for name in _TRAIN])
        test = self._read([paths[_TEST]])
        return train, test

    def _read(self, paths: list[Path]) -> Dataset:
        records = np.concatenate([self._records(path) for path in paths])
        labels = records[:, 0]
        counts = np.bincount(labels, minlength=len(self.class_names))
        if len(set(counts.tolist())) != 1:
            raise cannot_read(
                paths[0],
                f"{', '.join(path.name for path in paths)} must have the same number "
                f"of images of each class, but they have {counts.tolist()}",
            )
        images = records[:, 1:].reshape(-1, *_SHAPE)
        return Dataset(images, labels, class_names=self.class_names)

    def _records(self, path: Path) -> np.ndarray:
        size = path.stat().st_size
        if size != self.records * _RECORD:
            raise cannot_read(
                path,
                f"it has {size} bytes, where {self.records} images of {_RECORD} bytes "
                f"each were wanted: {self.records * _RECORD}",
            )
        records = np.fromfile(path, np.uint8).reshape(-1, _RECORD)
        largest = records[:, 0].max()
        if largest >= len(self.class_names):
            raise cannot_read(
                path,
                f"its labels must be in [0, {len(self.class_names)}), but the largest "
                f"is {largest}",
            )
        return records
