import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree


def cross_entropy(
    logits: Float[Array, "n c"],
    labels: Int[Array, " n"] | Float[Array, "n c"],
) -> Float[Array, ""]:
    r"""Mean cross-entropy of a classifier's logits $z$ against labels,

    $$-\frac{1}{n} \sum_{i=1}^n \sum_{k=1}^c t_{ik} \log \mathrm{softmax}(z_i)_k.$$

    **Arguments:**

    - `logits`: the classifier's outputs $z$, one row for each image.
    - `labels`: either class indices, for which $t_i$ is one-hot, or the logits of soft
        labels, for which $t_i$ is their softmax.

    **Returns:**

    The loss, in nats per image.
    """
    return jnp.mean(cross_entropies(logits, labels))


def cross_entropies(
    logits: Float[Array, "n c"],
    labels: Int[Array, " n"] | Float[Array, "n c"],
) -> Float[Array, " n"]:
    """The terms of [`eqdistill.cross_entropy`][], one for each image."""
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, jax.nn.softmax(labels))


@jax.custom_jvp
def label_residual(
    logits: Float[Array, "n c"],
    labels: Int[Array, " n"] | Float[Array, "n c"],
) -> Float[Array, "n c"]:
    r"""The labels' probabilities less those of a classifier, $t - \mathrm{softmax}(z)$.

    Each entry is found to full relative precision, even where the two nearly cancel:
    the weights of a fit with a small ridge depend on nothing else.
    """
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
    # The rows sum to zero: what is left for the most likely class is a sum of small
    # terms, rather than a difference of large ones.
    others = jnp.where(is_top, 0, difference)
    return jnp.where(is_top, -jnp.sum(others, axis=1, keepdims=True), others)


@label_residual.defjvp
def _(primals, tangents):
    # By the covariance, which solvers have at hand, rather than step by step.
    logits, labels = primals
    logits_dot, labels_dot = tangents
    change = -softmax_change(logits, logits_dot)
    if labels.ndim == 2:
        change = change + softmax_change(labels, labels_dot)
    return label_residual(logits, labels), change


def softmax_covariance(logits: Float[Array, "n c"]) -> Float[Array, "n c c"]:
    r"""$\mathrm{diag}(p) - p p^\top$ with $p = \mathrm{softmax}(z)$, the Hessian of the
    cross-entropy in the logits. Each entry is found to full relative precision."""
    # As `label_residual` has it, so that XLA compiles it once.
    p = jnp.exp(jax.nn.log_softmax(logits))
    products = p[:, :, None] * p[:, None, :]
    is_diagonal = jnp.eye(logits.shape[1], dtype=bool)
    # The rows sum to zero.
    others = jnp.where(is_diagonal, 0, products)
    return jnp.where(is_diagonal, jnp.sum(others, axis=2, keepdims=True), -products)


def softmax_change(
    logits: Float[Array, "n c"], by: Float[Array, "n c"]
) -> Float[Array, "n c"]:
    """By how much the softmax of the logits changes with them: their
    [`softmax_covariance`][] times `by`."""
    # Not by `einsum`: XLA compiles small batched products slowly.
    return jnp.sum(softmax_covariance(logits) * by[:, None, :], axis=2)


def classification_loss(
    classifier: PyTree,
    images: Float[Array, "n *shape"],
    labels: Int[Array, " n"] | Float[Array, "n c"],
) -> Float[Array, ""]:
    """Mean cross-entropy of a classifier, which takes one image, on a batch of them."""
    return cross_entropy(jax.vmap(classifier)(images), labels)
