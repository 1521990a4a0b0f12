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
    r"""A network linearised in its parameters,

    $$x \mapsto f(x; w_0) + J(x) u, \qquad
    J(x) = \frac{\partial f(x; w)}{\partial w} \Big|_{w_0}.$$

    **Attributes:**

    - `network`: the network with its frozen parameters $w_0$.
    - `tangent`: the parameters $u$: one array for each array of the network's
        parameters.
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
    r"""Regression with the neural tangent kernel: linearises a network in its
    parameters and fits it with [`eqdistill.SquaredError`][] in closed form.

    With the Jacobian $J \in \mathbb{R}^{nc \times p}$ of the outputs on the distilled
    images and the residuals $r$ (targets minus outputs), both multiplied by the square
    roots of the weights of the images, the parameters change by

    $$u = s J^\top (s J J^\top + n \lambda I)^{-1} r, \qquad
    s = n^2 c / \mathrm{tr}(J J^\top),$$

    computed by Cholesky decomposition of a system with one unknown for each image and
    class. The ridge is relative to the kernel and penalises $u$, so the network stays
    close to $w_0$. `gradient_norm` is the norm for this problem. Dropout is off.

    The features of an [`eqdistill.linear.LinearClassifier`][] are trained too, except
    for any [`eqdistill.nn.Frozen`][] inside them. The gradient in the distilled images
    needs second derivatives of the network, and the loss on real images needs a
    Jacobian-vector product. A step therefore costs several times as much as one that
    fits a last layer.

    Source: Loo et al., *Dataset Distillation with Convexified Implicit Gradients*
    (RCIG), 2023, which solves the system approximately, in 20 steps.
    """

    def init(self, distilled, model, *, key):
        return None

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """**Raises:** a `TypeError` if the loss is not [`eqdistill.SquaredError`][]."""
        check_loss("LinearisedSolver", distilled, SquaredError)
        assert isinstance(distilled.loss, SquaredError)
        network = eqx.nn.inference_mode(model)
        if isinstance(network, LinearClassifier):
            features = eqx.nn.Lambda(network.features.module)
            network = eqx.nn.Sequential([features, network.head])
        params, static = eqx.partition(network, parameters(network))
        flat, unravel = ravel_pytree(params)
        outputs = lambda flat, image: eqx.combine(unravel(flat), static)(image)
        over_images = lambda fn: jax.vmap(fn, (None, 0))(flat, distilled.images)
        start = over_images(outputs)
        n, c = start.shape
        jacobian = distilled.weigh(over_images(jax.jacrev(outputs))).reshape(n * c, -1)
        kernel = jacobian @ jacobian.T
        trace = jnp.trace(kernel)
        # The outputs of a dead network do not depend on its parameters.
        scale = n**2 * c / jnp.where(trace > 0, trace, 1)
        targets = distilled.loss.targets(distilled.labels, c).astype(start.dtype)
        residuals = distilled.weigh(targets - start).reshape(-1, 1)
        ridge = n * distilled.l2
        matrix = scale * kernel + ridge * jnp.eye(n * c, dtype=kernel.dtype)
        solution, is_exact = solve_cholesky(matrix, residuals)
        # A plain list: a module of tangents would look like a network.
        tangent = jax.tree.leaves(unravel(scale * (jacobian.T @ solution)[:, 0]))
        # The gradient is the transpose of the Jacobian times this.
        error = jax.lax.stop_gradient((matrix @ solution - residuals) / n)
        squared_norm = jnp.vdot(error, jax.lax.stop_gradient(kernel) @ error)
        norm = jnp.sqrt(jnp.maximum(squared_norm, 0))
        return Fitted(Linearised(Frozen(network), tangent), is_exact, norm), state
