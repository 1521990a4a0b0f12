from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._classifier import Frozen, LinearClassifier, parameters
from .._data._distilled_set import DistilledSet
from .._losses import SquaredError
from ._inner_solver import AbstractInnerSolver, Fitted
from ._linear import check_loss
from ._ridge_solver import solve_cholesky


class Linearised(eqx.Module):
    r"""A network that is linearised in its parameters,

    $$x \mapsto f(x; w_0) + J(x) u, \qquad
    J(x) = \frac{\partial f(x; w)}{\partial w} \Big|_{w_0}.$$

    **Attributes:**

    - `network`: the network with its parameters $w_0$, which are frozen.
    - `tangent`: the parameters $u$: an array for each of the network's.
    """

    network: Frozen
    tangent: list[Array]

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " c"]:
        network = self.network.module
        params, static = eqx.partition(network, parameters(network))
        outputs, outputs_dot = jax.jvp(
            lambda params: eqx.combine(params, static)(image),
            (params,),
            (jax.tree.unflatten(jax.tree.structure(params), self.tangent),),
        )
        return outputs + outputs_dot


class LinearisedSolver(AbstractInnerSolver[None]):
    r"""Kernel regression with the neural tangent kernel: fits a network that is
    linearised in its parameters, with [`eqdistill.SquaredError`][], in closed form.

    With the Jacobians $J \in \mathbb{R}^{nc \times p}$ of the outputs on the distilled
    images and the residuals $r$ of the targets, the fit moves the parameters by

    $$u = s J^\top (s J J^\top + n \lambda I)^{-1} r, \qquad
    s = n^2 c / \mathrm{tr}(J J^\top),$$

    by Cholesky decomposition: the unknowns are one for each image and class. The ridge
    is relative to the kernel. It is taken over $u$, so that the network stays near
    where it was. `gradient_norm` is that of this problem. Dropout is off.

    Of a [`eqdistill.LinearClassifier`][] the features move, too, other than an
    [`eqdistill.Frozen`][] inside of them. The distilled images' gradient
    passes through the gradient of the network, and the real images' loss needs a
    backward pass: a step takes several times that of a last layer.

    Source: Loo et al., *Dataset Distillation with Convexified Implicit Gradients*
    (RCIG), 2023, which solves the system by 20 approximate steps.
    """

    def init(self, distilled, model, *, key):
        del distilled, model, key
        return None

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `TypeError` if the loss is not [`eqdistill.SquaredError`][].
        """
        del key
        check_loss("LinearisedSolver", distilled, SquaredError)
        assert isinstance(distilled.loss, SquaredError)
        network = eqx.nn.inference_mode(model)
        if isinstance(network, LinearClassifier):
            network = _Whole(network.features.module, network.head)
        params, static = eqx.partition(network, parameters(network))
        flat, unravel = ravel_pytree(params)

        def outputs(flat, image):
            return eqx.combine(unravel(flat), static)(image)

        of_each = lambda fn: jax.vmap(fn, (None, 0))(flat, distilled.images)
        start = of_each(outputs)
        n, c = start.shape
        jacobian = of_each(jax.jacrev(outputs)).reshape(n * c, -1)
        kernel = jacobian @ jacobian.T
        trace = jnp.trace(kernel)
        # A network may have died: nothing moves its outputs.
        scale = n**2 * c / jnp.where(trace > 0, trace, 1)
        targets = distilled.loss.targets(distilled.labels, c).astype(start.dtype)
        residuals = (targets - start).reshape(-1, 1)
        ridge = n * distilled.l2
        matrix = scale * kernel + ridge * jnp.eye(n * c, dtype=kernel.dtype)
        solution, is_exact = solve_cholesky(matrix, residuals)
        # Not as a module, which would be a network without its settings.
        tangent = jax.tree.leaves(unravel(scale * (jacobian.T @ solution)[:, 0]))
        # The gradient is the Jacobian's transpose times this.
        error = jax.lax.stop_gradient((matrix @ solution - residuals) / n)
        squared_norm = jnp.vdot(error, jax.lax.stop_gradient(kernel) @ error)
        return Fitted(
            model=Linearised(Frozen(network), tangent),
            converged=is_exact,
            gradient_norm=jnp.sqrt(jnp.maximum(squared_norm, 0)),
        ), state


class _Whole(eqx.Module):
    """A linear model whose features are not frozen."""

    features: Callable
    head: eqx.nn.Linear

    def __call__(self, image: Array) -> Array:
        return self.head(self.features(image))
