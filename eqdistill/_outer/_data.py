import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import array_difference, check_model
from .._classifier import Frozen, LinearClassifier, takes_pixels
from .._data._dataset import Dataset
from ._linear_layout import LinearLayout
from ._mean_loss import AbstractLayout, mean_loss
from ._rows import Rows


class AbstractData(eqx.Module):
    """Real data as an outer step sees them. They are made once, outside of any compiled
    program, and used in many steps.

    **Attributes:**

    - `shape`: the shape of one image.
    - `num_classes`: the number of classes $c$.
    """

    shape: eqx.AbstractVar[tuple[int, ...]]
    num_classes: eqx.AbstractVar[int]

    @abc.abstractmethod
    def loss(
        self, model: PyTree, step: Int[Array, ""], *, key: PRNGKeyArray | None
    ) -> Float[Array, ""]:
        """**Arguments:**

        - `model`: a fitted model, from one image to its logits.
        - `step`: the number of the outer step, from 0.
        - `key`: the same `jax.random.key` in all steps of a run, or `None` if the run
            has none. (Keyword only argument.)

        **Returns:**

        The mean cross-entropy on the real images of this step, in nats per image,
        differentiable in the model.
        """


class AbstractFeatureData(AbstractData):
    """Real data that hold the features of a linear model, computed once, in the
    place of images.

    **Attributes:**

    - `features`: what the features were computed by, or `None` if images are held.
    """

    features: eqx.AbstractVar[Frozen | None]


class FullBatch(AbstractFeatureData):
    """All of the real images in each outer step.

    For an [`eqdistill.LinearClassifier`][] the features of the images are computed
    once, here, and laid out such that features which are mostly zero cost little. This
    holds the features in memory, in floating point.
    """

    layout: AbstractLayout
    features: Frozen | None
    shape: tuple[int, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)

    def __init__(self, dataset: Dataset, model: PyTree = None):
        """**Arguments:**

        - `dataset`: the real images.
        - `model`: the model to be fitted, whose features are used if it is
            linear. Defaults to a layout that suits any model.

        **Raises:**

        A `TypeError` or `ValueError` if `model` is not one, cannot be applied to
        the images, or has features that are not finite.
        """
        check_seen(dataset, model)
        self.shape = dataset.shape
        self.num_classes = dataset.num_classes
        if isinstance(model, LinearClassifier):
            self.features = model.features
            self.layout = LinearLayout(
                _rows(dataset, model), np.asarray(dataset.labels)
            )
        else:
            self.features = None
            self.layout = Rows(dataset.images, dataset.labels)

    def loss(self, model, step, *, key):
        """As [`eqdistill.AbstractData`][].

        **Raises:**

        A `ValueError` if the data were made for a linear model with other features
        than this one. The values of arrays that are traced are not compared.
        """
        del step, key
        return mean_loss(check_features(self, model), self.layout)


def check_seen(dataset: Dataset, model: PyTree) -> None:
    """**Raises:**

    A `TypeError` or `ValueError` that names the model that data are made with, if
    it cannot be applied to them.
    """
    if model is not None:
        dtype = jax.eval_shape(Dataset.to_floating, dataset.images).dtype
        check_model(model, jax.ShapeDtypeStruct(dataset.shape, dtype))


def check_features(data: AbstractFeatureData, model: PyTree) -> PyTree:
    """**Returns:**

    What is applied to the rows of the real data: the head of a linear model, or
    the model.

    **Raises:**

    A `ValueError` if the data were made for a linear model with other features.
    """
    if data.features is None:
        return model
    is_linear = isinstance(model, LinearClassifier)
    if not is_linear or not _are_alike(model.features, data.features):
        name = type(data).__name__
        raise ValueError(
            f"`model` must have the features that this `{name}` was made with. "
            f"Make the `{name}` without a model: then it suits any."
        )
    return model.head


def as_data(data: Dataset | AbstractData, model: PyTree) -> AbstractData:
    """Real data as an outer step sees them: by default, all of them in each step."""
    return FullBatch(data, model) if isinstance(data, Dataset) else data


def features_of(dataset: Dataset, model: LinearClassifier) -> Dataset:
    """The features of all real images, in the place of the images.

    **Raises:**

    A `ValueError` if they are not finite.
    """
    try:
        return dataset.map(model.features)
    except ValueError as e:
        raise ValueError(
            "`model` must have features of the real images that are finite "
            f"vectors of floating point: {e}"
        ) from e


def _rows(dataset: Dataset, model: LinearClassifier) -> np.ndarray:
    """The features of all real images, one row for each."""
    if not takes_pixels(model):  # Pixels stay bytes: the layout converts them.
        dataset = features_of(dataset, model)
    return np.asarray(dataset.images).reshape(len(dataset), -1)


def _are_alike(features: Frozen, others: Frozen) -> bool:
    """Whether two modules are the same, as far as a trace can tell."""
    mine, theirs = (eqx.partition(x, eqx.is_array) for x in (features, others))
    if array_difference(mine[0], theirs[0]) is not None:
        return False
    pairs = zip(jax.tree.leaves(mine[0]), jax.tree.leaves(theirs[0]), strict=True)
    is_traced = lambda x: isinstance(x, Tracer)
    return bool(eqx.tree_equal(mine[1], theirs[1])) and all(
        x is y or is_traced(x) or is_traced(y) or bool(jnp.all(x == y))
        for x, y in pairs
    )
