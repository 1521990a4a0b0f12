import abc
from pathlib import Path

import equinox as eqx

from ._dataset import Dataset


class AbstractFormat(eqx.Module):
    """The files in which a dataset is published, and how they are read.

    **Attributes:**

    - `subfolders`: where in a folder the files may lie; `""` is the folder itself.
    - `sha256`: the published SHA-256 of each file, uncompressed, if there are any.
    """

    subfolders: eqx.AbstractVar[tuple[str, ...]]
    sha256: eqx.AbstractVar[dict[str, str]]

    @property
    @abc.abstractmethod
    def files(self) -> dict[str, tuple[str, ...]]:
        """Each file that is needed, and the names under which the file may be found."""

    @property
    @abc.abstractmethod
    def downloads(self) -> tuple[str, ...]:
        """The names of what is downloaded."""

    @abc.abstractmethod
    def accept(self, download: Path) -> None:
        """Checks a download, and unpacks an archive in the folder where it lies.

        **Raises:**

        A `ValueError` if the download is not what was published.
        """

    @abc.abstractmethod
    def read(self, paths: dict[str, Path]) -> tuple[Dataset, Dataset]:
        """Checks and reads the files.

        **Arguments:**

        - `paths`: the path of each of `files`.

        **Returns:**

        The training and the test set.

        **Raises:**

        A `ValueError` that says which file is not what was published, and how.
        """


def cannot_read(path: Path, found: str) -> ValueError:
    """The error for a file of a dataset that is not what it should be."""
    return ValueError(
        f"Cannot read {path}: {found}. Delete it, or name another folder by `data_dir` "
        "or the environment variable `EQDISTILL_DATA_DIR`."
    )
