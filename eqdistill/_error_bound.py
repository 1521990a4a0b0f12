import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ._classifier import LogisticRegression
from ._distilled_set import DistilledSet
from ._inner_solver import inner_loss
from ._losses import label_residual, softmax_change


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
    learned: PyTree,
    hypergradient: PyTree,
    adjoint: LogisticRegression,
    cotangent: LogisticRegression,
    mean_square: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""A bound on the Euclidean distance of a hypergradient from the true one, for
    logistic regression without an intercept. `docs/mathematics.md` proves it.

    **Arguments:**

    - `classifier`: where the hypergradient was taken: near the inner problem's
        solution.
    - `distilled`: the distilled set.
    - `learned`: the same, with what is not learned left out.
    - `hypergradient`: that which is to be checked, of the structure of `learned`.
    - `adjoint`: $u$, with which it should have been taken.
    - `cotangent`: the gradient $v$ of the outer loss in the classifier's parameters.
    - `mean_square`: the mean of $\|x\|^2$ over the real images.

    **Returns:**

    The `adjoint_residual`, and the bound. That is in exact arithmetic: it knows nothing
    of rounding, nor of the sampling error where the real images are a batch.

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

    # Of the classifier, and of the adjoint.
    delta = jnp.linalg.norm(n * l2 * weights - images.T @ a) / (n * l2)
    hessian_change = jnp.mean(norms**2 * spread) / 2
    epsilon = (delta * (mean_square / 2 + hessian_change) + residual) / l2

    # The hypergradient in each part, as it follows from the adjoint, and how far it may
    # be moved by these two errors.
    u_norm, w_norm, q_norm = (
        jnp.linalg.norm(u),
        jnp.linalg.norm(weights),
        jnp.linalg.norm(q, axis=1),
    )
    follows, moves = {}, {}
    follows["images"] = (a @ u.T - change @ weights.T) / n
    moves["images"] = (
        epsilon * (jnp.linalg.norm(a, axis=1) + norms * delta / 2)
        + u_norm * norms * delta / 2
        + delta * (q_norm + epsilon * norms) / 2
        + w_norm * (epsilon * norms + spread * norms * delta) / 2
    ) / n
    follows["log_l2"] = -l2 * jnp.sum(u * weights)
    moves["log_l2"] = l2 * (epsilon * (w_norm + delta) + u_norm * delta)
    if distilled.labels.ndim == 2:
        follows["labels"] = softmax_change(distilled.labels, q) / n
        moves["labels"] = epsilon * norms / (2 * n)

    total = jnp.zeros_like(residual)
    for name in follows:
        if getattr(learned, name) is not None:
            got = getattr(hypergradient, name)
            apart = jnp.linalg.norm(got - follows[name].reshape(got.shape))
            total = total + (apart + jnp.linalg.norm(moves[name])) ** 2
    return _relative(residual, cotangent), jnp.sqrt(total)
