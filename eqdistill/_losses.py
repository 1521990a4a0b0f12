import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float

from ._conversions import as_array, Labels


def cross_entropies(logits: Float[Array, "n c"], labels: Labels) -> Float[Array, " n"]:
    """The cross-entropy of each example. Labels in floating point are logits."""
    if labels.ndim == 2:
        return optax.softmax_cross_entropy(logits, jax.nn.softmax(labels))
    # Don't use `eqx.error_if`: programs with callbacks are not cached.
    is_class = (labels >= 0) & (labels < logits.shape[1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses * jnp.where(is_class, 1, jnp.nan).astype(logits.dtype)


class AbstractLoss(eqx.Module):
    """A loss: of the inner problem, which belongs to the distilled set, or of real
    data, which belongs to the objective."""

    @abc.abstractmethod
    def __call__(
        self, outputs: Float[Array, "n c"], labels: Labels
    ) -> Float[Array, ""]:
        """Returns the mean loss over the examples, without the ridge.

        **Arguments:**

        - `outputs`: the outputs of the model, one row for each example.
        - `labels`: the class indices, or the soft labels or targets, of these examples.
        """

    def default_outer_loss(self) -> "AbstractLoss":
        """Returns the loss that real data are scored with, if a model was fitted by
        this loss and [`eqdistill.Bilevel`][] is given no other: this loss, by
        default."""
        return self


class CrossEntropy(AbstractLoss):
    r"""The mean cross-entropy of the logits $z / T$ against labels,

    $$-\frac{1}{n} \sum_{i=1}^n \sum_{k=1}^c t_{ik} \log \mathrm{softmax}(z_i / T)_k.$$

    Class indices are one-hot $t_i$. Labels in floating point are the logits of soft
    labels: $t_i$ is their softmax. The unit is nats per example. The loss and its
    gradient are NaN if a class index is not in $[0, c)$.

    **Attributes:** `log_temperature`: $\log T$, so that $T$ stays positive when it is
    learned; or `None`, for a temperature of one.
    """

    log_temperature: Float[Array, ""] | None

    def __init__(self, temperature: ArrayLike | None = None):
        """**Arguments:** `temperature`: $T$, a positive and finite scalar. Defaults to
        one, which is not learned. Only the outer loss has a use for another: a fitted
        model adapts to any temperature."""
        self.log_temperature = None
        if temperature is not None:
            t = np.asarray(as_array("temperature", temperature), np.float64)
            if t.shape != () or not 0 < t < np.inf:
                raise ValueError(
                    f"`temperature` must be a positive and finite scalar; got {t}."
                )
            self.log_temperature = jnp.asarray(np.log(t), float)

    def __call__(self, outputs, labels):
        if self.log_temperature is not None:
            outputs = outputs * jnp.exp(-self.log_temperature).astype(outputs.dtype)
        return jnp.mean(cross_entropies(outputs, labels))


class SquaredError(AbstractLoss):
    r"""Half the squared distance of the outputs $z$ from targets $t$,

    $$\frac{1}{2n} \sum_{i=1}^n \|z_i - t_i\|^2.$$

    Labels in floating point are the targets. The target of a class index is its one-hot
    vector less $1/c$, so that targets have a mean of zero.

    Source: Zhou et al., *Dataset distillation using neural feature regression* (FRePo),
    2022, for the centred targets.
    """

    def __call__(self, outputs, labels):
        errors = outputs - self.targets(labels, outputs.shape[1]).astype(outputs.dtype)
        return jnp.mean(jnp.sum(errors**2, axis=1)) / 2

    def default_outer_loss(self):
        """The cross-entropy at a temperature of 0.2. Targets differ by one between
        classes: the temperature makes that a difference of five between logits."""
        return CrossEntropy(0.2)

    def targets(self, labels: Labels, num_classes: int) -> Float[Array, "n c"]:
        """The targets of labels, one row for each example."""
        if labels.ndim == 2:
            return labels
        return jax.nn.one_hot(labels, num_classes) - 1 / num_classes
