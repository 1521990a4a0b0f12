import abc
from typing import Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._checks import check_callable
from .._classifier import parameters, squared_norm
from .._data._distilled_set import DistilledSet
from .._losses import mean_loss


State = TypeVar("State")


def inner_loss(
    distilled: DistilledSet, model: PyTree, *, key: PRNGKeyArray | None = None
) -> Float[Array, ""]:
    r"""The objective of the inner problem, for a model with parameters $w$:

    $$\frac{1}{n} \sum_{i=1}^n r_i\, \ell(y_i, w(\theta_i)) +
    \frac{\lambda}{2} \|w\|^2.$$

    **Arguments:**

    - `distilled`: the images $\theta$, their labels $y$, the ridge $\lambda$, the loss
        $\ell$ and the weights $r$, which are one by default.
    - `model`: a map from one image to its outputs.
    - `key`: a `jax.random.key` for a model with dropout, which is called with a
        different `key` for each image. By default, it is called without one. (Keyword
        only argument.)

    **Returns:**

    The mean loss on the distilled images plus the ridge. The ridge is taken over
    [`eqdistill.nn.parameters`][], except those that a module's `penalised` leaves out.

    **Raises:**

    A `TypeError` if the model is not a callable module.

    Source: the code of JAXopt's dataset-distillation notebook. (The formula in the
    notebook has no factor of one half.)
    """
    check_callable(model)
    if key is None:
        outputs = jax.vmap(model)(distilled.images)
    else:
        keys = jax.random.split(key, len(distilled))
        call = lambda image, key: model(image, key=key)
        outputs = jax.vmap(call)(distilled.images, keys)
    labels, weights = distilled.labels, distilled.weights
    loss = mean_loss(distilled.loss, outputs, labels, weights)
    return loss + 0.5 * distilled.l2 * squared_norm(model)


def gradient_norm(distilled: DistilledSet, model: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of the gradient of the inner loss in the parameters. It is a
    diagnostic, and is not differentiated."""
    distilled, model = stop_gradient((distilled, model))
    params, static = eqx.partition(model, parameters(model))
    loss = lambda params: inner_loss(distilled, eqx.combine(params, static))
    return optax.tree.norm(jax.grad(loss)(params))


def stop_gradient(tree: PyTree) -> PyTree:
    """Stops the gradient of every floating-point array in a tree."""
    return jax.tree.map(
        lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree
    )


class Fitted(eqx.Module):
    """A model fitted to a distilled set.

    **Attributes:**

    - `model`: the fitted model, differentiable in the distilled set.
    - `converged`: whether the model is a solution: for an argmin, a stationary point of
        the inner loss.
    - `gradient_norm`: the Euclidean norm of the gradient of the inner loss in the
        parameters: the inner residual, which is zero at an exact argmin.
    - `collapsed`: whether the fit has shrunk a network to one that gives every
        distilled image the same outputs. Nothing can be learned from such a fit.
    - `stats`: other statistics of the solver, such as the number of its `"steps"`.
    """

    model: PyTree
    converged: Bool[Array, ""]
    gradient_norm: Float[Array, ""]
    collapsed: Bool[Array, ""] = eqx.field(default_factory=lambda: jnp.array(False))
    stats: dict[str, Array] = eqx.field(default_factory=dict)


class AbstractInnerSolver(eqx.Module, Generic[State]):
    """How a model is fitted to a distilled set, and how the fit is differentiated.

    A solver may carry a state from one outer step to the next, such as a warm start,
    and may draw random numbers.
    """

    @abc.abstractmethod
    def init(
        self, distilled: DistilledSet, model: PyTree, *, key: PRNGKeyArray
    ) -> State:
        """Makes the state for the first fit.

        **Arguments:**

        - `distilled`, `model`: as for a call.
        - `key`: a `jax.random.key`. (Keyword only argument.)

        **Returns:**

        A pytree of arrays. `None` is a state without arrays.
        """

    @abc.abstractmethod
    def __call__(
        self, distilled: DistilledSet, model: PyTree, state: State, *, key: PRNGKeyArray
    ) -> tuple[Fitted, State]:
        """Fits the model to the distilled set.

        **Arguments:**

        - `distilled`: the distilled set.
        - `model`: the model whose parameters are fitted. A solver that needs a start
            may start from the current parameters of the model.
        - `state`: the state from the previous fit.
        - `key`: a `jax.random.key`, different for each fit. (Keyword only argument.)

        **Returns:**

        The [`eqdistill.Fitted`][], whose `model` may be differentiated in every
        floating-point array of `distilled` and of the solver itself; and the state for
        the next fit, with the same structure, shapes and dtypes. Failed fits are
        returned with `converged=False`.
        """
