import equinox as eqx
from jaxtyping import PyTree

from ._auto_solver import AutoSolver
from ._checks import check_inner
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver, Fitted


def fit(
    distilled: DistilledSet,
    classifier: PyTree,
    inner: AbstractInnerSolver = AutoSolver(),
    *,
    throw: bool = True,
) -> Fitted:
    r"""Fits a classifier to a distilled set: $w^\star(\theta)$.

    Composes with `jax.jit`, `jax.vmap` and automatic differentiation with respect to
    `distilled`.

    **Arguments:**

    - `distilled`: the distilled set.
    - `classifier`: an `equinox.Module` from one image, of shape `(*shape,)`, to its
        logits, of shape `(c,)`. Every floating-point array in it is a parameter.
    - `inner`: how to fit it.
    - `throw`: what to do if the fit does not converge. If `True` then an error is
        raised; if `False` then the result's `converged` tells. (Keyword only argument.)

    **Returns:**

    A [`eqdistill.Fitted`][].

    **Raises:**

    A `TypeError` or `ValueError` if the classifier cannot be applied to the distilled
    images, if its output is not a vector of logits, or if the labels are not of its
    classes; and as `throw` says.
    """
    fitted = _fit(check_inner(distilled, classifier), classifier, inner)
    if throw:
        # Not in the program: with an error in it, it would not be kept in JAX's
        # persistent compilation cache.
        fitted = eqx.error_if(
            fitted,
            ~fitted.converged,
            "The inner solver did not converge: the classifier is not fitted to the "
            "distilled set. Give it more steps or a looser tolerance, or raise `l2`.",
        )
    return fitted


@eqx.filter_jit
def _fit(distilled, classifier, inner) -> Fitted:
    return inner(classifier, distilled)
