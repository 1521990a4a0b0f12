import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from .._checks import check_at_least
from .._conversions import as_int
from .._data._augmentation import AbstractAugmentation, augment
from .._data._distilled_set import DistilledSet
from ._auto_solver import AutoSolver
from ._inner_solver import AbstractInnerSolver, State


class AugmentedFit(AbstractInnerSolver[State]):
    """Fits a model to several augmented copies of each distilled image. Each copy has
    the label and the weight of its image, and every fit draws new copies.

    !!! Example
        ```python
        shift = eqd.augment.Affine(shift=2, rotation=15)
        inner = eqd.augment.AugmentedFit(shift, copies=10)
        objective = eqd.Bilevel(model, inner)
        ```

    The `gradient_norm` of the fit is that of the inner loss on the copies.

    Source: Cazenavette, Torralba and Sitzmann, *Dataset Distillation for Pre-Trained
    Self-Supervised Vision Models*, 2025, who match gradients on ten such copies.

    **Attributes:**

    - `augmentation`: the augmentation.
    - `copies`: the number of copies of each image, at least 1.
    - `inner`: the solver that fits the model to the copies.
    """

    augmentation: AbstractAugmentation
    copies: int = eqx.field(static=True, converter=as_int)
    inner: AbstractInnerSolver[State] = AutoSolver()

    def __check_init__(self):
        check_at_least(1, copies=self.copies)

    def init(self, distilled, model, *, key):
        copies_key, inner_key = jr.split(key)
        return self.inner.init(self._copy(distilled, copies_key), model, key=inner_key)

    def __call__(self, distilled, model, state, *, key):
        copies_key, inner_key = jr.split(key)
        copies = self._copy(distilled, copies_key)
        return self.inner(copies, model, state, key=inner_key)

    def _copy(self, distilled: DistilledSet, key: PRNGKeyArray) -> DistilledSet:
        where = lambda d: (d.images, d.labels, d.log_weights)
        repeat = lambda x: jnp.concatenate([x] * self.copies)
        images, *others = jax.tree.map(repeat, where(distilled))
        images = augment(self.augmentation, images, key=key)
        return eqx.tree_at(
            where, distilled, (images, *others), is_leaf=lambda x: x is None
        )
