from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from .._checks import array_difference, check_lengths, check_model, count_outputs
from .._data._distilled_set import DistilledSet
from .._typechecking import describe
from ._auto_solver import AutoSolver
from ._inner_solver import AbstractInnerSolver, Fitted


NOT_CONVERGED = "the inner solver did not converge"
COLLAPSED = (
    "the fit has collapsed: the model gives all distilled images the same outputs, and "
    "nothing can be learned from it. The ridge is too large for this model, or the "
    "images are too weak: try `l2=1e-3` or less, and images as strong as the data, "
    "such as noise with `scale=0.3`"
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
    - `model`: an `equinox.Module` that maps one example, of shape `(*shape,)`, to its
        outputs, of shape `(c,)`. Its [`eqdistill.nn.parameters`][] are fitted.
    - `inner`: how to fit the model.
    - `key`: a `jax.random.key`, for solvers that draw random numbers. Defaults to
        `jax.random.key(0)`. (Keyword only argument.)
    - `throw`: whether to raise an error if the fit does not converge, or collapses. If
        `False`, see `converged` and `collapsed` of the result. (Keyword only argument.)

    **Returns:**

    An [`eqdistill.Fitted`][].

    **Raises:**

    - A `TypeError` or `ValueError` if the model cannot be applied to the distilled
        images, holds state, or does not return a vector; or if the labels do not
        match its outputs.
    - A `TypeError` if the solver breaks [`eqdistill.AbstractInnerSolver`][]'s contract.
    - A `RuntimeError` if the fit fails and `throw` is true.
    """
    check_fit(distilled, model)
    fitted = _fit(distilled, model, inner, jr.key(0) if key is None else key)
    if throw:
        # Outside the compiled program: programs with callbacks are not cached.
        fitted = _throw(fitted, fitted.collapsed, f"No fit: {COLLAPSED}.")
        fitted = _throw(
            fitted,
            ~fitted.converged,
            f"No fit: {NOT_CONVERGED}. Allow more steps or a looser tolerance, or "
            "raise `l2`; a training run that diverged needs a smaller step size. "
            "`fit(..., throw=False)` returns the gradient norm.",
        )
    return fitted


def _throw(fitted: Fitted, is_bad: Bool[Array, ""], message: str) -> Fitted:
    if not isinstance(is_bad, Tracer):
        if is_bad:
            raise RuntimeError(message)
        return fitted
    # `eqx.error_if` does not accept keys.
    arrays, rest = eqx.partition(fitted, eqx.is_inexact_array)
    return eqx.combine(eqx.error_if(arrays, is_bad, message), rest)


@eqx.filter_jit
def _fit(distilled, model, inner, key) -> Fitted:
    init_key, solver_key = jr.split(key)
    state = inner.init(distilled, model, key=init_key)
    return solve(distilled, model, inner, state, solver_key)[0]


def solve(
    distilled: DistilledSet,
    model: PyTree,
    inner: AbstractInnerSolver,
    state: PyTree,
    key: PRNGKeyArray,
) -> tuple[Fitted, PyTree]:
    """Calls an inner solver, and checks that it returns what
    [`eqdistill.AbstractInnerSolver`][] promises."""
    name = type(inner).__name__
    found = inner(distilled, model, state, key=key)
    is_pair = isinstance(found, tuple) and len(found) == 2
    if not is_pair or not isinstance(found[0], Fitted):
        raise TypeError(
            "`inner` must return a pair of a `Fitted` and a state; "
            f"`{name}` returned {describe(found)}."
        )
    fitted, new_state = found
    difference = array_difference(state, new_state)
    if difference is not None:
        raise TypeError(
            "`inner` must return a state of arrays only, with the structure, shapes "
            f"and dtypes of the state that it was given; `{name}` did not: "
            f"{difference}."
        )
    count_outputs(f"{name}(...)[0].model", fitted.model, image_struct(distilled))
    # A norm that overflows or is NaN does not indicate a solution.
    converged = fitted.converged & jnp.isfinite(fitted.gradient_norm)
    return replace(fitted, converged=converged), new_state


def check_fit(distilled: DistilledSet, model: PyTree) -> int:
    """Checks that a model can be fitted to a distilled set, and returns the number of
    its outputs. Traced labels are not checked."""
    num_outputs = check_model(model, image_struct(distilled))
    labels = distilled.labels
    check_lengths("distilled", distilled.images, labels)
    if labels.ndim == 2:
        if labels.shape[1] != num_outputs:
            raise ValueError(
                f"`distilled.labels` must have a column for each of the {num_outputs} "
                f"outputs of `model`; got shape {labels.shape}."
            )
    elif not isinstance(labels, Tracer):
        values = np.asarray(labels)
        low, high = values.min(), values.max()
        if low < 0 or high >= num_outputs:
            raise ValueError(
                f"`distilled.labels` must be in [0, {num_outputs}), as `model` has "
                f"{num_outputs} outputs; got values from {low} to {high}."
            )
    return num_outputs


def image_struct(distilled: DistilledSet) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(distilled.images.shape[1:], distilled.images.dtype)
