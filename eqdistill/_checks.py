"""Checks for arguments whose types are right but whose values are not."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ._classifier import Frozen, parameters
from ._typechecking import describe


def error_if(x: Array, is_bad: Callable, message: str) -> Array:
    """Raises a `ValueError` if `x` is bad. A traced floating-point array that is bad
    becomes NaN instead. Traced integers are not checked."""
    # Don't use `eqx.error_if`: it hangs on several devices, and programs with callbacks
    # are not cached. Use NumPy where possible, so that nothing is compiled.
    if not isinstance(x, jax.core.Tracer):
        if is_bad(np.asarray(x)):
            raise ValueError(message)
    elif jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.where(is_bad(x), jnp.nan, x)
    return x


def check_at_least(least: float, **values: float | None) -> None:
    """Checks that numbers are finite and at least `least`. Skips `None`."""
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            wanted = f"at least {least}" if math.isfinite(value) else "finite"
            raise ValueError(f"`{name}` must be {wanted}; got {value}.")


def check_positive(**values: float | None) -> None:
    """Checks that numbers are positive and finite. Skips `None`."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive and finite; got {value}.")


def check_between(low: float, high: float, **values: float) -> None:
    """Checks that numbers are from `low` to `high`."""
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"`{name}` must be from {low} to {high}; got {value}.")


def check_concrete(name: str, **values: PyTree) -> None:
    """Checks that the arguments of a function contain no traced arrays."""
    for argument, value in values.items():
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value)):
            raise TypeError(
                f"`{argument}` of `{name}` must not be traced. Call `{name}` outside "
                "of `jit`."
            )


def check_lengths(name: str, images: Array, labels: Array) -> None:
    """Checks that there is a label for each image. `equinox.tree_at` can break this."""
    if len(labels) != len(images):
        raise ValueError(
            f"`{name}.labels` must have a label for each of the {len(images)} images; "
            f"got {len(labels)}."
        )


@contextlib.contextmanager
def needs(name: str, package: str, extra: str) -> Iterator[None]:
    """Adds the command that installs the missing package to an `ImportError`."""
    try:
        yield
    except ImportError as e:
        hint = f"pip install 'eqdistill[{extra}]'"
        raise ImportError(f"{name} needs {package}: {hint}.") from e


def check_callable(model: Any) -> None:
    """Checks that a model is callable, and not a class."""
    if not callable(model) or isinstance(model, type):
        raise TypeError(
            "`model` must be a callable `equinox.Module` that maps one image to its "
            f"outputs; got {describe(model)}."
        )


def check_make(name: str, make: Any) -> None:
    """Checks that `make(key=key)` is a valid call."""
    try:
        inspect.signature(make).bind(key=None)
    except (TypeError, ValueError) as e:
        raise TypeError(
            f"`{name}` must be a function of `key` alone that builds a network, such "
            "as `functools.partial(eqdistill.nn.ConvNet, (28, 28), 10)`; got "
            f"{describe(make)} ({e})."
        ) from None


def check_model(model: PyTree, image: jax.ShapeDtypeStruct) -> int:
    """Checks that a model can be fitted and applied to an image of this shape, and
    returns the number of its outputs."""
    check_callable(model)
    is_node = lambda x: isinstance(x, Frozen | eqx.nn.StateIndex)
    nodes, _ = jax.tree.flatten_with_path(model, is_leaf=is_node)
    for path, node in nodes:
        if isinstance(node, eqx.nn.StateIndex):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise TypeError(
                "`model` must not hold state, as a fit cannot update the running "
                "statistics of batch normalisation; got an `equinox.nn.StateIndex` at "
                f"`{where}`. Use `equinox.nn.GroupNorm` or `equinox.nn.LayerNorm`. A "
                "trained network with state may be used inside a `Frozen`, in a module "
                "that also holds its `equinox.nn.State`."
            )
    if not any(jax.tree.leaves(parameters(model))):
        raise ValueError(
            "`model` must have parameters to fit, which are floating-point arrays "
            f"outside any `Frozen`; got {describe(model)}, which has none."
        )
    return count_outputs("model", model, image)


def count_outputs(name: str, model: Any, image: jax.ShapeDtypeStruct) -> int:
    """Returns the number of a model's outputs for an image of this shape."""
    try:
        outputs = eqx.filter_eval_shape(eqx.nn.inference_mode(model), image)
    except Exception as e:
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        raise ValueError(
            f"`{name}` must take an image of shape {image.shape}; it raised: {reason}"
        ) from e
    is_array = isinstance(outputs, jax.ShapeDtypeStruct) and outputs.ndim == 1
    if not is_array or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` must map one image to floating-point outputs of shape (c,); for "
            f"an image of shape {image.shape} it returned {describe(outputs)}."
        )
    return outputs.shape[0]


def array_difference(
    wanted: PyTree, got: PyTree, *, check_structure: bool = True
) -> str | None:
    """Describes how two pytrees of arrays differ in names, shapes, dtypes or structure,
    or returns `None`. A leaf of `got` that is not an array counts as a difference."""
    texts: list[dict[str, str]] = []
    for tree, describe_other in ((wanted, lambda _: "an array"), (got, describe)):
        texts.append({})
        for path, x in jax.tree.leaves_with_path(tree):
            text = describe_other(x)
            if eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct):
                text = describe(jax.ShapeDtypeStruct(x.shape, x.dtype))
            texts[-1][f"`{jax.tree_util.keystr(path)}`: " if path else ""] = text
    a, b = texts
    lines = [
        f"{name}{a.get(name, 'nothing')} wanted, {b.get(name, 'nothing')} got"
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    ]
    structures = jax.tree.structure(wanted), jax.tree.structure(got)
    if not lines and check_structure and structures[0] != structures[1]:
        lines = ["structure {} wanted, {} got".format(*structures)]
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more or None
