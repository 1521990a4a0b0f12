"""Arrays that are computed once and kept in files."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array


def load_or_compute(
    directory: str | os.PathLike,
    fn: Callable,
    example: Array,
    images: np.ndarray,
    compute: Callable,
) -> np.ndarray:
    """The outputs of `fn` on all images: read from a file in `directory`, or computed
    by `compute()` and written there. The name of the file is the digest of the program
    that `fn` runs on an `example`, of its arrays, and of the images."""
    arrays, static = eqx.partition(fn, eqx.is_array)
    of_image = lambda arrays, image: eqx.combine(arrays, static)(image)
    program, struct = jax.make_jaxpr(of_image, return_shape=True)(arrays, example)
    digest = hashlib.sha256()
    # Include the program: different networks may have the same arrays. Leave out the
    # addresses of functions, which differ between processes.
    digest.update(re.sub(r"\b0x[0-9a-f]+", "", str(program.jaxpr)).encode())
    for x in jax.tree.leaves((arrays, program.consts, images)):
        _update(digest, x)
    path = Path(directory) / f"{digest.hexdigest()}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Write into a temporary folder, so that the file is complete once it exists.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            np.save(unfinished, compute(), allow_pickle=False)
            unfinished.replace(path)
    # NumPy stores bfloat16 as two bytes without a type.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(struct.dtype)


def _update(digest, x: Array | np.ndarray) -> None:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jr.key_data(x)
    digest.update(f"{x.dtype}{x.shape}".encode())
    digest.update(np.ascontiguousarray(x).view(np.uint8).data)
