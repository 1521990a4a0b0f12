import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jaxtyping import Array, Bool, Float, PyTree

from .._data._distilled_set import DistilledSet
from .._losses import SquaredError
from ._inner_solver import AbstractInnerSolver, Fitted, gradient_norm
from ._linear import check_linear, with_head


class RidgeSolver(AbstractInnerSolver[None]):
    r"""Ridge regression: solves the inner problem of an
    [`eqdistill.linear.LinearClassifier`][] with [`eqdistill.SquaredError`][] in closed
    form.

    With the features $\Phi \in \mathbb{R}^{n \times p}$ of the images and the targets
    $T \in \mathbb{R}^{n \times c}$, both centred if there is an intercept, and their
    rows multiplied by the square roots of the weights of the images,

    $$W^\top = \Phi^\top (\Phi \Phi^\top + n \lambda I)^{-1} T
    = (\Phi^\top \Phi + n \lambda I)^{-1} \Phi^\top T.$$

    The smaller of the two systems is solved by Cholesky decomposition. The solution can
    be differentiated any number of times. In float32 the ridge must not be small
    compared with the rounding errors of the squared features: the fit has `converged`
    if a step of iterative refinement would change the solution by at most 1%.

    Source: Zhou et al., *Dataset distillation using neural feature regression* (FRePo),
    2022, equation (4).
    """

    def init(self, distilled, model, *, key):
        return None

    def __call__(self, distilled: DistilledSet, model: PyTree, state, *, key):
        """**Raises:** a `TypeError` for any other model or loss."""
        model = check_linear("RidgeSolver", distilled, model, SquaredError)
        assert isinstance(distilled.loss, SquaredError)
        features = jax.vmap(model.features)(distilled.images)
        n, p = features.shape
        targets = distilled.loss.targets(distilled.labels, len(model.head.weight))
        targets = targets.astype(features.dtype)
        use_intercept = model.head.bias is not None
        mean = lambda x: jnp.average(x, axis=0, weights=distilled.weights)
        means = mean(features), mean(targets)
        if use_intercept:
            features, targets = features - means[0], targets - means[1]
        features, targets = distilled.weigh(features), distilled.weigh(targets)
        ridge = n * distilled.l2 * jnp.eye(min(n, p), dtype=features.dtype)
        if n <= p:
            solution, is_exact = solve_cholesky(features @ features.T + ridge, targets)
            weight = (features.T @ solution).T
        else:
            moments = features.T @ features + ridge
            solution, is_exact = solve_cholesky(moments, features.T @ targets)
            weight = solution.T
        bias = means[1] - weight @ means[0] if use_intercept else None
        fitted = with_head(model, weight, bias)
        return Fitted(fitted, is_exact, gradient_norm(distilled, fitted)), state


def solve_cholesky(
    matrix: Float[Array, "m m"], vectors: Float[Array, "m c"]
) -> tuple[Float[Array, "m c"], Bool[Array, ""]]:
    """The solution of a positive definite linear system, and whether a step of
    iterative refinement would change it by at most 1%."""
    factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
    solution = jax.scipy.linalg.cho_solve(factor, vectors)
    residual = matrix @ solution - vectors
    error = jax.scipy.linalg.cho_solve(factor, jax.lax.stop_gradient(residual))
    size = jnp.linalg.norm(jax.lax.stop_gradient(solution))
    return solution, jnp.linalg.norm(jax.lax.stop_gradient(error)) <= 1e-2 * size
