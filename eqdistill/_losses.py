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
    _check_columns(logits, labels)
    if labels.ndim == 2:
        return optax.softmax_cross_entropy(logits, jax.nn.softmax(labels))
    # Don't use `eqx.error_if`: programs with callbacks are not cached.
    is_class = (labels >= 0) & (labels < logits.shape[1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses * jnp.where(is_class, 1, jnp.nan).astype(logits.dtype)


class AbstractLoss(eqx.Module):
    """A loss. The loss of the inner problem belongs to the distilled set, and the loss
    on real data to the objective."""

    @abc.abstractmethod
    def __call__(
        self, outputs: Float[Array, "n c"], labels: Labels
    ) -> Float[Array, ""]:
        """Returns the mean loss over the examples, without the ridge.

        **Arguments:**

        - `outputs`: the outputs of the model, one row for each example.
        - `labels`: the class indices, or the soft labels or targets, of these examples.
        """

    def default_outer_loss(self, labels: Labels) -> "AbstractLoss":
        """Returns the default outer loss for real data with the given `labels`, if the
        model was fitted with this loss. [`eqdistill.Bilevel`][] uses it unless you pass
        another loss. By default, it is this loss itself."""
        del labels
        return self

    def targets(self, labels: Labels, num_classes: int) -> Float[Array, "n c"]:
        """Converts class indices, or labels with fewer columns, to labels in floating
        point, one row for each example. By default, raises a `TypeError`."""
        del labels, num_classes
        raise TypeError(
            f"`{type(self).__name__}` has no `targets`, which are needed to replace "
            "class indices or to add columns to labels."
        )

    def check_labels(self, labels: np.ndarray) -> None:
        """Raises a `ValueError` if this loss cannot be used with `labels`, which are
        class indices or a floating-point array of shape `(n, c)`. By default, accepts
        any labels."""
        del labels


def mean_loss(
    loss: AbstractLoss,
    outputs: Float[Array, "n c"],
    labels: Labels,
    weights: Float[Array, " n"] | None,
) -> Float[Array, ""]:
    """The mean over the examples of a loss times the weight of the example."""
    if weights is None:
        return loss(outputs, labels)
    of_each = jax.vmap(lambda output, label: loss(output[None], label[None]))
    losses = of_each(outputs, labels)
    return jnp.mean(weights.astype(losses.dtype) * losses)


class DefaultOuterLoss(AbstractLoss):
    """The default outer loss of models that are fitted with the loss `inner`."""

    inner: AbstractLoss

    def __call__(self, outputs, labels):
        return self.inner.default_outer_loss(labels)(outputs, labels)


class CrossEntropy(AbstractLoss):
    r"""The mean cross-entropy of the logits $z / T$ against labels,

    $$-\frac{1}{n} \sum_{i=1}^n \sum_{k=1}^c t_{ik} \log \mathrm{softmax}(z_i / T)_k.$$

    A class index stands for a one-hot $t_i$. Labels in floating point are the logits of
    soft labels: $t_i$ is their softmax. The unit is nats per example. The loss and its
    gradient are NaN if a class index is not in $[0, c)$.

    **Attributes:** `log_temperature`: $\log T$, so that $T$ stays positive when it is
    learned; or `None`, for a temperature of one.
    """

    log_temperature: Float[Array, ""] | None

    def __init__(self, temperature: ArrayLike | None = None):
        """**Arguments:** `temperature`: $T$, a positive and finite scalar. Defaults to
        one, which is not learned. Other values are useful only in the outer loss: a
        fitted model adapts to any temperature."""
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

    def targets(self, labels, num_classes):
        """The logits of class indices, or of soft labels for the first classes only:
        other classes have a probability of zero, up to rounding."""
        if labels.ndim == 1:
            return _NEVER * (jax.nn.one_hot(labels, num_classes) - 1)
        never = jnp.min(labels, axis=1, keepdims=True) - _NEVER
        return _add_columns(labels, never, num_classes)

    def check_labels(self, labels):
        """**Raises:** a `ValueError` if `labels` are probabilities, or zeros and ones.
        Zeros alone are logits."""
        if labels.ndim == 1 or not labels.any():
            return
        is_binary = ((labels == 0) | (labels == 1)).all()
        sums = labels.sum(axis=1, dtype=np.float64)
        if is_binary or ((labels >= 0).all() and (abs(sums - 1) < 1e-3).all()):
            raise ValueError(
                "`labels` in floating point must be logits for `CrossEntropy`; got "
                f"{'zeros and ones' if is_binary else 'probabilities'}. Take the "
                "logarithms of probabilities, replace one-hot rows with class indices, "
                "or use `BinaryCrossEntropy` if an example can have several classes."
            )


class BinaryCrossEntropy(AbstractLoss):
    r"""The cross-entropy of each class separately, for examples with any number of
    classes (multi-label classification),

    $$-\frac{1}{n} \sum_{i=1}^n \sum_{k=1}^c \big[t_{ik} \log \sigma(z_{ik}) +
    (1 - t_{ik}) \log(1 - \sigma(z_{ik}))\big],$$

    with the logistic function $\sigma$. Labels in floating point are the probabilities
    $t$, such as 0 and 1. A class index stands for a one-hot row.
    """

    def __call__(self, outputs, labels):
        _check_columns(outputs, labels)
        labels = self.targets(labels, outputs.shape[1]).astype(outputs.dtype)
        return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(outputs, labels), 1))

    def targets(self, labels, num_classes):
        """One-hot rows, or labels for the first classes only: the other classes have a
        probability of zero."""
        if labels.ndim == 1:
            return jax.nn.one_hot(labels, num_classes)
        return _add_columns(labels, 0.0, num_classes)

    def check_labels(self, labels):
        """**Raises:** a `ValueError` if `labels` are not between 0 and 1."""
        if labels.ndim == 2 and not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError(
                "`labels` must be from 0 to 1 for `BinaryCrossEntropy`; got "
                f"{labels.min():.4g} to {labels.max():.4g}."
            )


class SquaredError(AbstractLoss):
    r"""Half the squared distance of the outputs $z$ from the targets $t$,

    $$\frac{1}{2n} \sum_{i=1}^n \|z_i - t_i\|^2.$$

    Labels in floating point are the targets. The target of a class index is its one-hot
    vector minus $1/c$, so that targets have a mean of zero.

    Source: Zhou et al., *Dataset distillation using neural feature regression* (FRePo),
    2022, for the centred targets.
    """

    def __call__(self, outputs, labels):
        _check_columns(outputs, labels)
        errors = outputs - self.targets(labels, outputs.shape[1]).astype(outputs.dtype)
        return jnp.mean(jnp.sum(errors**2, axis=1)) / 2

    def default_outer_loss(self, labels):
        """For class indices, the cross-entropy at a temperature of 0.2. Targets differ
        by one between classes: the temperature makes that a difference of five between
        logits. For targets, the squared error itself."""
        return CrossEntropy(0.2) if labels.ndim == 1 else self

    def targets(self, labels, num_classes):
        """The targets of class indices, or targets for the first classes only, extended
        to all classes. If those are centred one-hot vectors, so are the results."""
        if labels.ndim == 1:
            return jax.nn.one_hot(labels, num_classes) - 1 / num_classes
        shift = 1 / labels.shape[1] - 1 / num_classes
        return _add_columns(labels + shift, -1 / num_classes, num_classes)


# The softmax of minus this is zero in every precision.
_NEVER = 1e4


def _add_columns(
    labels: Float[Array, "n k"], value: ArrayLike, num_classes: int
) -> Float[Array, "n c"]:
    missing = num_classes - labels.shape[1]
    if missing < 0:
        raise ValueError(
            f"`num_classes` must be at least {labels.shape[1]}, the number of columns "
            f"of the labels; got {num_classes}."
        )
    others = jnp.broadcast_to(value, (len(labels), missing)).astype(labels.dtype)
    return jnp.concatenate([labels, others], axis=1)


def _check_columns(outputs: Float[Array, "n c"], labels: Labels) -> None:
    if labels.ndim == 2 and labels.shape != outputs.shape:
        raise ValueError(
            "`labels` must have a column for each output of the model; got labels of "
            f"shape {labels.shape} and outputs of shape {outputs.shape}."
        )
