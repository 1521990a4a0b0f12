import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray, PyTree

from .._classifier import LinearClassifier
from .._data._distilled_set import DistilledSet
from .._data._preprocessing import AbstractPreprocessing
from .._inner._inner_solver import AbstractInnerSolver
from .._outer._outer_loss import decode
from .._outer._recipe import Recipe
from ._metadata import check, header_bytes, MAX_BYTES, read_header
from ._recipe_format import build_recipe
from ._tensors import build_classifier, build_inner, read_tensors


class Artifact(eqx.Module):
    """A distilled set as it was published: what [`eqdistill.load`][] returns.

    **Attributes:**

    - `distilled`: the distilled set.
    - `start`: the parameterisation that it is decoded from, such as an
        [`eqdistill.Packed`][]; or the distilled set itself.
    - `model`: the model to fit to it, not fitted; or `None` if it is not an
        [`eqdistill.LogisticRegression`][], and cannot be built from a file.
    - `inner`: how to fit it; or `None` if it is not a solver of this package with plain
        numbers for its settings.
    - `recipe`: the recipe of the claim; or `None` if the claim is that of `model`,
        or the recipe or its network is not of this package.
    - `is_by_recipe`: whether the claim is that of a recipe, and not of `model`.
    - `classifier_description`, `inner_description`: the same in words.
    - `accuracy`: the accuracy on the test split that is claimed, from 0 to 1, or
        `None`. With a recipe, the mean over networks.
    - `deviation`: the standard deviation over networks that is claimed, or `None`.
    - `fits`: the number of networks.
    - `key`: the key of the networks, or `None`.
    - `preprocessing`: what was done to the real images first, or `None`.
    - `dataset`: the name of the dataset that was distilled, or `None`.
    - `sha256`: the SHA-256 of each of the dataset's files, if it has any.
    - `learned`: the names of what was learned, such as `"images"` and `"log_l2"`; or
        `None` if that is not known.
    - `seed`: the seed of the run, or `None`.
    - `x64`: whether JAX's double precision was enabled.
    - `versions`: the version of each package that took part.
    """

    distilled: DistilledSet
    start: PyTree
    model: LinearClassifier | None
    inner: AbstractInnerSolver | None
    recipe: Recipe | None
    is_by_recipe: bool
    classifier_description: str
    inner_description: str
    accuracy: float | None
    deviation: float | None
    fits: int
    key: PRNGKeyArray | None
    preprocessing: AbstractPreprocessing | None
    dataset: str | None
    sha256: dict[str, str]
    learned: tuple[str, ...] | None
    seed: int | None
    x64: bool
    versions: dict[str, str]


def load(path: str | os.PathLike) -> Artifact:
    """Loads a distilled set from a file that [`eqdistill.save`][] wrote.

    Safe for files from strangers: everything in the file is checked, nothing in it is
    executed or imported, and what is built of it takes no more room than its size
    allows: 16 times as much and 16 MiB, for the decoded images and for the model.

    **Arguments:**

    - `path`: the file.

    **Returns:**

    An [`eqdistill.Artifact`][]. Double precision is kept if JAX has it enabled, and
    otherwise becomes single precision.

    **Raises:**

    - A `FileNotFoundError` if there is no such file.
    - A `ValueError`, which names the file and what is wrong with it, if it is not as
        [`eqdistill.save`][] writes it.
    """
    return _load(path, in_its_precision=False)


def load_in_its_precision(path: str | os.PathLike) -> Artifact:
    """As [`eqdistill.load`][], in the precision that JAX had when the file was made."""
    return _load(path, in_its_precision=True)


def _load(path: str | os.PathLike, in_its_precision: bool) -> Artifact:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must be a file that exists; got {str(path)!r}."
        )
    try:
        # Devices and pipes may have no end.
        check(path.is_file(), "it is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            check(
                size <= MAX_BYTES,
                f"it must have at most {MAX_BYTES} bytes, and has {size}",
            )
            start = file.read(8)
            header_bytes(start, size)
            data = start + file.read(size - len(start))
        header, metadata = read_header(data)
        now = jnp.result_type(float) == jnp.float64
        with jax.enable_x64(metadata["x64"] if in_its_precision else now):
            return build(data, header, metadata)
    except ValueError as e:
        raise ValueError(f"Cannot load {path}: {shorten(e)}.") from e


def build(data: bytes, header: dict[str, Any], metadata: dict[str, Any]) -> Artifact:
    """Builds an artifact from the bytes of a file.

    **Raises:**

    A `ValueError` with the reason, as a clause.
    """
    start, preprocessing = read_tensors(data, header, metadata)
    distilled = decode(start)
    is_finite = bool(jnp.isfinite(distilled.images).all())
    check(is_finite, "its images must be finite; some pixels are not")
    accuracy, dataset = metadata["accuracy"], metadata["dataset"]
    return Artifact(
        distilled=distilled,
        start=start,
        model=build_classifier(metadata["model"], distilled, data),
        inner=build_inner(metadata["inner"]),
        recipe=build_recipe(metadata["model"]),
        is_by_recipe=metadata["model"]["type"] == "Recipe",
        classifier_description=_in_words(metadata["model"]),
        inner_description=_in_words(metadata["inner"]),
        accuracy=None if accuracy is None else float(accuracy["value"]),
        deviation=None if accuracy is None else accuracy["deviation"],
        fits=1 if accuracy is None else accuracy["fits"],
        key=None
        if accuracy is None or accuracy["key"] is None
        else jr.wrap_key_data(jnp.asarray(accuracy["key"], jnp.uint32)),
        preprocessing=preprocessing,
        dataset=None if dataset is None else dataset["name"],
        sha256={} if dataset is None else dataset["sha256"],
        learned=None if metadata["learned"] is None else tuple(metadata["learned"]),
        seed=metadata["seed"],
        x64=metadata["x64"],
        versions=metadata["versions"],
    )


def _in_words(description: dict[str, Any] | None) -> str:
    if description is None:
        return "none"
    if "text" in description:
        return description["text"]
    fields = (f"{k}={v!r}" for k, v in description.items() if k != "type")
    return f"{description['type']}({', '.join(fields)})"


def shorten(e: ValueError) -> str:
    """The reason of a refusal, without most of what a hostile file makes it quote."""
    reason = str(e).rstrip(".")
    return reason if len(reason) <= 500 else f"{reason[:500]} ..."
