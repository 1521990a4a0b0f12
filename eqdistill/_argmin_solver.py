import equinox as eqx
import lineax as lx
import optax
import optimistix as optx
from jaxtyping import PyTree

from ._adjoint import DampedCG
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver, Fitted, gradient_norm, inner_loss


class ArgminSolver(AbstractInnerSolver):
    r"""Solves the inner problem to convergence, for any classifier:

    $$w^\star(\theta) = \arg\min_w f(w; \theta) + \frac{\lambda}{2} \|w\|^2,$$

    and differentiates through the solution by the implicit function theorem, rather
    than through the solver's steps:

    $$\frac{\partial w^\star}{\partial \theta} = -\left(\nabla^2_{ww} f + \lambda
    I\right)^{-1} \nabla^2_{w\theta} f.$$

    For a classifier that is not linear in its parameters the inner problem is not
    convex: $w^\star$ is the local minimum that the solver reaches from the classifier's
    initial parameters.

    Source: JAXopt's dataset-distillation notebook; Blondel et al., *Efficient and
    modular implicit differentiation*, 2022, equation (2).

    **Attributes:**

    - `solver`: any Optimistix minimiser. The default, L-BFGS, suits float32. One with a
        line search stops where the loss no longer changes in the last digit, at which
        the gradient is about the square root of the machine's precision.
    - `adjoint`: how to differentiate through the solution. The default solves for the
        adjoint by [`eqdistill.DampedCG`][]; any Lineax solver for a symmetric operator
        may stand in its place.
    - `max_steps`: the most steps that the solver may take.
    """

    solver: optx.AbstractMinimiser = optx.LBFGS(rtol=1e-5, atol=1e-6)
    adjoint: optx.AbstractAdjoint = optx.ImplicitAdjoint(DampedCG())
    max_steps: int = 4096

    def __call__(
        self, classifier: PyTree, distilled: DistilledSet, tilt: PyTree | None = None
    ) -> Fitted:
        params, static = eqx.partition(classifier, eqx.is_inexact_array)

        def objective(params, args):
            distilled, tilt = args
            loss = inner_loss(eqx.combine(params, static), distilled)
            return loss if tilt is None else loss + optax.tree.vdot(tilt, params)

        solution = optx.minimise(
            objective,
            self.solver,
            params,
            args=(distilled, tilt),
            max_steps=self.max_steps,
            adjoint=self.adjoint,
            tags=frozenset({lx.positive_semidefinite_tag}),
            throw=False,
        )
        fitted = eqx.combine(solution.value, static)
        return Fitted(
            classifier=fitted,
            converged=solution.result == optx.RESULTS.successful,
            steps=solution.stats["num_steps"],
            gradient_norm=gradient_norm(fitted, distilled),
        )
