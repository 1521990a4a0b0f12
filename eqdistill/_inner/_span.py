import equinox as eqx
import jax
import jax.numpy as jnp
import scipy.linalg
from jaxtyping import Array, Float

from .._conversions import Labels
from .._softmax import label_residual, softmax_covariance


# For more unknowns than this, the decomposition takes longer than the solve.
_MOST_UNKNOWNS = 2000


class SpanProblem(eqx.Module):
    """The inner problem of a linear model. `images` are the features of the distilled
    images, and `scale` is `n` times the ridge."""

    images: Float[Array, "n p"]
    labels: Labels
    weights: Float[Array, " n"] | None
    scale: Float[Array, ""]

    def residuals(self, logits: Float[Array, "n c"]) -> Float[Array, "n c"]:
        return self.weigh(label_residual(logits, self.labels))

    def weigh(self, x: Float[Array, "n *rest"]) -> Float[Array, "n *rest"]:
        """Multiplies the entries of each image by the weight of the image."""
        if self.weights is None:
            return x
        return jnp.expand_dims(self.weights.astype(x.dtype), range(1, x.ndim)) * x


class Span(eqx.Module):
    r"""The span of the images: an orthonormal basis $Q$ (`basis`), the coordinates
    $F = \theta Q$ of the images, their pseudo-inverse $F^+$ (`inverse`),
    $F^+ 1$ (`shift`), and an orthonormal basis of the contrasts between classes. (The
    mean over the classes does not change the softmax.)

    A model in the span has weights $Q V$ and intercept $b$. The unknowns are the matrix
    $y = (V + F^+ 1 b^\top)^\top$ of shape `(k, r)`, with $b$ as one more column if
    there is an intercept. Its logits are $y$ times the transpose of `features`, which
    are $F$ and the column $1 - F F^+ 1$. If the images are linearly independent,
    changing $b$ alone leaves the logits unchanged and only the ridge changes, so the
    unknowns stay well separated for any ridge. $y$ is transposed because XLA then
    multiplies it by the features twice as fast.

    Large problems are not decomposed: `basis` and `inverse` are `None`, $F = \theta$,
    and $F^+$ is replaced by zero in $y$.
    """

    features: Float[Array, "n m"]
    basis: Float[Array, "r p"] | None
    inverse: Float[Array, "r n"] | None
    shift: Float[Array, " r"]
    contrasts: Float[Array, "k c"]

    def __init__(self, images: Float[Array, "n p"], num_classes: int, use_intercept):
        self.contrasts = jnp.asarray(scipy.linalg.helmert(num_classes), images.dtype)
        eps = jnp.finfo(images.dtype).eps
        if min(images.shape) * num_classes > _MOST_UNKNOWNS:
            features, self.basis, self.inverse = images, None, None
            self.shift = jnp.zeros_like(images[0])
        else:
            rows = _orthonormal_rows(images)
            # Decompose an n x n matrix: for the wide matrix of images LAPACK starts
            # threads that keep spinning after it returns, and slow everything down.
            left, singular_values, basis = jnp.linalg.svd(
                images @ rows.T, full_matrices=False
            )
            self.basis = basis @ rows
            # Singular values at rounding level are zero, as for equal images.
            rounding = max(images.shape) * eps
            is_zero = ~(singular_values > rounding * singular_values[0])
            left = jnp.where(is_zero, 0, left)
            features = left * jnp.where(is_zero, 0, singular_values)[None]
            self.inverse = (left / jnp.where(is_zero, 1, singular_values)[None]).T
            self.shift = jnp.sum(self.inverse, axis=1)
        if use_intercept:
            # The part of a constant that the images cannot reproduce. Set it to zero if
            # it is at rounding level.
            outside = 1 - features @ self.shift
            is_large = jnp.max(jnp.abs(outside)) > len(images) * eps
            outside = jnp.where(is_large, outside, 0)
            features = jnp.concatenate([features, outside[:, None]], axis=1)
        self.features = features

    @property
    def use_intercept(self) -> bool:
        return self.features.shape[1] > len(self.shift)

    def coordinates(self, head: eqx.nn.Linear) -> Float[Array, "k m"]:
        """The coordinates of the projection of `head` onto the span."""
        weights = self.contrasts @ head.weight
        if self.basis is not None:
            weights = weights @ self.basis.T
        if head.bias is None:
            return weights
        b = self.contrasts @ head.bias[:, None]
        return jnp.concatenate([weights + b * self.shift[None], b], axis=1)

    def weights(self, y: Float[Array, "k m"]) -> Float[Array, "k r"]:
        r"""$V^\top$."""
        return y[:, :-1] - y[:, -1:] * self.shift[None] if self.use_intercept else y

    def full_weights(self, y: Float[Array, "k m"]) -> Float[Array, "p c"]:
        """The weights of the model with these coordinates."""
        weights = self.weights(y)
        if self.basis is not None:
            weights = weights @ self.basis
        return weights.T @ self.contrasts

    def logits(self, y: Float[Array, "k m"]) -> Float[Array, "n c"]:
        return (self.features @ y.T) @ self.contrasts

    def _ridge(self, y: Float[Array, "k m"]) -> Float[Array, "k m"]:
        r"""The gradient of $\|V\|^2 / 2$."""
        weights = self.weights(y)
        if not self.use_intercept:
            return weights
        return jnp.concatenate([weights, -weights @ self.shift[:, None]], axis=1)

    def gradient(
        self, y: Float[Array, "k m"], logits: Float[Array, "n c"], problem: SpanProblem
    ) -> Float[Array, "k m"]:
        """`n` times the gradient of the inner loss in `y`, given its logits."""
        residuals = problem.residuals(logits) @ self.contrasts.T
        return problem.scale * self._ridge(y) - residuals.T @ self.features

    def curvature(
        self, y: Float[Array, "k m"], problem: SpanProblem
    ) -> Float[Array, "n k k"]:
        """The Hessian of the weighted cross-entropy of each image in the contrasts of
        its logits."""
        covariance = problem.weigh(softmax_covariance(self.logits(y)))
        return self.contrasts @ covariance @ self.contrasts.T

    def hessian_product(
        self,
        curvature: Float[Array, "n k k"],
        problem: SpanProblem,
        vector: Float[Array, "k m"],
    ) -> Float[Array, "k m"]:
        """The derivative of `gradient` along `vector`, at a `y` with this curvature."""
        change = jnp.einsum("nkl,nl->nk", curvature, self.features @ vector.T)
        return problem.scale * self._ridge(vector) + change.T @ self.features

    def hessian(
        self, curvature: Float[Array, "n k k"], problem: SpanProblem
    ) -> Float[Array, "mk mk"]:
        """The matrix of `hessian_product`, for vectors flattened as `y.T`."""
        features, num_contrasts = self.features, len(self.contrasts)
        matrix = jnp.einsum("na,nb,nkl->akbl", features, features, curvature)
        matrix = matrix.reshape(features.shape[1] * num_contrasts, -1)
        eye = lambda size: jnp.eye(size, dtype=matrix.dtype)
        ridge = problem.scale * self._ridge(eye(features.shape[1]))
        return matrix + jnp.kron(ridge, eye(num_contrasts))


def _orthonormal_rows(images: Float[Array, "n p"]) -> Float[Array, "r p"]:
    """Orthonormal rows, some of them zero, that span the images: by the Gram-Schmidt
    process with each projection done twice, or the identity if `n >= p`."""
    n, p = images.shape
    if n >= p:
        return jnp.eye(p, dtype=images.dtype)
    rounding = p * jnp.finfo(images.dtype).eps * jnp.max(jnp.abs(images))

    def body(i, rows):
        left = images[i]
        for _ in range(2):
            left = left - (rows @ left) @ rows
        size = jnp.linalg.norm(left)
        is_new = size > rounding
        return rows.at[i].set(jnp.where(is_new, left / jnp.where(is_new, size, 1), 0))

    return jax.lax.fori_loop(0, n, body, jnp.zeros_like(images))


class Solution(eqx.Module):
    r"""A solution $W = Q V_0$ of the inner problem, with the arrays that its derivative
    needs: $W$ leaves the span of the old images when the images change.

    Let $A$ be the residuals at the solution. To first order in a change of the images
    and the ridge, the weights are

    $$W = \theta^\top A / n \lambda + Q \, (V - V_0),$$

    with $A$, $Q$ and $V_0$ held fixed: the change of $A$ is multiplied by the old
    images, so it stays in their span. The value of the first term is computed as
    $Q V_0$, which is exact to rounding. A small difference divided by a small ridge
    would not be.
    """

    span: Span
    at: Float[Array, "k m"]
    residuals: Float[Array, "n c"]

    @staticmethod
    def of(y: Float[Array, "k m"], span: Span, problem: SpanProblem) -> "Solution":
        residuals = problem.residuals(span.logits(y))
        if span.inverse is not None:
            # Compute the part of the residuals within the span from the weights. From
            # the logits it would be a small difference of large numbers.
            features = span.features[:, : len(span.shift)]
            outside = residuals - features @ (span.inverse @ residuals)
            within = span.inverse.T @ span.weights(y).T @ span.contrasts
            residuals = outside + problem.scale * within
        return jax.lax.stop_gradient(Solution(span, y, residuals))

    def weights(self, y: Array, problem: SpanProblem) -> Float[Array, "p c"]:
        moving = problem.images.T @ self.residuals / problem.scale
        return _add_derivative(self.span.full_weights(y), moving)

    def logits(self, problem: SpanProblem) -> Float[Array, "n c"]:
        moving = problem.images @ self.weights(self.at, problem)
        return _add_derivative(self.span.logits(self.at), moving)


@jax.custom_jvp
def _add_derivative(x: Array, y: Array) -> Array:
    """Returns `x`, with the derivative of `x + y`."""
    return x


@_add_derivative.defjvp
def _(primals, tangents):
    x_dot, y_dot = tangents
    return _add_derivative(*primals), x_dot + y_dot
