"""Saving and loading: [`eqdistill.save`][] and [`eqdistill.load`][]."""

import importlib.metadata
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._data._parameterisation import AbstractParameterisation
from .._data._preprocessing import AbstractPreprocessing
from .._losses import AbstractLoss
from .._outer._distillation import Distillation
from .._outer._evaluate import Evaluation
from ..datasets import _published_hashes
from ..recipes import Recipe
from ._artifact import Artifact, from_bytes, to_bytes
from ._recipe_arrays import named_arrays, to_words
from ._table import check, is_in_table, MAX_BYTES, TABLE


_PACKAGES = ("eqdistill", "jax", "jaxlib", "equinox", "optimistix", "lineax", "optax")


def save(
    path: str | os.PathLike,
    result: Distillation | AbstractParameterisation,
    evaluation: Evaluation | None = None,
    *,
    preprocessing: AbstractPreprocessing | None = None,
    dataset: str | None = None,
    seed: int | None = None,
    source: str | None = None,
) -> None:
    """Saves a distilled set to a file, with everything that others need to check it:
    the score and the recipe it was measured with, the dataset and its hashes, and
    the versions of the packages. The file holds arrays and text, but no code, in the
    safetensors format.

    Images take half the bytes if they have been rounded to float16. The file then
    claims the score that you measured with the rounded images:

    !!! Example
        ```python
        rounded = distilled.images.astype(jax.numpy.float16).astype(float)
        distilled = equinox.tree_at(lambda d: d.images, distilled, rounded)
        evaluation = eqd.evaluate(distilled, recipe, test)
        eqd.save("half.safetensors", distilled, evaluation, dataset="mnist")
        ```

    **Arguments:**

    - `path`: a file name that ends in `.safetensors`. An existing file is replaced once
        the new one is completely written.
    - `result`: the result of [`eqdistill.distill`][], which includes the names of the
        learned arrays; or a distilled set, or an [`eqdistill.Packed`][]. For a
        parameterisation that is not registered, the decoded images are stored.
    - `evaluation`: the result of [`eqdistill.evaluate`][] on the test split, for one
        set. The file claims its score, and stores its recipe and key. By default the
        file claims nothing.

    The recipe can be rebuilt in two cases: it is one of `eqdistill.recipes` with a
    network from `eqdistill.nn`; or its models are logistic regression or networks from
    `eqdistill.nn`, fresh or with fixed initial weights, and its inner solver is a
    solver from this package in which only numbers differ from the defaults. For
    [`eqdistill.UnrolledSolver`][], the optimiser must be Optax's `sgd`, `adam`,
    `adamw`, `nadam`, `lion`, `rmsprop` or `adagrad`, with any numbers.

    For any other recipe, the file stores a description with all settings; all arrays,
    such as learned step sizes and fixed initial weights; and for an
    [`eqdistill.nn.Frozen`][] backbone, not its arrays but their SHA-256. To check such
    a file, you need a function that returns the recipe. The `restore` method of the
    [`Artifact`][] fills in the arrays.

    All other arguments are keyword only.

    - `preprocessing`: the preprocessing that was applied to the real images, such as an
        [`eqdistill.datasets.Standardisation`][]. The distilled images are in its units.
    - `dataset`: the name of the dataset, as in [`eqdistill.datasets.load`][].
    - `seed`: the seed of the run.
    - `source`: the source code of your own network, as text for whoever reads the file.

    **Raises:** a `ValueError` if the loss or the preprocessing is not registered, if a
    value is not finite or is out of range, or if the objective has learned arrays that
    the recipe of `evaluation` does not use. Arrays of an outer loss need not be used.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in '.safetensors'; got '{path}'.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must be in a folder that exists; got '{path}'."
        )
    start = result.start if isinstance(result, Distillation) else result
    if type(start).__name__ not in TABLE:
        start = start.decode()
    try:
        claim = _claim(evaluation)
        if isinstance(result, Distillation):
            _check_learned(result, claim["recipe"])
        artifact = Artifact(
            distilled=start.decode(),
            start=start,
            recipe_arrays={},
            backbones={},
            **claim,
            preprocessing=preprocessing,
            dataset=dataset,
            sha256={} if dataset is None else _published_hashes(dataset),
            learned=result.learned if isinstance(result, Distillation) else None,
            seed=None if seed is None else int(seed),
            source=source,
            x64=jnp.result_type(float) == jnp.float64,
            versions={x: importlib.metadata.version(x) for x in _PACKAGES},
        )
        data = to_bytes(artifact)
    except Exception as e:
        raise _refusal("save", path, e) from e
    # Write into a temporary folder, so that the file gets the usual permissions.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def load(path: str | os.PathLike) -> Artifact:
    """Loads a distilled set from a file that [`eqdistill.save`][] wrote.

    Files from strangers are safe to load: everything in the file is checked, and
    nothing in it is executed or imported. At most 16 times the size of the file plus 16
    MiB are allocated for the decoded images and the model.

    **Arguments:**

    - `path`: the file.

    **Returns:** an [`Artifact`][]. Double precision becomes single precision unless JAX
    has double precision enabled.

    **Raises:** a `ValueError`, which names the file and the cause, if
    [`eqdistill.save`][] could not have written it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a file that exists; got '{path}'.")
    try:
        # Devices and pipes may have no end.
        check(path.is_file(), "it is not a regular file")
        size = path.stat().st_size
        check(size <= MAX_BYTES, f"it has {size} bytes, more than {MAX_BYTES}")
        with path.open("rb") as file:
            return from_bytes(file.read(size))
    except Exception as e:  # A hostile file may cause any exception.
        raise _refusal("load", path, e) from e


def _refusal(verb: str, path: Path, e: Exception) -> ValueError:
    reason = str(e).strip().rstrip(".") or type(e).__name__
    # Hostile files may cause a long message.
    reason = reason if len(reason) <= 500 else f"{reason[:500]} ..."
    return ValueError(f"Cannot {verb} {path}: {reason}.")


def _claim(evaluation: Evaluation | None) -> dict[str, Any]:
    names = ("recipe", "recipe_description", "prepare", "metric", "score", "std", "key")
    if evaluation is None:
        return dict.fromkeys(names) | {"num_models": 0}
    sets, num_models = evaluation.scores.shape
    check(sets == 1, f"`evaluation` must be of one distilled set; got {sets}")
    recipe = evaluation.recipe
    return {
        "recipe": recipe,
        "recipe_description": to_words(recipe),
        "prepare": recipe.prepare if is_in_table(recipe.prepare) else None,
        "metric": evaluation.metric,
        "score": evaluation.score,
        "std": evaluation.std_models if num_models > 1 else None,
        "key": evaluation.key,
        "num_models": num_models,
    }


def _check_learned(result: Distillation, recipe: Recipe | None) -> None:
    """Checks that the recipe has the learned arrays of an objective. Arrays of an outer
    loss are no longer needed."""
    is_loss = lambda x: isinstance(x, AbstractLoss)
    objective = jax.tree.map(
        lambda x: None if is_loss(x) else x, result.objective, is_leaf=is_loss
    )
    kept = named_arrays(recipe).values()
    for name, x in named_arrays({"objective": objective}).items():
        # A recipe may hold the exponentials of learned logarithms, rounded.
        is_kept = any(
            x.shape == y.shape and np.allclose(x, y, 1e-4, 1e-4) for y in kept
        )
        check(
            is_kept or name not in result.learned,
            f"the learned `{name}` would be lost, because the recipe of `evaluation` "
            "has no such array. Evaluate with `result.objective.models` and "
            "`inner=result.objective.inner`, which keeps it; or save "
            "`result.distilled`, without it",
        )
