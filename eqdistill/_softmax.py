"""Derivatives of the cross-entropy to full relative precision, even where terms nearly
cancel. The weights of a fit with a small ridge depend on these small differences."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._conversions import Labels


@jax.custom_jvp
def label_residual(logits: Float[Array, "n c"], labels: Labels) -> Float[Array, "n c"]:
    r"""The label probabilities minus the predicted probabilities, $t -
    \mathrm{softmax}(z)$."""
    log_p = jax.nn.log_softmax(logits)
    c = logits.shape[1]
    if labels.ndim == 1:
        is_top = jax.nn.one_hot(labels, c, dtype=bool)
        difference = -jnp.exp(log_p)
    else:
        log_t = jax.nn.log_softmax(labels)
        is_top = jax.nn.one_hot(jnp.argmax(log_t, axis=1), c, dtype=bool)
        ratio = log_p - log_t
        is_close = jnp.abs(ratio) < 1
        difference = jnp.where(
            is_close,
            -jnp.exp(log_t) * jnp.expm1(jnp.where(is_close, ratio, 0)),
            jnp.exp(log_t) - jnp.exp(log_p),
        )
    # The rows sum to zero, so compute the entry of the most likely class as a sum of
    # small terms instead of a difference of large ones.
    others = jnp.where(is_top, 0, difference)
    return jnp.where(is_top, -jnp.sum(others, axis=1, keepdims=True), others)


@label_residual.defjvp
def _(primals, tangents):
    # Use the covariance, which solvers compute anyway.
    (logits, labels), (logits_dot, labels_dot) = primals, tangents
    change = -softmax_change(logits, logits_dot)
    if labels.ndim == 2:
        change = change + softmax_change(labels, labels_dot)
    return label_residual(logits, labels), change


def softmax_covariance(logits: Float[Array, "n c"]) -> Float[Array, "n c c"]:
    r"""$\mathrm{diag}(p) - p p^\top$ with $p = \mathrm{softmax}(z)$: the Hessian of the
    cross-entropy in the logits."""
    # Written as in `label_residual`, so that XLA can share the softmax.
    p = jnp.exp(jax.nn.log_softmax(logits))
    products = p[:, :, None] * p[:, None, :]
    is_diagonal = jnp.eye(logits.shape[1], dtype=bool)
    # The rows sum to zero.
    others = jnp.where(is_diagonal, 0, products)
    return jnp.where(is_diagonal, jnp.sum(others, axis=2, keepdims=True), -products)


def softmax_change(
    logits: Float[Array, "n c"], by: Float[Array, "n c"]
) -> Float[Array, "n c"]:
    """The derivative of the softmax of the logits in the direction `by`."""
    # Don't use `einsum`: XLA compiles small batched products slowly.
    return jnp.sum(softmax_covariance(logits) * by[:, None, :], axis=2)
