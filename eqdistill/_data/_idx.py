import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np


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
        raise _bad(path, f"it is truncated or not a gzip file ({e})") from e
    # Four bytes of magic, of which the third is the type (8: unsigned bytes) and the
    # fourth the number of axes; then the length of each axis, big-endian.
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise _bad(path, f"it is not an IDX file of bytes: it begins with {data[:4]!r}")
    ndim = data[3]
    header = 4 + 4 * ndim
    shape = tuple(np.frombuffer(data[4:header], ">u4").tolist())
    if len(data) != header + math.prod(shape) or len(shape) != ndim:
        raise _bad(
            path,
            f"its header promises shape {shape}, which is {header + math.prod(shape)} "
            f"bytes in all, but it has {len(data)}",
        )
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise _bad(
            path,
            f"it is an IDX file of shape {shape}, but its contents are not the "
            f"published ones: SHA-256 {found} where {sha256} was wanted",
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _bad(path: Path, found: str) -> ValueError:
    return ValueError(
        f"Cannot read {path}: {found}. Delete it, or name another folder by `data_dir` "
        "or the environment variable `EQDISTILL_DATA_DIR`."
    )
