import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._classifier import LinearClassifier, takes_pixels
from .._data._distilled_set import DistilledSet
from .._losses import AbstractLoss, CrossEntropy
from .._typechecking import describe


def check_linear(
    solver: str, distilled: DistilledSet, model: PyTree, loss: type[AbstractLoss]
) -> LinearClassifier:
    """Checks that a convex solver supports the model and the loss."""
    if not isinstance(model, LinearClassifier):
        raise TypeError(
            f"`model` must be a `LinearClassifier` for `{solver}`; got "
            f"{describe(model)}. Use `ArgminSolver`, or fit only the last layer: "
            "`linear.last_layer(network)`."
        )
    check_loss(solver, distilled, loss)
    dtype = distilled.images.dtype
    if takes_pixels(model) and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"`distilled.images` must be float32 or float64 for `{solver}`, as LAPACK "
            f"supports no other precision; got {dtype}. The real data may be {dtype}."
        )
    return model


def check_loss(solver: str, distilled: DistilledSet, loss: type[AbstractLoss]) -> None:
    """Checks that the solver can minimise the loss of the distilled set."""
    if not isinstance(distilled.loss, loss):
        raise TypeError(
            f"`distilled.loss` must be `{loss.__name__}` for `{solver}`; got "
            f"`{type(distilled.loss).__name__}`."
        )
    inner = distilled.loss
    if isinstance(inner, CrossEntropy) and inner.log_temperature is not None:
        raise ValueError(
            f"`distilled.loss` must have no temperature for `{solver}`. Set it in the "
            "outer loss instead, `Bilevel(model, loss=CrossEntropy(0.2))`."
        )


def with_head(
    model: LinearClassifier,
    weight: Float[Array, "c p"],
    bias: Float[Array, " c"] | None,
) -> LinearClassifier:
    """The model with its head replaced."""
    where = lambda m: (m.head.weight, m.head.bias)
    return eqx.tree_at(where, model, (weight, bias), is_leaf=lambda x: x is None)
