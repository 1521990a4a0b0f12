import equinox as eqx
import jax
import jax.numpy as jnp
import scipy.linalg
from jaxtyping import Array, Float, Int

from .._softmax import label_residual, softmax_covariance


class SpanProblem(eqx.Module):
    """The inner problem of a linear model. `images` are the features of the distilled
    images, and `scale` is `n` times the ridge."""

    images: Float[Array, "n p"]
    labels: Int[Array, " n"] | Float[Array, "n c"]
    scale: Float[Array, ""]


class Coordinates(eqx.Module):
    r"""The unknowns, in the contrasts between classes: the mean over the classes does
    not change the softmax.

    A model in the span has weights $Q V$ and intercept $b$. Here `weights` is
    $(V + F^+ 1 b^\top)^\top$ and `intercept` is $b$. If the images are linearly
    independent, changing `intercept` alone leaves the logits unchanged and only the
    ridge changes, so the two unknowns stay well separated for any ridge. The weights
    are transposed because XLA then multiplies them by the features twice as fast.
    """

    weights: Float[Array, "k r"]
    intercept: Float[Array, " k"] | None


class Span(eqx.Module):
    r"""The span of the images: an orthonormal basis $Q$ (`basis`), the coordinates
    $F = \theta Q$ of the images (`features`), their pseudo-inverse $F^+$ (`inverse`),
    and an orthonormal basis of the contrasts between classes.

    Large problems are not decomposed: `basis` and `inverse` are `None`, $F = \theta$,
    and $F^+$ is replaced by zero in `Coordinates`.
    """

    features: Float[Array, "n r"]
    basis: Float[Array, "r p"] | None
    inverse: Float[Array, "r n"] | None
    contrasts: Float[Array, "k c"]

    @staticmethod
    def of(images: Float[Array, "n p"], num_classes: int) -> "Span":
        contrasts = jnp.asarray(scipy.linalg.helmert(num_classes), images.dtype)
        if min(images.shape) * num_classes > _MOST_UNKNOWNS:
            return Span(images, None, None, contrasts)
        rows = _orthonormal_rows(images)
        # Decompose an n x n matrix: for the wide matrix of images LAPACK starts threads
        # that keep spinning after it returns, and slow everything else down.
        left, singular_values, basis = jnp.linalg.svd(
            images @ rows.T, full_matrices=False
        )
        basis = basis @ rows
        # Singular values at rounding level are zero, as for equal images.
        rounding = max(images.shape) * jnp.finfo(images.dtype).eps
        is_zero = ~(singular_values > rounding * singular_values[0])
        left = jnp.where(is_zero, 0, left)
        features = left * jnp.where(is_zero, 0, singular_values)
        inverse = left / jnp.where(is_zero, 1, singular_values)
        return Span(features, basis, inverse.T, contrasts)

    @property
    def shift(self) -> Float[Array, " r"]:
        r"""$F^+ 1$."""
        if self.inverse is None:
            return jnp.zeros_like(self.features[0])
        return jnp.sum(self.inverse, axis=1)

    @property
    def outside(self) -> Float[Array, " n"]:
        r"""$1 - F F^+ 1$: what the images cannot reproduce of a constant."""
        outside = 1 - self.features @ self.shift
        # Numbers at rounding level are zero, as for the singular values.
        rounding = len(outside) * jnp.finfo(outside.dtype).eps
        return jnp.where(jnp.max(jnp.abs(outside)) > rounding, outside, 0)

    def coordinates(self, head: eqx.nn.Linear) -> Coordinates:
        """The coordinates of the projection of `head` onto the span."""
        weights = self.contrasts @ head.weight
        if self.basis is not None:
            weights = weights @ self.basis.T
        if head.bias is None:
            return Coordinates(weights, None)
        intercept = self.contrasts @ head.bias
        return Coordinates(weights + jnp.outer(intercept, self.shift), intercept)

    def full_weights(self, y: Coordinates) -> Float[Array, "p c"]:
        """The weights of the model with these coordinates."""
        weights = self.weights(y)
        if self.basis is not None:
            weights = weights @ self.basis
        return weights.T @ self.contrasts

    def weights(self, y: Coordinates) -> Float[Array, "k r"]:
        r"""$V^\top$."""
        if y.intercept is None:
            return y.weights
        return y.weights - jnp.outer(y.intercept, self.shift)

    def logits(self, y: Coordinates) -> Float[Array, "n c"]:
        return self._logit_contrasts(y) @ self.contrasts

    def _logit_contrasts(self, y: Coordinates) -> Float[Array, "n k"]:
        contrasts = self.features @ y.weights.T
        if y.intercept is None:
            return contrasts
        return contrasts + jnp.outer(self.outside, y.intercept)

    def gradient(
        self, y: Coordinates, logits: Float[Array, "n c"], problem: SpanProblem
    ) -> Coordinates:
        """`n` times the gradient of the inner loss in the coordinates, given their
        logits."""
        residuals = label_residual(logits, problem.labels) @ self.contrasts.T
        ridge = problem.scale * self.weights(y)
        weights = ridge - residuals.T @ self.features
        if y.intercept is None:
            return Coordinates(weights, None)
        return Coordinates(weights, -ridge @ self.shift - self.outside @ residuals)

    def curvature(self, y: Coordinates) -> Float[Array, "n k k"]:
        """The Hessian of the cross-entropy of each image in the contrasts of its
        logits."""
        covariance = softmax_covariance(self.logits(y))
        return self.contrasts @ covariance @ self.contrasts.T

    def hessian_product(
        self,
        curvature: Float[Array, "n k k"],
        problem: SpanProblem,
        vector: Coordinates,
    ) -> Coordinates:
        """The derivative of `gradient` along `vector`, at coordinates with this
        curvature."""
        along = self._logit_contrasts(vector)
        change = jnp.einsum("nkl,nl->nk", curvature, along)
        ridge = problem.scale * self.weights(vector)
        weights = ridge + change.T @ self.features
        if vector.intercept is None:
            return Coordinates(weights, None)
        return Coordinates(weights, self.outside @ change - ridge @ self.shift)

    def hessian(
        self,
        curvature: Float[Array, "n k k"],
        problem: SpanProblem,
        use_intercept: bool,
    ) -> Float[Array, "m m"]:
        """The matrix of `hessian_product`, for vectors flattened by `flatten`."""
        features = self.features
        if use_intercept:
            features = jnp.concatenate([features, self.outside[:, None]], axis=1)
        matrix = jnp.einsum("na,nb,nkl->akbl", features, features, curvature)
        num_contrasts = len(self.contrasts)
        matrix = matrix.reshape(features.shape[1] * num_contrasts, -1)
        if not use_intercept:
            return matrix + problem.scale * jnp.eye(len(matrix), dtype=matrix.dtype)
        rank, dtype = len(self.shift), matrix.dtype
        shift = jnp.concatenate([jnp.eye(rank, dtype=dtype), -self.shift[:, None]], 1)
        ridge = problem.scale * (shift.T @ shift)
        return matrix + jnp.kron(ridge, jnp.eye(num_contrasts, dtype=dtype))

    def flatten(self, vector: Coordinates) -> Float[Array, " m"]:
        rows = vector.weights.T
        if vector.intercept is not None:
            rows = jnp.concatenate([rows, vector.intercept[None]])
        return jnp.ravel(rows)

    def unflatten(self, flat: Float[Array, " m"], use_intercept: bool) -> Coordinates:
        rows = flat.reshape(-1, len(self.contrasts))
        if use_intercept:
            return Coordinates(rows[:-1].T, rows[-1])
        return Coordinates(rows.T, None)


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


# For more unknowns than this, the decomposition takes longer than the solve.
_MOST_UNKNOWNS = 2000


class Solution(eqx.Module):
    r"""A solution $W = Q V_0$ of the inner problem, with what its derivative needs: $W$
    leaves the span of the old images when the images change.

    Let $A$ be the residuals at the solution. To first order in a change of the images
    and the ridge, the weights are

    $$W = \theta^\top A / n \lambda + Q \, (V - V_0),$$

    with $A$, $Q$ and $V_0$ held fixed: the change of $A$ is multiplied by the old
    images, so it stays in their span. The value of the first term is computed as
    $Q V_0$, which is exact to rounding. A small difference divided by a small ridge
    would not be.
    """

    span: Span
    at: Coordinates
    residuals: Float[Array, "n c"]

    @staticmethod
    def of(y: Coordinates, span: Span, problem: SpanProblem) -> "Solution":
        residuals = label_residual(span.logits(y), problem.labels)
        if span.inverse is not None:
            # Compute the part of the residuals within the span from the weights. From
            # the logits it would be a small difference of large numbers.
            outside = residuals - span.features @ (span.inverse @ residuals)
            within = span.inverse.T @ span.weights(y).T @ span.contrasts
            residuals = outside + problem.scale * within
        return jax.lax.stop_gradient(Solution(span, y, residuals))

    def weights(self, y: Coordinates, problem: SpanProblem) -> Float[Array, "p c"]:
        moving = problem.images.T @ self.residuals / problem.scale
        return _add_derivative(self.span.full_weights(y), moving)

    def logits(self, problem: SpanProblem) -> Float[Array, "n c"]:
        moving = problem.images @ self.weights(self.at, problem)
        return _add_derivative(self.span.logits(self.at), moving)


@jax.custom_jvp
def _add_derivative(x: Array, y: Array) -> Array:
    """Returns `x`, with the derivative of `x + y`."""
    del y
    return x


@_add_derivative.defjvp
def _(primals, tangents):
    x_dot, y_dot = tangents
    return _add_derivative(*primals), x_dot + y_dot
