import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from .._checks import (
    array_difference,
    check_model,
    check_key,
    count_outputs,
)
from .._data._distilled_set import DistilledSet
from .._error import error_if
from ._auto_solver import AutoSolver
from ._inner_solver import AbstractDrawingSolver, AbstractInnerSolver, Fitted


NOT_CONVERGED = "the inner solver did not converge"
COLLAPSED = (
    "the fit has collapsed: the model gives every distilled image the same "
    "logits, and nothing can be learned from it. The ridge is too large for this "
    "network, or the images are too weak: try `l2=1e-3` or less, and images as strong "
    "as the data, such as noise with `scale=0.3`"
)


def fit(
    distilled: DistilledSet,
    model: PyTree,
    inner: AbstractInnerSolver = AutoSolver(),
    *,
    key: PRNGKeyArray | None = None,
    throw: bool = True,
) -> Fitted:
    r"""Fits a model to a distilled set: $w^\star(\theta)$.

    Composes with `jax.jit`, `jax.vmap` and automatic differentiation in `distilled`.

    **Arguments:**

    - `distilled`: the distilled set.
    - `model`: an `equinox.Module` from one image, of shape `(*shape,)`, to its
        logits, of shape `(c,)`. Its [`eqdistill.parameters`][] are fitted. Or `None`,
        for an [`eqdistill.AbstractDrawingSolver`][], such as [`eqdistill.Pool`][].
    - `inner`: how to fit it.
    - `key`: a `jax.random.key`, for a solver that draws random numbers. (Keyword only
        argument.)
    - `throw`: what to do if the fit does not converge, or collapses. If `True` then an
        error is raised; if `False` then `converged` and `collapsed` of the result tell.
        (Keyword only argument.)

    **Returns:**

    An [`eqdistill.Fitted`][].

    **Raises:**

    - A `TypeError` or `ValueError` if the model cannot be applied to the distilled
        images, holds state, or has an output that is not a vector of logits; or if the
        labels are not of its classes.
    - A `TypeError` if the inner solver does not return what
        [`eqdistill.AbstractInnerSolver`][] says.
    - A `RuntimeError` as `throw` says.
    """
    check_key("key", key)
    distilled = check_inner(distilled, model, inner)
    fitted = _fit(distilled, model, inner, key)
    if throw:
        # Outside of the compiled program: JAX's persistent compilation cache does not
        # keep a program that may raise an error.
        fitted = _throw(fitted, fitted.collapsed, f"No fit: {COLLAPSED}.")
        fitted = _throw(
            fitted,
            ~fitted.converged,
            f"No fit: {NOT_CONVERGED}. Give it more steps or a looser tolerance, or "
            "raise `l2`; a training run that diverged needs a smaller step size. "
            "`fit(..., throw=False)` tells the gradient norm.",
        )
    return fitted


def _throw(fitted: Fitted, is_bad: Bool[Array, ""], message: str) -> Fitted:
    if not isinstance(is_bad, Tracer):
        if is_bad:
            raise RuntimeError(message)
        return fitted
    # Equinox passes no keys through.
    arrays, rest = eqx.partition(fitted, eqx.is_inexact_array)
    return eqx.combine(eqx.error_if(arrays, is_bad, message), rest)


@eqx.filter_jit
def _fit(distilled, model, inner, key) -> Fitted:
    init_key, solver_key = (None, None) if key is None else jax.random.split(key)
    state = inner.init(distilled, model, key=init_key)
    fitted, _ = solve(distilled, model, inner, state, key=solver_key)
    return fitted


def solve(
    distilled: DistilledSet,
    model: PyTree,
    inner: AbstractInnerSolver,
    state: PyTree,
    *,
    key: PRNGKeyArray | None,
) -> tuple[Fitted, PyTree]:
    """Calls an inner solver, and checks what it returns.

    **Raises:**

    A `TypeError` if that is not as [`eqdistill.AbstractInnerSolver`][] says.
    """
    name = type(inner).__name__
    found = inner(distilled, model, state, key=key)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise TypeError(
            f"`inner` must return a pair of a `Fitted` and a state; `{name}` returned "
            f"a {type(found).__name__}."
        )
    fitted, new_state = found
    if not isinstance(fitted, Fitted):
        raise TypeError(
            f"`inner` must return a `Fitted` first; `{name}` returned a "
            f"{type(fitted).__name__}."
        )
    difference = array_difference(state, new_state)
    if difference is not None:
        raise TypeError(
            "`inner` must return a state of arrays only, with the structure, shapes "
            f"and dtypes of the state that it was given; `{name}` did not: "
            f"{difference}."
        )
    count_outputs(
        f"{name}(...)[0].model", fitted.model, image_struct(distilled)
    )
    # A norm that overflows or is NaN is no sign of a solution.
    is_finite = jnp.isfinite(fitted.gradient_norm)
    fitted = eqx.tree_at(lambda f: f.converged, fitted, fitted.converged & is_finite)
    return fitted, new_state


def image_struct(distilled: DistilledSet) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(distilled.images.shape[1:], distilled.images.dtype)


def check_inner(
    distilled: DistilledSet, model: PyTree, inner: AbstractInnerSolver
) -> DistilledSet:
    """Checks that a model can be fitted to a distilled set.

    **Returns:**

    The distilled set, which carries the check of its labels if they are traced.

    **Raises:**

    A `TypeError` or `ValueError` that names the argument at fault.
    """
    name = type(inner).__name__
    draws = isinstance(inner, AbstractDrawingSolver)
    if model is None and not draws:
        raise TypeError(f"`model` must be given with `{name}`; got None.")
    if model is not None and draws:
        raise TypeError(
            f"`model` must be None with `{name}`, which draws models of its "
            f"own; got a {type(model).__name__}."
        )
    num_classes = count_classes(distilled, model, inner)
    fitted = f"`{name}`" if draws else "`model`"
    labels = distilled.labels
    if labels.ndim == 2:
        if labels.shape[1] != num_classes:
            raise ValueError(
                f"`distilled.labels` must have a column for each of the {num_classes} "
                f"classes of {fitted}; got shape {labels.shape}."
            )
        return distilled
    labels = error_if(
        labels,
        lambda x: ((x < 0) | (x >= num_classes)).any(),
        f"`distilled.labels` must be in [0, {num_classes}), the classes of {fitted}; "
        "some are not.",
    )
    return eqx.tree_at(lambda d: d.labels, distilled, labels)


def count_classes(
    distilled: DistilledSet, model: PyTree, inner: AbstractInnerSolver
) -> int:
    """The number of classes of the model that is fitted."""
    if isinstance(inner, AbstractDrawingSolver):
        return inner.num_classes
    return check_model(model, image_struct(distilled))
