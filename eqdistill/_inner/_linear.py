import equinox as eqx
from jaxtyping import Array, Float, PyTree

from .._checks import name_kind
from .._classifier import LinearClassifier
from .._data._distilled_set import DistilledSet
from .._losses import AbstractLoss


def check_linear(
    solver: str, distilled: DistilledSet, model: PyTree, loss: type[AbstractLoss]
) -> LinearClassifier:
    """**Raises:**

    A `TypeError` if a convex solver is given a problem that it does not solve.
    """
    if not isinstance(model, LinearClassifier):
        raise TypeError(
            "`model` must be a `LinearClassifier`, which is linear in its "
            f"parameters, for `{solver}`; got {name_kind(model)}. Use "
            "`ArgminSolver`, or fit only the last layer: `last_layer(network)`."
        )
    check_loss(solver, distilled, loss)
    return model


def check_loss(solver: str, distilled: DistilledSet, loss: type[AbstractLoss]) -> None:
    """**Raises:**

    A `TypeError` if a convex solver is given a loss that it does not minimise.
    """
    if not isinstance(distilled.loss, loss):
        raise TypeError(
            f"`distilled` must have `{loss.__name__}` as its loss, which `{solver}` "
            f"minimises; got `{type(distilled.loss).__name__}`."
        )


def with_head(
    model: LinearClassifier,
    weight: Float[Array, "c p"],
    bias: Float[Array, " c"] | None,
) -> LinearClassifier:
    """The model with another head."""
    return eqx.tree_at(
        lambda c: (c.head.weight, c.head.bias),
        model,
        (weight, bias),
        is_leaf=lambda x: x is None,
    )
