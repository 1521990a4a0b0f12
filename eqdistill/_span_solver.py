import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import jax.scipy.sparse.linalg
import optax
import optimistix as optx
from jaxtyping import Array, Float, PyTree, ScalarLike

from ._classifier import LogisticRegression
from ._convex_newton import ConvexNewton
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver, Fitted
from ._losses import label_residual
from ._span import Anchor, Coordinates, Span, SpanProblem


class SpanSolver(AbstractInnerSolver):
    r"""Solves the inner problem of a [`eqdistill.LogisticRegression`][] in the span of
    the distilled images.

    By the representer theorem the fitted weights are

    $$W = \frac{1}{n \lambda} \theta^\top A, \qquad
    A = T - \mathrm{softmax}\left(\theta W + 1 b^\top\right),$$

    where $A$ is the residual of the labels' probabilities $T$. They thus lie in the
    span of the images: $W = Q V$, with the right singular vectors $Q$ of $\theta$. The
    problem that is left for $V$ has $r c$ unknowns, $r = \min(n, p)$, and none of the
    $p$ pixels in it. It is solved by Newton's method with a line search, from what the
    classifier's weights have in the span, and differentiated by the implicit function
    theorem. Linear systems of up to 300 unknowns are solved by their matrix, others by
    conjugate gradients, which need no matrix.

    It is exact to rounding for ridges from 1 down to 1e-8 in single precision: for hard
    and soft labels, equal images, and more images than pixels. The one exception are
    equal images of different hard labels, which single precision cannot tell apart at
    ridges below 1e-4: there it does not converge, and says so. Beyond 2,000 unknowns
    the images are not decomposed, which takes longer than all else, and $W$ is the
    unknown: then the derivatives for soft labels are exact down to ridges of 1e-4.

    It may be differentiated forward and backward, but only once.

    **Attributes:**

    - `rtol`, `atol`: Newton's method ends with a step that moves no logit by more than
        `atol + rtol * (the largest logit)`. Its error after that step is about the
        square of this. Both default to the square root of the machine's precision.
    - `max_steps`: the most steps of Newton's method and of its line search together.
    - `gtol`: for a classifier without an intercept, conjugate gradients and Newton's
        method by them also end where the Euclidean norm of the inner loss's gradient is
        at most this.
    - `adjoint_rtol`: the residual to which conjugate gradients solve for the adjoint,
        relative to the right-hand side: if zero or too small to be reached, the
        machine's precision to the power of three quarters.

    Source: Kimeldorf and Wahba 1971 for the representer theorem; Dembo, Eisenstat and
    Steihaug, *Inexact Newton methods*, 1982; `docs/mathematics.md` for the derivative.
    """

    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100
    gtol: ScalarLike = 0.0
    adjoint_rtol: ScalarLike = 0.0

    def __call__(
        self, classifier: PyTree, distilled: DistilledSet, tilt: PyTree | None = None
    ) -> Fitted:
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `TypeError` if the classifier is not a [`eqdistill.LogisticRegression`][]; and
        a `NotImplementedError` if it is differentiated twice.
        """
        if not isinstance(classifier, LogisticRegression):
            raise TypeError(
                "`SpanSolver` fits a `LogisticRegression`, which is linear in its "
                f"parameters; got a {type(classifier).__name__}. Use `ArgminSolver`."
            )
        n = len(distilled)
        _, c = classifier.weights.shape
        images = distilled.images.reshape(n, -1)
        problem = SpanProblem(
            images,
            distilled.labels,
            (n * distilled.l2).astype(images.dtype),
            jax.tree.map(lambda x: x.astype(images.dtype), tilt),
        )
        fixed = jax.lax.stop_gradient(problem)
        span = Span.of(fixed.images, c)

        eps = float(jnp.finfo(images.dtype).eps)
        tolerance = eps**0.5
        # With an intercept, the coordinates have another gradient.
        gtol = n * self.gtol if classifier.intercept is None else 0.0
        adjoint_rtol = jnp.maximum(self.adjoint_rtol, eps**0.75).astype(images.dtype)
        solution = optx.root_find(
            lambda y, problem: span.gradient(y, span.logits(y), problem),
            ConvexNewton(
                rtol=tolerance if self.rtol is None else self.rtol,
                atol=tolerance if self.atol is None else self.atol,
                norm=lambda y: jnp.max(jnp.abs(span.logits(y))),
                solve=lambda y, vector: _solve(
                    span, span.curvature(y), fixed, vector, tolerance, gtol
                ),
            ),
            _start(classifier, span, fixed),
            args=fixed,
            max_steps=self.max_steps,
            throw=False,
        )
        anchor = Anchor.of(solution.value, span, fixed)
        # Not in the images and the ridge: see `Anchor`.
        free = eqx.tree_at(
            lambda p: (p.labels, p.tilt),
            fixed,
            (problem.labels, problem.tilt),
            is_leaf=lambda x: x is None,
        )
        coordinates = _implicit(
            solution.value,
            span.gradient(solution.value, anchor.logits(problem), free),
            (span, fixed, adjoint_rtol),
        )
        intercept = coordinates.intercept
        if intercept is not None:
            intercept = intercept @ span.contrasts
        fitted = eqx.tree_at(
            lambda c: (c.weights, c.intercept),
            classifier,
            (anchor.weights(coordinates, problem), intercept),
            is_leaf=lambda x: x is None,
        )
        return Fitted(
            classifier=fitted,
            converged=solution.result == optx.RESULTS.successful,
            steps=solution.stats["num_steps"],
            gradient_norm=_gradient_norm(fitted, fixed),
            next_start=jax.tree.map(
                lambda x, old: jax.lax.stop_gradient(x).astype(old.dtype),
                fitted,
                classifier,
            ),
        )


def _start(
    classifier: LogisticRegression, span: Span, problem: SpanProblem
) -> Coordinates:
    """The classifier's coordinates, if they are nearer to a solution than zero is, and
    the loss cancels half of the ridge's pull along them; or zero. From where a softmax
    is saturated, Newton's method may not return."""
    y = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x).astype(span.features.dtype),
        span.coordinates(classifier),
    )
    zero = optax.tree.zeros_like(y)
    gradient, at_zero = (span.gradient(x, span.logits(x), problem) for x in (y, zero))
    is_nearer = optax.tree.norm(gradient) < 0.1 * optax.tree.norm(at_zero)
    ridge = problem.scale * jnp.sum(span.weights(y) ** 2)
    is_pulled = optax.tree.vdot(gradient, y) <= 0.5 * ridge
    return optax.tree.where(is_nearer & is_pulled, y, zero)


def _solve(
    span: Span,
    curvature: Float[Array, "n k k"],
    problem: SpanProblem,
    vector: Coordinates,
    rtol: ScalarLike,
    atol: ScalarLike = 0.0,
) -> Coordinates:
    """The inverse of the Hessian where that is the curvature, times a vector. If that
    is of at most `atol`, it may be zero."""
    num_unknowns = sum(x.size for x in jax.tree.leaves(vector))

    def by_matrix(vector):
        use_intercept = vector.intercept is not None
        hessian = span.hessian(curvature, problem, use_intercept)
        factor = jax.scipy.linalg.cho_factor(hessian, lower=True)
        solution = jax.scipy.linalg.cho_solve(factor, span.flatten(vector))
        return span.unflatten(solution, use_intercept)

    def by_conjugate_gradients(vector):
        # Its largest entry is set to one, as the squares of small ones would vanish.
        size = optax.tree.norm(vector, ord="inf")
        size = jnp.where(size > 0, size, 1)
        unit = optax.tree.scale(1 / size, vector)
        norm = jnp.maximum(optax.tree.norm(unit), 1)
        is_negligible = norm * size <= atol
        solution, _ = jax.scipy.sparse.linalg.cg(
            lambda vector: span.hessian_product(curvature, problem, vector),
            optax.tree.where(is_negligible, optax.tree.zeros_like(unit), unit),
            # Half of the latter is left for what Newton's method does not see.
            tol=jnp.maximum(rtol, atol / (2 * norm * size)),  # pyright: ignore
            maxiter=1000,
        )
        return optax.tree.scale(size, solution)

    if num_unknowns <= _MOST_FOR_A_MATRIX:
        return by_matrix(vector)
    if span.basis is None:
        return by_conjugate_gradients(vector)
    largest = jnp.max(jnp.sum(span.features**2, axis=0))
    condition = largest * jnp.max(jnp.trace(curvature, axis1=1, axis2=2))
    # Of all that are solved for at once, so that under `vmap` one of the two is done.
    is_well_conditioned = condition / _LARGEST_CONDITION <= problem.scale
    return jax.lax.cond(
        eqxi.unvmap_all(is_well_conditioned),
        by_conjugate_gradients,
        by_matrix,
        vector,
    )


# More are sooner solved for by conjugate gradients, and as exactly, if the condition of
# the matrix is no larger than this.
_MOST_FOR_A_MATRIX = 300
_LARGEST_CONDITION = 3e5


@jax.custom_jvp
def _only_once(y: Coordinates, gradient: Coordinates) -> Coordinates:
    """`y`, in a derivative that is itself not to be differentiated: it would be taken
    for a function of the gradient alone."""
    del gradient
    return y


@_only_once.defjvp
def _(primals, tangents):
    del primals, tangents
    raise NotImplementedError(
        "`SpanSolver` can be differentiated but once. Use `ArgminSolver`."
    )


@eqx.filter_custom_jvp
def _implicit(y, gradient, fixed):
    """The solution `y`, which moves with its gradient as the implicit function theorem
    has it.

    `optimistix.ImplicitAdjoint` would do the same, but for Lineax's check of its linear
    solve, an error that is raised through a callback: a program that has one is not
    kept in JAX's persistent compilation cache.
    """
    del gradient, fixed
    return y


@_implicit.def_jvp
def _(primals, tangents):
    y, gradient, (span, problem, rtol) = primals
    _, gradient_dot, _ = tangents
    curvature = span.curvature(_only_once(y, gradient))
    y_dot = jax.lax.custom_linear_solve(
        lambda vector: span.hessian_product(curvature, problem, vector),
        gradient_dot,
        lambda _, vector: _solve(span, curvature, problem, vector, rtol),
        symmetric=True,
    )
    return y, optax.tree.scale(-1.0, y_dot)


def _gradient_norm(
    fitted: LogisticRegression, problem: SpanProblem
) -> Float[Array, ""]:
    """As `gradient_norm`, which it takes XLA longer to compile."""
    weights, intercept = jax.lax.stop_gradient((fitted.weights, fitted.intercept))
    logits = problem.images @ weights
    logits = logits if intercept is None else logits + intercept
    residuals = label_residual(logits, problem.labels)
    gradient = problem.scale * weights - problem.images.T @ residuals
    if intercept is not None:
        gradient = (gradient, jnp.sum(residuals, axis=0))
    return optax.tree.norm(gradient) / len(problem.images)
