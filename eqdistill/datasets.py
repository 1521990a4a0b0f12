"""Real datasets and their preprocessing."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._checks import needs
from ._data._dataset import Dataset
from ._data._image_folder import from_folder as from_folder
from ._data._preprocessing import (
    AbstractPreprocessing as AbstractPreprocessing,
    Standardisation as Standardisation,
    ZCA as ZCA,
)
from ._data._readers import read_cifar10, read_idx
from ._outer._accumulated import Accumulated as Accumulated
from ._outer._stream import Stream as Stream


class _Source(NamedTuple):
    """Where a dataset is published and how its files are read, with the hash of each
    download and the SHA-256 of each unpacked file."""

    url: str
    registry: dict[str, str]
    files: Mapping[str, str | None]
    read: Callable
    system: Path | None = None


_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
_IDX = [f"{part}-{kind}" for part in ("train", "t10k") for kind in _KINDS]
_CIFAR10 = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def _idx_source(url: str, md5: str, sha256: str, system=None) -> _Source:
    registry = {f"{f}.gz": f"md5:{h}" for f, h in zip(_IDX, md5.split(), strict=True)}
    files = dict(zip(_IDX, sha256.split(), strict=True))
    return _Source(url, registry, files, read_idx, system)


_SOURCES = {
    "mnist": _idx_source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        """f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432
        9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c""",
        """ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db
        65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5
        0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7
        ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2""",
    ),
    "fashion_mnist": _idx_source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        """8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe
        bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310""",
        """c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
        bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
        5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
        0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34""",
        Path("/usr/share/datasets/fashion-mnist"),
    ),
    "cifar10": _Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"},
        dict.fromkeys(_CIFAR10),
        read_cifar10,
    ),
}


_FROM_SKLEARN = ("digits", "wine", "breast_cancer")


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
    | `"wine"` | rows of 13 measurements of wines, from scikit-learn | 3 | 133 | 45 |
    | `"breast_cancer"` | rows of 30 measurements, from scikit-learn | 2 | 426 | 143 |

    The files are the IDX files of MNIST and Fashion-MNIST, with or without gzip
    compression, and the binary version of CIFAR-10, as one archive or as six files. The
    SHA-256 of IDX files is checked. For CIFAR-10, the MD5 of a download is checked, as
    are the sizes and the class counts of local files.

    **Arguments:**

    - `name`: one of the names above.
    - `data_dir`: the folder of the files, or its parent with a subfolder `name`. By
        default, these folders are searched: the one in the environment variable
        `EQDISTILL_DATA_DIR`; `examples/data` in this repository, which has MNIST; and
        `/usr/share/datasets/fashion-mnist`, from Debian's `dataset-fashion-mnist`. If
        there are no files, `pooch` downloads them to the user's cache, or to
        `EQDISTILL_DATA_DIR` if it is set.

    **Returns:** the training and the test [`eqdistill.Dataset`][], with `uint8` images
    of shape `(height, width)` if they are grey, or `(3, height, width)` if they are in
    colour; or with rows of floating-point numbers in their original units.

    **Raises:** a `ValueError` if a file is truncated, corrupt, or from another dataset.
    A `FileNotFoundError` if files are missing and cannot be downloaded.

    Source: LeCun, Cortes and Burges, *MNIST*, 1998; Xiao et al., *Fashion-MNIST*, 2017;
    Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.
    """
    if name in _FROM_SKLEARN:
        return _load_from_sklearn(name)
    if name not in _SOURCES:
        names = [*_SOURCES, *_FROM_SKLEARN]
        raise ValueError(f"`name` must be one of {names}; got {name!r}.")
    source = _SOURCES[name]
    shipped = Path(__file__).parents[1] / "examples" / "data"
    roots = [os.environ.get("EQDISTILL_DATA_DIR"), shipped, source.system]
    roots = [Path(root) for root in roots if root and Path(root).is_dir()]
    roots = roots if data_dir is None else [data_dir]
    cifar = "cifar-10-batches-bin"
    subfolders = (name, f"{name}/{cifar}", "", cifar)
    folders = [Path(root, subfolder) for root in roots for subfolder in subfolders]
    for folder in folders:
        for files in (source.registry, source.files):
            paths = [folder / file for file in files]
            if all(path.is_file() for path in paths):
                return source.read(paths, [*source.files.values()])
    if data_dir is None:
        return source.read(_download(name, roots), [*source.files.values()])
    raise FileNotFoundError(
        f"`data_dir` must be a folder with all files of {name!r}: "
        f"{', '.join(source.files)}; got {str(data_dir)!r}."
    )


def _download(name: str, looked_in: list) -> list[Path]:
    """Downloads what the cache lacks. Pooch keeps a file only if its hash is right."""
    source = _SOURCES[name]
    try:
        # Pooch imports tqdm's progress bar for notebooks, which warns without widgets.
        with (
            warnings.catch_warnings(action="ignore"),
            needs("Downloading", "pooch", "data"),
        ):
            import pooch
        cache = pooch.create(
            pooch.os_cache("eqdistill"),
            base_url=source.url,
            env="EQDISTILL_DATA_DIR",
            registry={f"{name}/{f}": known for f, known in source.registry.items()},
            urls={f"{name}/{f}": source.url + f for f in source.registry},
        )
        return [Path(cache.fetch(file)) for file in cache.registry]
    except (ImportError, OSError) as e:  # Pooch raises subclasses of `OSError`.
        raise FileNotFoundError(
            f"The files of {name!r} could not be downloaded from {source.url} ({e}), "
            f"and are not in {' or '.join(map(str, looked_in)) or 'any known folder'}. "
            f"To use your own copy, put {', '.join(source.registry)} into a folder, "
            "and pass it as `data_dir`."
        ) from e


def _load_from_sklearn(name: str) -> tuple[Dataset, Dataset]:
    with needs(f"The dataset {name!r}", "scikit-learn", "data"):
        import sklearn.datasets
        from sklearn.model_selection import train_test_split
    data: Any = getattr(sklearn.datasets, f"load_{name}")()
    rows, class_names = data.data, [str(x) for x in data.target_names]
    if name == "digits":
        # The pixels are from 0 to 16.
        rows = np.round(rows * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        class_names = None
    rows, test_rows, labels, test_labels = train_test_split(
        rows, data.target, test_size=0.25, stratify=data.target, random_state=0
    )
    train = Dataset(rows, labels, class_names=class_names)
    return train, Dataset(test_rows, test_labels, class_names=class_names)


def _published_hashes(name: str) -> dict[str, str]:
    """The SHA-256 of each unpacked file of a dataset, or `{}` if none are published."""
    files = _SOURCES[name].files if name in _SOURCES else {}
    return {file: known for file, known in files.items() if known is not None}
