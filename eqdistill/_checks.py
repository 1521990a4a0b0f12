import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._dataset import Dataset
from ._distilled_set import DistilledSet
from ._error import error_if


def check_inner(distilled: DistilledSet, classifier: PyTree) -> DistilledSet:
    """Checks that a classifier can be fitted to a distilled set.

    **Returns:**

    The distilled set, which carries the check of its labels if they are traced.

    **Raises:**

    A `TypeError` or `ValueError` that names the argument at fault.
    """
    num_classes = _num_classes(distilled, classifier)
    labels = distilled.labels
    if labels.ndim == 2:
        if labels.shape[1] != num_classes:
            raise ValueError(
                f"`distilled.labels` must be logits of the {num_classes} classes of "
                f"`classifier`; got shape {labels.shape}."
            )
        return distilled
    labels = error_if(
        labels,
        lambda x: ((x < 0) | (x >= num_classes)).any(),
        f"`distilled.labels` must be in [0, {num_classes}), the classes of "
        "`classifier`; some are not.",
    )
    return eqx.tree_at(lambda d: d.labels, distilled, labels)


def check_data(
    name: str, data: Dataset, distilled: DistilledSet, classifier: PyTree
) -> None:
    """Checks that real data are of the kind that a distilled set stands for.

    **Raises:**

    A `ValueError` that names the argument at fault.
    """
    shape = distilled.images.shape[1:]
    if data.shape != shape:
        raise ValueError(
            f"`{name}` and `distilled` must have images of one shape; got "
            f"{data.shape} and {shape}."
        )
    num_classes = _num_classes(distilled, classifier)
    if data.num_classes > num_classes:
        raise ValueError(
            f"`classifier` must have a logit for each of the {data.num_classes} "
            f"classes of `{name}`; it has {num_classes}."
        )


def _num_classes(distilled: DistilledSet, classifier: PyTree) -> int:
    if not callable(classifier):
        raise TypeError(
            "`classifier` must be a callable `equinox.Module`, from one image to its "
            f"logits; got a {type(classifier).__name__}."
        )
    if not jax.tree.leaves(eqx.filter(classifier, eqx.is_inexact_array)):
        raise ValueError("`classifier` must have parameters to fit; it has none.")
    shape = distilled.images.shape[1:]
    image = jax.ShapeDtypeStruct(shape, distilled.images.dtype)
    try:
        logits = eqx.filter_eval_shape(classifier, image)
    except Exception as e:
        raise ValueError(
            "`classifier` could not be applied to one image of `distilled`, of shape "
            f"{shape}: {e}"
        ) from e
    if not (
        isinstance(logits, jax.ShapeDtypeStruct)
        and logits.ndim == 1
        and jnp.issubdtype(logits.dtype, jnp.floating)
    ):
        raise ValueError(
            "`classifier` must map one image to floating-point logits of shape (c,); "
            f"for an image of shape {shape} it gave {logits}."
        )
    return logits.shape[0]
