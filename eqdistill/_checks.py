import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._classifier import Frozen, parameters
from ._typechecking import describe


def check_model(classifier: PyTree, image: jax.ShapeDtypeStruct) -> int:
    """Checks that a classifier can be fitted, and applied to an image of this shape.

    **Returns:**

    The number of classes.

    **Raises:**

    A `TypeError` or `ValueError` that names `classifier` and what is wrong with it.
    """
    check_callable("classifier", classifier)
    _refuse_state(classifier)
    if not any(jax.tree.leaves(parameters(classifier))):
        raise ValueError(
            "`classifier` must have parameters to fit: floating-point arrays that are "
            "not inside a `Frozen`. It has none."
        )
    return count_outputs("classifier", classifier, image)


def name_kind(x: Any) -> str:
    is_class = isinstance(x, type)
    return f"the class {x.__name__} itself" if is_class else f"a {type(x).__name__}"


def count_outputs(name: str, classifier: Any, image: jax.ShapeDtypeStruct) -> int:
    """The number of a classifier's outputs for an image of this shape.

    **Raises:**

    A `ValueError` that names the classifier by `name`.
    """
    try:
        logits = eqx.filter_eval_shape(eqx.nn.inference_mode(classifier), image)
    except Exception as e:
        raise ValueError(
            f"`{name}` could not be applied to an image of shape {image.shape}: {e}"
        ) from e
    if not (
        isinstance(logits, jax.ShapeDtypeStruct)
        and logits.ndim == 1
        and jnp.issubdtype(logits.dtype, jnp.floating)
    ):
        raise ValueError(
            f"`{name}` must map one image to floating-point logits of shape (c,); "
            f"for an image of shape {image.shape} it gave {logits}."
        )
    return logits.shape[0]


def _refuse_state(classifier: PyTree) -> None:
    """A fit cannot carry the running statistics of a layer along."""
    is_node = lambda x: isinstance(x, Frozen | eqx.nn.StateIndex)
    found, _ = jax.tree.flatten_with_path(classifier, is_leaf=is_node)
    for path, node in found:
        if isinstance(node, eqx.nn.StateIndex):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise TypeError(
                "`classifier` must not hold state, as batch normalisation does; got an "
                f"`equinox.nn.StateIndex` at `{where}`. Use `equinox.nn.GroupNorm` or "
                "`equinox.nn.LayerNorm`. A trained network with state may be used "
                "inside a `Frozen`, as a module that holds the `equinox.nn.State`, too."
            )


def check_at_least(least: float, **values: float | None) -> None:
    """**Raises:**

    A `ValueError` for a number below the least, or that is not finite. None is left
    out.
    """
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            wanted = f"at least {least}" if math.isfinite(value) else "finite"
            raise ValueError(f"`{name}` must be {wanted}; got {value}.")


def check_positive(**values: float | None) -> None:
    """**Raises:**

    A `ValueError` for a number that is not positive and finite. None is left out.
    """
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive and finite; got {value}.")


def check_callable(name: str, x: Any) -> None:
    """**Raises:**

    A `TypeError` for what is no callable module.
    """
    if not callable(x) or isinstance(x, type):
        raise TypeError(
            f"`{name}` must be a callable `equinox.Module`, from one image to its "
            f"logits; got {name_kind(x)}."
        )


def check_key(name: str, key: Any) -> None:
    """Refuses what is neither `None` nor one new-style key, and says how to make one.

    **Raises:**

    A `TypeError`.
    """
    if key is None:
        return
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    if not is_key or key.shape != ():
        raise TypeError(
            f"`{name}` must be one key, as `jax.random.key(0)` makes it; got "
            f"{describe(key)}."
        )


def array_difference(wanted: PyTree, got: PyTree) -> str | None:
    """Where two trees of arrays differ in structure, shapes or dtypes, in words; or
    `None` if they do not. Other leaves than arrays are a difference, too."""
    found = [jax.tree.flatten_with_path(tree) for tree in (wanted, got)]
    (wanted_leaves, wanted_structure), (got_leaves, got_structure) = found
    a, b = (
        {jax.tree_util.keystr(path): _describe(x) for path, x in leaves}
        for leaves in (wanted_leaves, got_leaves)
    )
    lines = [
        f"`{path}`: {a.get(path, 'nothing')} wanted, {b.get(path, 'nothing')} got"
        for path in {**a, **b}
        if a.get(path) != b.get(path) or "no array" in b[path]
    ]
    if not lines and wanted_structure != got_structure:
        lines = [f"structure {wanted_structure} wanted, {got_structure} got"]
    if not lines:
        return None
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _describe(x: Any) -> str:
    if eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct):
        return f"{x.dtype} of shape {x.shape}"
    return f"no array, but a {type(x).__name__}"
