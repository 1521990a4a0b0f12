"""Real datasets, as [`eqdistill.Dataset`][]s of `uint8` images."""

import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np

from ._data._dataset import Dataset
from ._data._image_folder import from_folder as from_folder
from ._data._sources import Source, SOURCES


def load(
    name: str, data_dir: str | os.PathLike | None = None
) -> tuple[Dataset, Dataset]:
    """Loads a dataset.

    | name | images | classes | train | test |
    |---|---|---|---|---|
    | `"mnist"` | 28 x 28 handwritten digits | 10 | 60,000 | 10,000 |
    | `"fashion_mnist"` | 28 x 28 articles of clothing | 10 | 60,000 | 10,000 |
    | `"cifar10"` | 3 x 32 x 32 colour photographs of objects | 10 | 50,000 | 10,000 |
    | `"digits"` | 8 x 8 handwritten digits, from scikit-learn | 10 | 1,347 | 450 |

    The files are the IDX files of MNIST and Fashion-MNIST, compressed by gzip or not,
    and the six files of the binary version of CIFAR-10. The files are in `data_dir`; or
    if that is not given, they are looked for in turn in the folder that the environment
    variable `EQDISTILL_DATA_DIR` names; the folder that ships with this repository; the
    system's folder (`/usr/share/datasets/fashion-mnist`, of Debian's
    `dataset-fashion-mnist`); and the user's cache. In each they may lie in a folder of
    the dataset's name, or directly; those of CIFAR-10 also in a folder
    `cifar-10-batches-bin`. If they are in none, then they are downloaded to the cache
    by `pooch`.

    The SHA-256 of the IDX files is checked, wherever they come from. For CIFAR-10 only
    the MD5 of the whole archive is published: this is checked before a downloaded
    archive is unpacked. Of the six files themselves, the sizes are checked, the range
    of the labels, and that each class has the same number of images.

    **Arguments:**

    - `name`: one of the above.
    - `data_dir`: the folder of the files. Defaults to the first of the above folders
        that has them.

    **Returns:**

    The pair of the training and the test [`eqdistill.Dataset`][], with `uint8` images:
    of shape `(height, width)` if they are grey, and `(3, height, width)` if they are
    in colour.

    **Raises:**

    - A `ValueError` if there is no dataset of that name, or if a file is truncated or
        corrupt, or of another dataset.
    - A `FileNotFoundError` if `data_dir` does not exist or has no such files, some but
        not all of the files are in a folder, or none is anywhere and they cannot be
        downloaded.

    Source: LeCun, Cortes and Burges, *MNIST*, 1998; Xiao et al., *Fashion-MNIST*, 2017;
    Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.
    """
    if name == "digits":
        return _load_digits()
    if name not in SOURCES:
        known = ", ".join(repr(known) for known in (*SOURCES, "digits"))
        raise ValueError(f"`name` must be one of {known}; got {name!r}.")
    source = SOURCES[name]
    if data_dir is None:
        folders = _folders(name, source)
    else:
        folders = _in("`data_dir`", data_dir, name, source)
    for folder in folders:
        paths = _find(folder, source.format.files)
        if paths is not None:
            break
    else:
        if data_dir is not None:
            wanted = ", ".join(names[0] for names in source.format.files.values())
            raise FileNotFoundError(
                f"`data_dir` must have the files of {name!r}, which are {wanted}; "
                f"{str(data_dir)!r} has none of them."
            )
        paths = _download(name, source, folders)
    return source.format.read(paths)


def _folders(name: str, source: Source) -> list[Path]:
    """Where the files may be if no folder is given."""
    folders = []
    named = os.environ.get("EQDISTILL_DATA_DIR")
    if named:
        variable = "The environment variable `EQDISTILL_DATA_DIR`"
        folders += _in(variable, named, name, source)
    folders += _below(Path(__file__).parents[1] / "examples" / "data", name, source)
    others = [folder for folder in (source.system, _cache(name)) if folder]
    return folders + [f / sub for f in others for sub in source.format.subfolders]


def _in(
    origin: str, folder: str | os.PathLike, name: str, source: Source
) -> list[Path]:
    """**Raises:**

    A `FileNotFoundError` if there is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{origin} must name a folder that exists; got {str(folder)!r}."
        )
    return _below(Path(folder), name, source)


def _below(root: Path, name: str, source: Source) -> list[Path]:
    return [f / sub for f in (root / name, root) for sub in source.format.subfolders]


def _find(folder: Path, files: dict[str, tuple[str, ...]]) -> dict[str, Path] | None:
    """The dataset's files, if they are all in a folder; nothing, if none is."""
    found = {
        file: folder / name
        for file, names in files.items()
        for name in names
        if (folder / name).is_file()
    }
    if not found:
        return None
    missing = [names for file, names in files.items() if file not in found]
    if missing:
        wanted = ", ".join(" or ".join(names) for names in missing)
        raise FileNotFoundError(
            f"{folder} has {', '.join(found)}, but not {wanted}. Put all "
            f"{len(files)} files there, or none."
        )
    return found


def _cache(name: str) -> Path | None:
    try:
        # Pooch imports the progress bar of notebooks, which warns without widgets.
        with warnings.catch_warnings(action="ignore"):
            import pooch
    except ImportError:
        return None
    return Path(pooch.os_cache("eqdistill")) / name


def _download(name: str, source: Source, folders: list[Path]) -> dict[str, Path]:
    files = source.format.files
    absent = (
        f"The files of {name!r} are in none of: "
        f"{'; '.join(str(folder) for folder in folders)}"
    )
    advice = (
        f"Put the files {', '.join(names[0] for names in files.values())} into a "
        "folder, and name that by `data_dir` or the environment variable "
        "`EQDISTILL_DATA_DIR`."
    )
    cache = _cache(name)
    if cache is None:
        raise FileNotFoundError(
            f"{absent}. To download them, pip install 'eqdistill[data]'. {advice}"
        )
    import pooch

    cache.parent.mkdir(parents=True, exist_ok=True)
    # Nothing is put into the cache until all of it is there and has been checked.
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        for download in source.format.downloads:
            url = f"{source.url}{download}"
            try:
                path = pooch.retrieve(url, None, fname=download, path=folder)
            except Exception as e:
                raise FileNotFoundError(
                    f"{absent}; and {url} could not be downloaded ({e}). {advice}"
                ) from e
            source.format.accept(Path(path))
        shutil.copytree(folder, cache, dirs_exist_ok=True)
    paths = _find(cache, files)
    assert paths is not None
    return paths


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
