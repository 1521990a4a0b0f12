"""Real datasets, as [`eqdistill.Dataset`][]s of `uint8` images."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._dataset import Dataset
from ._idx import read_idx


class _Source(NamedTuple):
    """Where four IDX files are to be found, and the SHA-256 of each, uncompressed."""

    url: str
    system: Path | None
    sha256: dict[str, str]


_SOURCES = {
    "mnist": _Source(
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        system=None,
        sha256={
            "train-images-idx3-ubyte": (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
            ),
            "train-labels-idx1-ubyte": (
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
            ),
            "t10k-images-idx3-ubyte": (
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
            ),
            "t10k-labels-idx1-ubyte": (
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
            ),
        },
    ),
    "fashion_mnist": _Source(
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        system=Path("/usr/share/datasets/fashion-mnist"),
        sha256={
            "train-images-idx3-ubyte": (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
            ),
            "train-labels-idx1-ubyte": (
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
            ),
            "t10k-images-idx3-ubyte": (
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
            ),
            "t10k-labels-idx1-ubyte": (
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
            ),
        },
    ),
}


def load(
    name: str, data_dir: str | os.PathLike | None = None
) -> tuple[Dataset, Dataset]:
    """Loads a dataset.

    | name | images | classes | train | test |
    |---|---|---|---|---|
    | `"mnist"` | 28 x 28 handwritten digits | 10 | 60,000 | 10,000 |
    | `"fashion_mnist"` | 28 x 28 articles of clothing | 10 | 60,000 | 10,000 |
    | `"digits"` | 8 x 8 handwritten digits, from scikit-learn | 10 | 1,347 | 450 |

    The IDX files of MNIST and Fashion-MNIST, compressed by gzip or not, are looked for
    in turn in `data_dir`; the folder that the environment variable `EQDISTILL_DATA_DIR`
    names; the folder that ships with this repository; the system's folder
    (`/usr/share/datasets/fashion-mnist`, of Debian's `dataset-fashion-mnist`); and the
    user's cache. In each they may lie in a folder of the dataset's name, or directly.
    If they are in none, then they are downloaded to the cache by `pooch`. Wherever they
    come from, their SHA-256 is checked.

    **Arguments:**

    - `name`: one of the above.
    - `data_dir`: where to look first.

    **Returns:**

    The pair of the training and the test [`eqdistill.Dataset`][], with `uint8` images.

    **Raises:**

    - A `ValueError` if there is no dataset of that name, or if a file is truncated or
        corrupt, or of another dataset.
    - A `FileNotFoundError` if `data_dir` does not exist, some but not all of the files
        are in a folder, or none is anywhere and they cannot be downloaded.
    """
    if name == "digits":
        return _load_digits()
    if name not in _SOURCES:
        known = ", ".join(repr(known) for known in (*_SOURCES, "digits"))
        raise ValueError(f"`name` must be one of {known}; got {name!r}.")
    source = _SOURCES[name]
    folders = _folders(name, source, data_dir)
    for folder in folders:
        paths = _find(folder, source)
        if paths is not None:
            break
    else:
        paths = _download(name, source, folders)
    arrays = {stem: read_idx(path, source.sha256[stem]) for stem, path in paths.items()}
    train, test = (
        Dataset(
            arrays[f"{split}-images-idx3-ubyte"], arrays[f"{split}-labels-idx1-ubyte"]
        )
        for split in ("train", "t10k")
    )
    return train, test


def _folders(
    name: str, source: _Source, data_dir: str | os.PathLike | None
) -> list[Path]:
    named = {
        "`data_dir`": data_dir,
        "The environment variable `EQDISTILL_DATA_DIR`": os.environ.get(
            "EQDISTILL_DATA_DIR"
        ),
    }
    roots = []
    for origin, folder in named.items():
        if folder:
            if not Path(folder).is_dir():
                raise FileNotFoundError(
                    f"{origin} must name a folder that exists; got {str(folder)!r}."
                )
            roots.append(Path(folder))
    roots.append(Path(__file__).parents[1] / "examples" / "data")
    folders = [folder for root in roots for folder in (root / name, root)]
    if source.system is not None:
        folders.append(source.system)
    cache = _cache(name)
    return folders if cache is None else [*folders, cache]


def _find(folder: Path, source: _Source) -> dict[str, Path] | None:
    """The dataset's four files, if they are all in a folder; nothing, if none is."""
    found = {
        stem: path
        for stem in source.sha256
        for path in (folder / f"{stem}.gz", folder / stem)
        if path.is_file()
    }
    missing = [stem for stem in source.sha256 if stem not in found]
    if not found:
        return None
    if missing:
        raise FileNotFoundError(
            f"{folder} has {', '.join(found)}, but not {', '.join(missing)} (or the "
            "same with .gz). Put all four files there, or none."
        )
    return found


def _cache(name: str) -> Path | None:
    try:
        import pooch
    except ImportError:
        return None
    return Path(pooch.os_cache("eqdistill")) / name


def _download(name: str, source: _Source, folders: list[Path]) -> dict[str, Path]:
    looked = "; ".join(str(folder) for folder in folders)
    advice = (
        f"Put the files {', '.join(f'{stem}.gz' for stem in source.sha256)} into a "
        "folder, and name that by `data_dir` or the environment variable "
        "`EQDISTILL_DATA_DIR`."
    )
    cache = _cache(name)
    if cache is None:
        raise FileNotFoundError(
            f"The files of {name!r} are in none of: {looked}. To download them, pip "
            f"install 'eqdistill[data]'. {advice}"
        )
    import pooch

    cache.parent.mkdir(parents=True, exist_ok=True)
    # Nothing is put into the cache until all of it is there and has been checked.
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        for stem, sha256 in source.sha256.items():
            url = f"{source.url}{stem}.gz"
            try:
                path = pooch.retrieve(
                    url, known_hash=None, fname=f"{stem}.gz", path=folder
                )
            except Exception as e:
                raise FileNotFoundError(
                    f"The files of {name!r} are in none of: {looked}; and {url} could "
                    f"not be downloaded ({e}). {advice}"
                ) from e
            read_idx(Path(path), sha256)
        shutil.copytree(folder, cache, dirs_exist_ok=True)
    return {stem: cache / f"{stem}.gz" for stem in source.sha256}


def _load_digits() -> tuple[Dataset, Dataset]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise ImportError(
            "The dataset 'digits' needs scikit-learn: pip install 'eqdistill[data]'."
        ) from e
    pixels, labels = load_digits(return_X_y=True)
    # From 0 to 16, as they come.
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=450, stratify=labels, random_state=0
    )
    return Dataset(images[train], labels[train]), Dataset(images[test], labels[test])
