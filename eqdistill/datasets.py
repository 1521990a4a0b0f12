"""Real datasets, as [`eqdistill.Dataset`][]s of `uint8` images."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from ._data._dataset import Dataset
from ._data._idx import read_idx
from ._data._sources import Source, SOURCES


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
    if name not in SOURCES:
        known = ", ".join(repr(known) for known in (*SOURCES, "digits"))
        raise ValueError(f"`name` must be one of {known}; got {name!r}.")
    source = SOURCES[name]
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
    name: str, source: Source, data_dir: str | os.PathLike | None
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


def _find(folder: Path, source: Source) -> dict[str, Path] | None:
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


def _download(name: str, source: Source, folders: list[Path]) -> dict[str, Path]:
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
