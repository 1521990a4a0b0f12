import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._checks import check_at_least
from .._classifier import Frozen, parameters, squared_norm
from .._conversions import as_float, as_int
from .._data._distilled_set import DistilledSet
from ._hessian_solvers import DampedCG
from ._inner_solver import AbstractInnerSolver, Fitted, gradient_norm, inner_loss
from ._lbfgs import LBFGS


_NORMALISATIONS = eqx.nn.GroupNorm | eqx.nn.LayerNorm | eqx.nn.RMSNorm


class ArgminSolver(AbstractInnerSolver[None]):
    r"""Solves the inner problem to convergence, for any model:

    $$w^\star(\theta) = \arg\min_w f(w; \theta) + \frac{\lambda}{2} \|w\|^2,$$

    and differentiates through the solution by the implicit function theorem, rather
    than through the steps of the solver:

    $$\frac{\partial w^\star}{\partial \theta} = -\left(\nabla^2_{ww} f + \lambda
    I\right)^{-1} \nabla^2_{w\theta} f.$$

    The inner problem of a network is not convex: $w^\star$ is the local minimum that
    the solver reaches from the initial parameters. Dropout is off.

    The fit has `converged` if the gradient of the inner loss is small compared with
    the gradient of the ridge, $\|g\| \le \mathrm{tolerance} \cdot \lambda \|w\|$, or
    is at rounding level. For a convex inner problem the first condition bounds the
    relative error of $w$. The fit has `collapsed` if the outputs on the distilled
    images vary a hundred times less than at the initial parameters.

    Networks with normalisation raise an error: they rarely have a stationary point
    within reach. The ridge shrinks weights whose scale does not change the outputs, and
    the curvature grows as they shrink.

    Source: JAXopt's dataset-distillation notebook; Blondel et al., *Efficient and
    modular implicit differentiation*, 2022, equation (2).

    **Attributes:**

    - `solver`: any Optimistix minimiser.
    - `adjoint`: how to differentiate through the solution. The default solves the
        adjoint system with [`eqdistill.adjoints.DampedCG`][]. Any Lineax solver for
        symmetric operators works.
    - `max_steps`: the maximum number of steps.
    - `tolerance`: the tolerance above.
    """

    solver: optx.AbstractMinimiser = LBFGS()
    adjoint: optx.AbstractAdjoint = optx.ImplicitAdjoint(DampedCG())
    max_steps: int = eqx.field(default=2000, converter=as_int)
    tolerance: float = eqx.field(default=1e-2, converter=as_float)

    def __check_init__(self):
        check_at_least(1, max_steps=self.max_steps)
        check_at_least(0, tolerance=self.tolerance)

    def init(self, distilled, model, *, key):
        """**Raises:** a `ValueError` if the model has normalisation."""
        is_norm = lambda x: isinstance(x, _NORMALISATIONS | Frozen)
        for path, node in jax.tree.leaves_with_path(model, is_leaf=is_norm):
            if isinstance(node, _NORMALISATIONS):
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"`model` must not have normalisation for `ArgminSolver`; got a "
                    f"{type(node).__name__} at `{where}`. Distil for a pool of such "
                    "networks, `Pool(make)`; or fit its last layer, "
                    "`linear.last_layer(model)`; or train it for a number of steps "
                    "with `UnrolledSolver`."
                )

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        model = eqx.nn.inference_mode(model)
        params, static = eqx.partition(model, parameters(model))
        l2 = jax.lax.stop_gradient(distilled.l2)
        loss = lambda w, distilled: inner_loss(distilled, eqx.combine(w, static))
        solution = optx.minimise(
            loss,
            self.solver,
            params,
            args=distilled,
            options={"l2": l2},
            max_steps=self.max_steps,
            adjoint=self.adjoint,
            tags=frozenset({lx.positive_semidefinite_tag}),
            throw=False,
        )
        fitted = eqx.combine(solution.value, static)
        norm = gradient_norm(distilled, fitted)
        # The solution may be zero, and then the scale below is too. The larger the
        # images, the smaller the weights.
        size = jnp.max(jnp.abs(jax.lax.stop_gradient(distilled.images)))
        rounding = 10 * jnp.finfo(norm.dtype).eps / jnp.maximum(size, 1)
        scale = l2 * jnp.sqrt(jax.lax.stop_gradient(squared_norm(fitted)))
        spreads = [_spread(distilled, m) for m in (model, fitted)]
        return Fitted(
            model=fitted,
            converged=norm <= self.tolerance * scale + rounding,
            collapsed=spreads[1] < 1e-2 * spreads[0],
            gradient_norm=norm,
            stats={"steps": solution.stats["num_steps"]},
        ), state


def _spread(distilled: DistilledSet, model: PyTree) -> Float[Array, ""]:
    """The standard deviation of the outputs over the images, after subtracting the mean
    over the classes."""
    outputs = jax.lax.stop_gradient(jax.vmap(model)(distilled.images))
    outputs = outputs - jnp.mean(outputs, axis=1, keepdims=True)
    means = jnp.mean(outputs, axis=0, keepdims=True)
    return jnp.sqrt(jnp.mean((outputs - means) ** 2))
