import abc

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from ._conversions import as_array
from ._error import error_if


def cross_entropy(
    logits: Float[Array, "n c"],
    labels: Int[Array, " n"] | Float[Array, "n c"],
) -> Float[Array, ""]:
    r"""Mean cross-entropy of a classifier's logits $z$ against labels,

    $$-\frac{1}{n} \sum_{i=1}^n \sum_{k=1}^c t_{ik} \log \mathrm{softmax}(z_i)_k.$$

    **Arguments:**

    - `logits`: the logits $z$ of the classifier, one row for each image.
    - `labels`: either class indices, for which $t_i$ is one-hot, or the logits of soft
        labels, for which $t_i$ is their softmax.

    **Returns:**

    The loss, in nats per image. The loss and its gradient are NaN if a class index is
    not in $[0, c)$ and the labels are traced.

    **Raises:**

    A `ValueError` if a class index is not in $[0, c)$ and the labels are not traced.
    """
    num_classes = logits.shape[1]
    if labels.ndim == 1 and isinstance(labels, jax.core.Tracer):
        # Not an error from a callback: JAX keeps no program with one in its cache.
        is_class = (labels >= 0) & (labels < num_classes)
        logits = logits * jnp.where(is_class, 1, jnp.nan).astype(logits.dtype)[:, None]
    elif labels.ndim == 1:
        error_if(
            labels,
            lambda x: ((x < 0) | (x >= num_classes)).any(),
            f"`labels` must be in [0, {num_classes}), the columns of `logits`; some "
            "are not.",
        )
    return jnp.mean(cross_entropies(logits, labels))


def cross_entropies(
    logits: Float[Array, "n c"],
    labels: Int[Array, " n"] | Float[Array, "n c"],
) -> Float[Array, " n"]:
    """The terms of [`eqdistill.cross_entropy`][], one for each image."""
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, jax.nn.softmax(labels))


class AbstractLoss(eqx.Module):
    """The loss of the inner problem. It belongs to the distilled set, as the images are
    made for it."""

    @abc.abstractmethod
    def __call__(
        self,
        outputs: Float[Array, "n c"],
        labels: Int[Array, " n"] | Float[Array, "n c"],
    ) -> Float[Array, ""]:
        """**Arguments:**

        - `outputs`: the outputs of the classifier on the distilled images.
        - `labels`: the labels of the distilled images.

        **Returns:**

        The mean loss over the images, without the ridge.
        """

    @abc.abstractmethod
    def to_logits(self, outputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """How the outputs of a fitted classifier are read on real images: a positive
        multiple of them. For a linear classifier the same multiple of its head's arrays
        is taken."""


class CrossEntropy(AbstractLoss):
    """[`eqdistill.cross_entropy`][]: the outputs are logits, and labels in floating
    point are the logits of soft labels."""

    def __call__(self, outputs, labels):
        return cross_entropy(outputs, labels)

    def to_logits(self, outputs):
        return outputs


class SquaredError(AbstractLoss):
    r"""Half the squared distance of the outputs $z$ from targets $t$,

    $$\frac{1}{2n} \sum_{i=1}^n \|z_i - t_i\|^2.$$

    Labels in floating point are the targets. The target of a class index is its one-hot
    vector less $1/c$, so that targets have a mean of zero. On real images $z / T$ are
    the logits, with the temperature $T$.

    Source: Zhou et al., *Dataset distillation using neural feature regression* (FRePo),
    2022, for the centred targets.

    **Attributes:**

    - `log_temperature`: the logarithm of $T$, so that $T$ stays positive when it is
        learned.
    """

    log_temperature: Float[Array, ""]

    def __init__(self, temperature: ArrayLike = 0.2):
        """**Arguments:**

        - `temperature`: $T > 0$. Targets differ by one between classes: the default
            makes that a difference of five between logits.

        **Raises:**

        A `ValueError` if the temperature is not a positive and finite scalar.
        """
        temperature = jnp.asarray(
            as_array("temperature", temperature), jnp.result_type(float)
        )
        if temperature.shape != ():
            raise ValueError(
                f"`temperature` must be a scalar; got shape {temperature.shape}."
            )
        self.log_temperature = jnp.log(
            error_if(
                temperature,
                lambda x: ~((x > 0) & (x < jnp.inf)),
                f"`temperature` must be positive and finite; got {temperature}.",
            )
        )

    @property
    def temperature(self) -> Float[Array, ""]:
        return jnp.exp(self.log_temperature)

    def __call__(self, outputs, labels):
        targets = self.targets(labels, outputs.shape[1]).astype(outputs.dtype)
        errors = outputs - targets
        return jnp.mean(jnp.sum(errors**2, axis=1)) / 2

    def to_logits(self, outputs):
        return outputs / self.temperature.astype(outputs.dtype)

    def targets(
        self, labels: Int[Array, " n"] | Float[Array, "n c"], num_classes: int
    ) -> Float[Array, "n c"]:
        """The targets that labels stand for."""
        if labels.ndim == 2:
            return labels
        return jax.nn.one_hot(labels, num_classes) - 1 / num_classes
