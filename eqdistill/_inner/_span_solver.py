import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import jax.scipy.sparse.linalg
import optax
import optimistix as optx
from jaxtyping import Array, Float

from .._checks import check_at_least
from .._conversions import as_float_or_none, as_int
from .._data._distilled_set import DistilledSet
from .._losses import CrossEntropy
from .._softmax import label_residual
from ._convex_newton import ConvexNewton
from ._inner_solver import AbstractInnerSolver, Fitted
from ._linear import check_linear, with_head
from ._span import Coordinates, Solution, Span, SpanProblem


class SpanSolver(AbstractInnerSolver[eqx.nn.Linear]):
    r"""Solves the inner problem of an [`eqdistill.linear.LinearClassifier`][] with
    [`eqdistill.CrossEntropy`][] in the span of the features $\theta$ of the distilled
    images.

    By the representer theorem the fitted weights are

    $$W = \frac{1}{n \lambda} \theta^\top A, \qquad
    A = T - \mathrm{softmax}\left(\theta W + 1 b^\top\right),$$

    where $A$ is the difference between the label probabilities $T$ and the fitted
    probabilities. The weights therefore lie in the span of the images: $W = Q V$, with
    the right singular vectors $Q$ of $\theta$. The remaining problem for $V$ has $r c$
    unknowns, $r = \min(n, p)$. It is solved by Newton's method with a line search,
    starting from the previous weights, and differentiated by the implicit function
    theorem. Linear systems of up to 100 unknowns are solved by Cholesky decomposition,
    larger ones by conjugate gradients.

    In float32 the fit is exact to rounding for ridges from 1 down to 1e-8, with hard or
    soft labels, equal images, and more images than pixels. There is one exception:
    equal images with different hard labels cannot be fitted in float32 with ridges
    below 1e-4, and `converged` is `False`. Above 2,000 unknowns the images are not
    decomposed, because that takes longer than the solve, and $W$ is the unknown. The
    derivatives for soft labels are then exact down to ridges of 1e-4.

    The fit can be differentiated in forward and in reverse mode, but only once.

    The state is the head of the last fit, used as a warm start.

    **Attributes:**

    - `rtol`, `atol`: Newton's method stops after a step that changes no logit by more
        than `atol + rtol * (the largest logit)`. The error is then about the square of
        this. Both default to the square root of the machine precision.
    - `max_steps`: the maximum number of iterations of Newton's method, including those
        of its line search.

    Source: Kimeldorf and Wahba 1971 for the representer theorem; Dembo, Eisenstat and
    Steihaug, *Inexact Newton methods*, 1982; `docs/mathematics.md` for the derivative.
    """

    rtol: float | None = eqx.field(default=None, converter=as_float_or_none)
    atol: float | None = eqx.field(default=None, converter=as_float_or_none)
    max_steps: int = eqx.field(default=100, converter=as_int)

    def __check_init__(self):
        check_at_least(0, rtol=self.rtol, atol=self.atol)
        check_at_least(1, max_steps=self.max_steps)

    def init(self, distilled, model, *, key):
        """As [`eqdistill.AbstractInnerSolver`][]. Raises the same errors as a call."""
        del key
        return check_linear("SpanSolver", distilled, model, CrossEntropy).head

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        - A `TypeError` if the model is not an [`eqdistill.linear.LinearClassifier`][],
            or if the loss is not [`eqdistill.CrossEntropy`][].
        - A `NotImplementedError` if the fit is differentiated twice.
        """
        del key
        model = check_linear("SpanSolver", distilled, model, CrossEntropy)
        images = jax.vmap(model.features)(distilled.images)
        dtype = images.dtype
        n = len(images)
        problem = SpanProblem(
            images, distilled.labels, (n * distilled.l2).astype(dtype)
        )
        fixed = jax.lax.stop_gradient(problem)
        span = Span.of(fixed.images, model.head.weight.shape[0])

        tolerance = float(jnp.finfo(dtype).eps) ** 0.5
        solution = optx.root_find(
            lambda y, problem: span.gradient(y, span.logits(y), problem),
            ConvexNewton(
                rtol=tolerance if self.rtol is None else self.rtol,
                atol=tolerance if self.atol is None else self.atol,
                norm=lambda y: jnp.max(jnp.abs(span.logits(y))),
                solve=lambda y, vector: _solve(
                    span, span.curvature(y), fixed, vector, tolerance
                ),
            ),
            _start(state, span, fixed),
            args=fixed,
            max_steps=self.max_steps,
            throw=False,
        )
        found = Solution.of(solution.value, span, fixed)
        # The logits already depend on the images and the ridge, so differentiate the
        # gradient directly only in the labels.
        by_labels = eqx.tree_at(lambda p: p.labels, fixed, problem.labels)
        coordinates = _implicit(
            solution.value,
            span.gradient(solution.value, found.logits(problem), by_labels),
            (span, fixed),
        )
        weight = found.weights(coordinates, problem).T
        bias = coordinates.intercept
        if bias is not None:
            bias = bias @ span.contrasts
        fitted = with_head(model, weight, bias)
        return Fitted(
            model=fitted,
            converged=solution.result == optx.RESULTS.successful,
            gradient_norm=_gradient_norm(fitted.head, fixed),
            stats={"steps": solution.stats["num_steps"]},
        ), jax.tree.map(
            lambda x, old: jax.lax.stop_gradient(x).astype(old.dtype),
            fitted.head,
            state,
        )


def _start(head: eqx.nn.Linear, span: Span, problem: SpanProblem) -> Coordinates:
    """The coordinates of `head` if they are close to a solution, otherwise zero.

    They are close if the gradient is less than a tenth of the gradient at zero, and the
    loss cancels at least half of the ridge's gradient along them. Where the softmax is
    saturated, Newton's method may not converge.
    """
    y = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x).astype(span.features.dtype),
        span.coordinates(head),
    )
    zero = optax.tree.zeros_like(y)
    gradient, at_zero = (span.gradient(x, span.logits(x), problem) for x in (y, zero))
    is_near = optax.tree.norm(gradient) < 0.1 * optax.tree.norm(at_zero)
    ridge = problem.scale * jnp.sum(span.weights(y) ** 2)
    is_pulled = optax.tree.vdot(gradient, y) <= 0.5 * ridge
    return optax.tree.where(is_near & is_pulled, y, zero)


def _solve(
    span: Span,
    curvature: Float[Array, "n k k"],
    problem: SpanProblem,
    vector: Coordinates,
    rtol: float,
) -> Coordinates:
    """Applies the inverse of the Hessian with this curvature to a vector."""
    num_unknowns = sum(x.size for x in jax.tree.leaves(vector))

    def solve_cholesky(vector):
        use_intercept = vector.intercept is not None
        hessian = span.hessian(curvature, problem, use_intercept)
        factor = jax.scipy.linalg.cho_factor(hessian, lower=True)
        solution = jax.scipy.linalg.cho_solve(factor, span.flatten(vector))
        return span.unflatten(solution, use_intercept)

    def solve_cg(vector):
        # Scale the largest entry to one, so that no square underflows.
        size = optax.tree.norm(vector, ord="inf")
        size = jnp.where(size > 0, size, 1)
        solution, _ = jax.scipy.sparse.linalg.cg(
            lambda vector: span.hessian_product(curvature, problem, vector),
            optax.tree.scale(1 / size, vector),
            tol=rtol,
            maxiter=1000,
        )
        return optax.tree.scale(size, solution)

    if num_unknowns <= _MOST_FOR_CHOLESKY:
        return solve_cholesky(vector)
    if span.basis is None:
        return solve_cg(vector)
    largest = jnp.max(jnp.sum(span.features**2, axis=0))
    condition = largest * jnp.max(jnp.trace(curvature, axis1=1, axis2=2))
    # One decision for all problems of a `vmap`, so that only one of the solves runs.
    is_well_conditioned = condition / _LARGEST_CONDITION <= problem.scale
    return jax.lax.cond(
        eqxi.unvmap_all(is_well_conditioned),
        solve_cg,
        solve_cholesky,
        vector,
    )


# Larger systems are solved faster by conjugate gradients, and as accurately if the
# condition number is below this.
_MOST_FOR_CHOLESKY = 100
_LARGEST_CONDITION = 3e5


@jax.custom_jvp
def _only_once(y: Coordinates, gradient: Coordinates) -> Coordinates:
    """Returns `y`. Its derivative raises: a second derivative would be wrong."""
    del gradient
    return y


@_only_once.defjvp
def _(primals, tangents):
    del primals, tangents
    raise NotImplementedError(
        "`SpanSolver` can be differentiated only once. Use `ArgminSolver`."
    )


@eqx.filter_custom_jvp
def _implicit(y, gradient, fixed):
    """Returns the solution `y`, with the derivative given by the implicit function
    theorem applied to its gradient.

    Don't use `optimistix.ImplicitAdjoint`: Lineax checks its linear solve with an error
    from a callback, and JAX's persistent compilation cache skips programs with
    callbacks.
    """
    del gradient, fixed
    return y


@_implicit.def_jvp
def _(primals, tangents):
    y, gradient, (span, problem) = primals
    _, gradient_dot, _ = tangents
    curvature = span.curvature(_only_once(y, gradient))
    rtol = float(jnp.finfo(span.features.dtype).eps) ** 0.75
    y_dot = jax.lax.custom_linear_solve(
        lambda vector: span.hessian_product(curvature, problem, vector),
        gradient_dot,
        lambda _, vector: _solve(span, curvature, problem, vector, rtol),
        symmetric=True,
    )
    return y, optax.tree.scale(-1.0, y_dot)


def _gradient_norm(head: eqx.nn.Linear, problem: SpanProblem) -> Float[Array, ""]:
    """As `gradient_norm`, but to full relative precision. With a ridge of 1e-16 the
    gradient of the ridge is smaller than the rounding errors of the probabilities,
    whose differences `gradient_norm` takes."""
    weight, bias = jax.lax.stop_gradient((head.weight, head.bias))
    logits = problem.images @ weight.T
    logits = logits if bias is None else logits + bias
    residuals = label_residual(logits, problem.labels)
    gradient = problem.scale * weight - residuals.T @ problem.images
    if bias is not None:
        gradient = (gradient, jnp.sum(residuals, axis=0))
    return optax.tree.norm(gradient) / len(problem.images)
