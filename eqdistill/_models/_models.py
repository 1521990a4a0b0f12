import abc
from collections.abc import Callable
from typing import Generic, TypeVar

import equinox as eqx
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import check_make
from .._data._distilled_set import DistilledSet
from .._typechecking import describe


State = TypeVar("State")


class AbstractModels(eqx.Module, Generic[State]):
    """A source of models: where the model of an outer step comes from."""

    @abc.abstractmethod
    def init(self, distilled: DistilledSet, *, key: PRNGKeyArray) -> State:
        """Returns the first state, a pytree of arrays or `None`, for the distilled set
        at the start of the run."""

    @abc.abstractmethod
    def draw(self, state: State, *, key: PRNGKeyArray) -> PyTree:
        """Returns a model: an `equinox.Module` that maps one example to its outputs.
        The key is different in each outer step."""

    @abc.abstractmethod
    def update(
        self, state: State, distilled: DistilledSet, *, key: PRNGKeyArray
    ) -> State:
        """Called once in each outer step, after the model was fitted.

        **Arguments:**

        - `state`: the state that the model was drawn from.
        - `distilled`: the distilled set of this step. It is not differentiated.
        - `key`: the key that the model was drawn with, so that a source can train the
            model that it has just drawn. (Keyword only argument.)

        **Returns:**

        The state for the next step, with the same structure, shapes and dtypes.
        """


class Fixed(AbstractModels[None]):
    """The same model in every step."""

    model: PyTree

    def init(self, distilled, *, key):
        del distilled, key
        return None

    def draw(self, state, *, key):
        del state, key
        return self.model

    def update(self, state, distilled, *, key):
        del distilled, key
        return state


class Fresh(AbstractModels[None]):
    """A model with new initial weights in every step, so that the distilled set works
    for any initial weights rather than for one known draw.

    !!! Example

        ```python
        make = functools.partial(eqd.nn.LeNet, (28, 28), 10)
        training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.02}, steps=30)
        result = eqd.distill(start, eqd.Bilevel(eqd.Fresh(make), training), data)
        ```

    Source: Wang et al., *Dataset distillation*, 2018, Section 3.4.
    """

    make: Callable[..., PyTree] = eqx.field(static=True)

    def __init__(self, make: Callable[..., PyTree]):
        """**Arguments:**

        - `make`: a function `make(*, key)` that builds a model, with the initial
            weights of your choice.

        **Raises:**

        A `TypeError` if `make` is a model, or needs arguments other than `key`.
        """
        check_make("make", make)
        self.make = make

    def init(self, distilled, *, key):
        del distilled, key
        return None

    def draw(self, state, *, key):
        del state
        return self.make(key=key)

    def update(self, state, distilled, *, key):
        del distilled, key
        return state


def as_models(model: PyTree, wanted: str = "`model` must be") -> AbstractModels:
    """A source of models. A plain model becomes a source that always draws it. `wanted`
    begins the error for any other object."""
    if isinstance(model, AbstractModels):
        return model
    if not isinstance(model, eqx.Module) or not callable(model):
        raise TypeError(
            f"{wanted} an `equinox.Module` that is a model, or a source of models such "
            "as `eqdistill.Fresh(make)` or `eqdistill.Pool(make)`; got "
            f"{describe(model)}."
        )
    return Fixed(model)
