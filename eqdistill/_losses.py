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
    if labels.ndim == 1:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        losses = optax.softmax_cross_entropy(logits, jax.nn.softmax(labels))
    return jnp.mean(losses)


def classification_loss(
    classifier: PyTree,
    images: Float[Array, "n *shape"],
    labels: Int[Array, " n"] | Float[Array, "n c"],
) -> Float[Array, ""]:
    """Mean cross-entropy of a classifier, which takes one image, on a batch of them."""
    return cross_entropy(jax.vmap(classifier)(images), labels)
