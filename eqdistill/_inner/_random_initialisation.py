from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import check_at_least, check_model
from .._conversions import as_int
from .._data._distilled_set import DistilledSet
from ._inner_solver import AbstractDrawingSolver, AbstractInnerSolver, State


class RandomInitialisation(AbstractDrawingSolver[State]):
    """Fits a model that is drawn anew in each outer step, so that images are
    distilled for any initial parameters, rather than for known ones.

    `model` must be `None` with this solver, and a `key` must be given.

    !!! Example

        ```python
        training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.02}, steps=30)
        inner = eqd.RandomInitialisation(eqd.nn.LeNet, training, num_classes=10)
        result = eqd.distill(start, None, data, inner=inner, key=jr.key(0))
        ```

    Source: Wang et al., *Dataset distillation*, 2018, Section 3.4.

    **Attributes:**

    - `network`: makes a model from the shape of an image, the number of classes
        and a `key`, such as [`eqdistill.nn.LeNet`][].
    - `inner`: fits the model.
    - `num_classes`: the number of classes.
    """

    network: Callable[..., PyTree] = eqx.field(static=True)
    inner: AbstractInnerSolver[State]
    num_classes: int = eqx.field(static=True, kw_only=True, converter=as_int)

    def __check_init__(self):
        check_at_least(1, num_classes=self.num_classes)

    def init(self, distilled, model, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `ValueError` if there is no `key`; a `TypeError` or `ValueError` if the
        model is not as [`eqdistill.fit`][] says; and as `inner`.
        """
        del model
        if key is None:
            raise ValueError(
                "`key` must be given with a `RandomInitialisation`, which draws "
                "models; got None."
            )
        network_key, key = jr.split(key)
        model = self._draw(distilled, network_key)
        images = distilled.images
        image = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
        num_classes = check_model(model, image)
        if num_classes != self.num_classes:
            raise ValueError(
                f"`network` must make models with {self.num_classes} logits, the "
                f"`num_classes`; got {num_classes}."
            )
        return self.inner.init(distilled, model, key=key)

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][]."""
        del model
        assert key is not None  # As `init` has checked.
        network_key, key = jr.split(key)
        model = self._draw(distilled, network_key)
        return self.inner(distilled, model, state, key=key)

    def _draw(self, distilled: DistilledSet, key: PRNGKeyArray) -> PyTree:
        shape = distilled.images.shape[1:]
        return self.network(shape, self.num_classes, key=key)
