import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

from .._classifier import parameters
from .._data._distilled_set import DistilledSet
from ._adjoint import DampedCG
from ._inner_solver import AbstractInnerSolver, Fitted, gradient_norm, inner_loss


class ArgminSolver(AbstractInnerSolver[None]):
    solver: optx.AbstractMinimiser = optx.LBFGS(rtol=1e-5, atol=1e-6)
    adjoint: optx.AbstractAdjoint = optx.ImplicitAdjoint(DampedCG())
    max_steps: int = 4096

    def init(self, distilled, classifier, *, key):
        return None

    def __call__(self, distilled: DistilledSet, classifier, state, *, key):
        classifier = eqx.nn.inference_mode(classifier)
        params, static = eqx.partition(classifier, parameters(classifier))
        solution = optx.minimise(
            lambda params, distilled: inner_loss(
                distilled, eqx.combine(params, static)
            ),
            self.solver,
            params,
            args=distilled,
            max_steps=self.max_steps,
            adjoint=self.adjoint,
            tags=frozenset({lx.positive_semidefinite_tag}),
            throw=False,
        )
        fitted = eqx.combine(solution.value, static)
        return Fitted(
            classifier=fitted,
            converged=solution.result == optx.RESULTS.successful,
            collapsed=jnp.array(False),
            gradient_norm=gradient_norm(distilled, fitted),
            stats={"steps": solution.stats["num_steps"]},
        ), state
