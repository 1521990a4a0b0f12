import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float, PyTree

from ._classifier import LogisticRegression
from ._error_bound import adjoint_residual, error_bound, ErrorBound
from ._inner_solver import AbstractInnerSolver, Fitted
from ._layout import AbstractLayout, data_loss


class Hypergradient(eqx.Module):
    """The outer loss on a batch, its gradient, and what is known of its error."""

    loss: Float[Array, ""]
    gradient: PyTree
    error_bound: ErrorBound


def hypergradient(
    learned: PyTree,
    frozen: PyTree,
    classifier: PyTree,
    inner: AbstractInnerSolver,
    batch: AbstractLayout,
) -> tuple[Hypergradient, Fitted]:
    """Step by step, rather than by `jax.grad`: the fit, the gradient of the loss in the
    classifier's parameters, and that pulled back. The derivative in the tilt of the
    inner problem, which is the adjoint, is had with it."""
    params = eqx.filter(classifier, eqx.is_inexact_array)

    def fit(learned, tilt):
        fitted = inner(classifier, eqx.combine(learned, frozen), tilt)
        return eqx.filter(fitted.classifier, eqx.is_inexact_array), fitted

    tilt = optax.tree.zeros_like(params)
    _, pull_back, fitted = jax.vjp(fit, learned, tilt, has_aux=True)
    value_and_grad = eqx.filter_value_and_grad(data_loss)
    loss, cotangent = value_and_grad(fitted.classifier, batch)
    cotangent = eqx.filter(cotangent, eqx.is_inexact_array)
    gradient, minus_adjoint = pull_back(cotangent)
    adjoint = optax.tree.scale(-1.0, minus_adjoint)

    distilled = eqx.combine(learned, frozen)
    solved = fitted.classifier, distilled
    if isinstance(classifier, LogisticRegression) and classifier.intercept is None:
        bound = error_bound(*solved, gradient, adjoint, cotangent, batch.mean_square)
    else:
        bound = ErrorBound.unknown(adjoint_residual(*solved, adjoint, cotangent))
    return Hypergradient(loss, gradient, bound), fitted
