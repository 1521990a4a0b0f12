import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jaxtyping import PyTree

from .._data._distilled_set import DistilledSet
from .._losses import SquaredError
from ._inner_solver import AbstractInnerSolver, Fitted, gradient_norm
from ._linear import check_linear, with_head


class RidgeSolver(AbstractInnerSolver[None]):
    r"""Ridge regression: solves the inner problem of an
    [`eqdistill.LinearClassifier`][] with [`eqdistill.SquaredError`][] in closed form.

    With the features $\Phi \in \mathbb{R}^{n \times p}$ of the images and the targets
    $T$, both without their means if there is an intercept,

    $$W^\top = \Phi^\top (\Phi \Phi^\top + n \lambda I)^{-1} T
    = (\Phi^\top \Phi + n \lambda I)^{-1} \Phi^\top T,$$

    of which the smaller system is solved, by Cholesky decomposition. The solution may
    be differentiated any number of times. In single precision the ridge must not be
    small beside the rounding of the features' squares: `converged` is judged by the
    gradient, as in [`eqdistill.ArgminSolver`][].

    Source: Zhou et al., *Dataset distillation using neural feature regression* (FRePo),
    2022, equation (4).
    """

    def init(self, distilled, classifier, *, key):
        del distilled, classifier, key
        return None

    def __call__(self, distilled: DistilledSet, classifier: PyTree, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `TypeError` if the classifier is not an [`eqdistill.LinearClassifier`][], or
        the loss is not [`eqdistill.SquaredError`][].
        """
        del key
        classifier = check_linear("RidgeSolver", distilled, classifier, SquaredError)
        assert isinstance(distilled.loss, SquaredError)
        features = jax.vmap(classifier.features)(distilled.images)
        n, p = features.shape
        targets = distilled.loss.targets(
            distilled.labels, classifier.head.weight.shape[0]
        ).astype(features.dtype)
        use_intercept = classifier.head.bias is not None
        means = jnp.mean(features, axis=0), jnp.mean(targets, axis=0)
        if use_intercept:
            features, targets = features - means[0], targets - means[1]
        ridge = n * distilled.l2 * jnp.eye(min(n, p), dtype=features.dtype)
        if n <= p:
            gram = features @ features.T + ridge
            weight = (features.T @ _solve(gram, targets)).T
        else:
            moments = features.T @ features + ridge
            weight = _solve(moments, features.T @ targets).T
        bias = means[1] - weight @ means[0] if use_intercept else None
        fitted = with_head(classifier, weight, bias)
        fitted_norm = gradient_norm(distilled, fitted)
        scale = jax.lax.stop_gradient(distilled.l2 * jnp.linalg.norm(weight))
        rounding = 10 * jnp.finfo(features.dtype).eps
        return Fitted(
            classifier=fitted,
            converged=fitted_norm <= 1e-2 * scale + rounding,
            gradient_norm=fitted_norm,
        ), state


def _solve(matrix, vectors):
    factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
    return jax.scipy.linalg.cho_solve(factor, vectors)
