import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ._classifier import LogisticRegression
from ._distilled_set import DistilledSet
from ._inner_solver import inner_loss
from ._losses import label_residual, softmax_change


class ErrorBound(eqx.Module):
    """The `value` of the bound on a hypergradient's error, and the `adjoint_residual`;
    and what the inner residual and that of the adjoint contribute to the bound, each
    relative to its size."""

    adjoint_residual: Float[Array, ""]
    value: Float[Array, ""]
    per_inner_residual: Float[Array, ""]
    per_adjoint_residual: Float[Array, ""]

    @staticmethod
    def unknown(adjoint_residual: Float[Array, ""]) -> "ErrorBound":
        inf = jnp.full_like(adjoint_residual, jnp.inf)
        return ErrorBound(adjoint_residual, inf, inf, inf)


def adjoint_residual(
    classifier: PyTree, distilled: DistilledSet, adjoint: PyTree, cotangent: PyTree
) -> Float[Array, ""]:
    r"""$\|H u - v\| / \|v\|$, by which an adjoint $u$ fails to solve its linear system,
    with the Hessian $H$ of the inner loss and the gradient $v$ of the outer loss, both
    in the parameters of the classifier."""
    params, static = eqx.partition(classifier, eqx.is_inexact_array)
    gradient = jax.grad(lambda p: inner_loss(eqx.combine(p, static), distilled))
    adjoint = optax.tree.cast_like(adjoint, params)
    _, product = jax.jvp(gradient, (params,), (adjoint,))
    residual = optax.tree.norm(optax.tree.sub(product, cotangent))
    return _relative(residual, cotangent)


def _relative(residual: Float[Array, ""], cotangent: PyTree) -> Float[Array, ""]:
    scale = optax.tree.norm(cotangent)
    return residual / jnp.where(scale > 0, scale, 1)


def error_bound(
    classifier: LogisticRegression,
    distilled: DistilledSet,
    hypergradient: PyTree,
    adjoint: LogisticRegression,
    cotangent: LogisticRegression,
    mean_square: Float[Array, ""],
) -> ErrorBound:
    r"""A bound on the Euclidean distance of a hypergradient from the true one, for
    logistic regression without an intercept. `docs/mathematics.md` proves it.

    **Arguments:**

    - `classifier`: where the hypergradient was taken: near the inner problem's
        solution.
    - `distilled`: the distilled set.
    - `hypergradient`: that which is to be checked: of the structure of `distilled`, but
        that what is not learned is left out.
    - `adjoint`: $u$, with which it should have been taken.
    - `cotangent`: the gradient $v$ of the outer loss in the classifier's parameters.
    - `mean_square`: the mean of $\|x\|^2$ over the real images.

    **Returns:**

    An [`ErrorBound`][]. That is in exact arithmetic: it knows nothing of rounding, nor
    of the sampling error where the real images are a batch.

    Source: Blondel et al., *Efficient and modular implicit differentiation*, 2022,
    Theorem 1, and Pedregosa, *Hyperparameter optimization with approximate gradient*,
    2016, Theorem 1, for the principle, with the constants of logistic regression.
    """
    n = len(distilled)
    l2 = distilled.l2
    images = distilled.images.reshape(n, -1)
    weights, u = classifier.weights, adjoint.weights
    logits, q = images @ weights, images @ u
    a = label_residual(logits, distilled.labels)
    norms = jnp.linalg.norm(images, axis=1)
    spread = jnp.max(q, axis=1) - jnp.min(q, axis=1)
    change = softmax_change(logits, q)
    residual = jnp.linalg.norm(images.T @ change / n + l2 * u - cotangent.weights)

    inner_residual = jnp.linalg.norm(n * l2 * weights - images.T @ a) / n

    # The hypergradient in each part, as it follows from the adjoint.
    follows = {
        "images": (a @ u.T - change @ weights.T) / n,
        "log_l2": -l2 * jnp.sum(u * weights),
    }
    if distilled.labels.ndim == 2:
        follows["labels"] = softmax_change(distilled.labels, q) / n
    apart = {}
    for name, value in follows.items():
        got = getattr(hypergradient, name)
        if got is not None:
            apart[name] = jnp.linalg.norm(got - value.reshape(got.shape))

    a_norm, u_norm, w_norm, q_norm = (
        jnp.linalg.norm(a, axis=1),
        jnp.linalg.norm(u),
        jnp.linalg.norm(weights),
        jnp.linalg.norm(q, axis=1),
    )
    hessian_change = jnp.mean(norms**2 * spread) / 2

    def move(inner_residual, residual) -> dict[str, Float[Array, ""]]:
        """How far each part may be moved by the errors of the two solves."""
        # Of the classifier, and of the adjoint.
        delta = inner_residual / l2
        epsilon = (delta * (mean_square / 2 + hessian_change) + residual) / l2
        of_images = (
            epsilon * (a_norm + norms * delta / 2)
            + u_norm * norms * delta / 2
            + delta * (q_norm + epsilon * norms) / 2
            + w_norm * (epsilon * norms + spread * norms * delta) / 2
        ) / n
        moves = {
            "images": jnp.linalg.norm(of_images),
            "log_l2": l2 * (epsilon * (w_norm + delta) + u_norm * delta),
            "labels": epsilon * jnp.linalg.norm(norms) / (2 * n),
        }
        return {name: moves[name] for name in apart}

    def rate(inner_residual, residual):
        moves = move(inner_residual, residual)
        return optax.tree.norm(moves) / (inner_residual + residual)

    moves = move(inner_residual, residual)
    scale = optax.tree.norm(cotangent)
    eps = jnp.finfo(residual.dtype).eps
    return ErrorBound(
        adjoint_residual=_relative(residual, cotangent),
        value=optax.tree.norm(optax.tree.add(apart, moves)),
        per_inner_residual=rate(jnp.maximum(inner_residual, eps), 0.0),
        per_adjoint_residual=scale * rate(0.0, jnp.maximum(residual, eps)),
    )
