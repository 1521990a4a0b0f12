from dataclasses import replace

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import jax.scipy.sparse.linalg
import optax
from jaxtyping import Array, Float

from .._checks import check_at_least
from .._conversions import as_float_or_none, as_int
from .._data._distilled_set import DistilledSet
from .._losses import CrossEntropy
from .._sharding import vary_like
from ._inner_solver import AbstractInnerSolver, Fitted
from ._linear import check_linear, with_head
from ._span import Solution, Span, SpanProblem


class SpanSolver(AbstractInnerSolver[eqx.nn.Linear]):
    r"""Solves the inner problem of an [`eqdistill.linear.LinearClassifier`][] with
    [`eqdistill.CrossEntropy`][] in the span of the features $\theta$ of the distilled
    images.

    By the representer theorem the fitted weights are

    $$W = \frac{1}{n \lambda} \theta^\top A, \qquad
    A = T - \mathrm{softmax}\left(\theta W + 1 b^\top\right),$$

    where $A$ is the difference between the label probabilities $T$ and the fitted
    probabilities, multiplied by the weight of each image. The parameters $W$ therefore
    lie in the span of the images: $W = Q V$, with the right singular vectors $Q$ of
    $\theta$. The remaining problem for $V$ has $r (c - 1)$ unknowns, $r = \min(n, p)$.
    It is solved by Newton's method with a line search, starting from the previous
    weights, and differentiated by the implicit function theorem. Linear systems of up
    to 100 unknowns, and ill-conditioned ones of up to 2,000, are solved by Cholesky
    decomposition, all others by conjugate gradients.

    In float32 the fit is exact to rounding for ridges from 1 down to 1e-8, with hard or
    soft labels, and also with identical images or more images than pixels. There is one
    exception: identical images with different hard labels cannot be fitted in float32
    with ridges below 1e-4, and `converged` is `False`. Above 2,000 unknowns the images
    are not decomposed, because that takes longer than the solve, and $W$ is the
    unknown. The derivatives for soft labels are then exact down to ridges of 1e-4.

    The fit can be differentiated in forward and in reverse mode, but only once.

    The state is the head of the last fit, used as a warm start.

    **Attributes:**

    - `rtol`, `atol`: Newton's method stops after a step that changes no logit by more
        than `atol + rtol * (the largest logit)`. The error is then about the square of
        this. Both default to the square root of the machine precision.
    - `max_steps`: the maximum number of iterations of Newton's method, including those
        of its line search.

    Source: Kimeldorf and Wahba 1971 for the representer theorem; Dembo, Eisenstat and
    Steihaug, *Inexact Newton methods*, 1982;
    [hypergradients](../explanation/hypergradients.md#in-the-span-of-the-images) for the
    derivative.
    """

    rtol: float | None = eqx.field(default=None, converter=as_float_or_none)
    atol: float | None = eqx.field(default=None, converter=as_float_or_none)
    max_steps: int = eqx.field(default=100, converter=as_int)

    def __check_init__(self):
        check_at_least(0, rtol=self.rtol, atol=self.atol)
        check_at_least(1, max_steps=self.max_steps)

    def init(self, distilled, model, *, key):
        return check_linear("SpanSolver", distilled, model, CrossEntropy).head

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """**Raises:** a `TypeError` for another model or loss, and a `RuntimeError` if
        the fit is differentiated twice."""
        model = check_linear("SpanSolver", distilled, model, CrossEntropy)
        images = jax.vmap(model.features)(distilled.images)
        scale = (len(images) * distilled.l2).astype(images.dtype)
        weights = distilled.weights
        problem = SpanProblem(images, distilled.labels, weights, scale)
        fixed = jax.lax.stop_gradient(problem)
        num_classes = model.head.weight.shape[0]
        span = Span(fixed.images, num_classes, model.head.bias is not None)
        # The constants must vary too, since they are used in branches.
        span, fixed = vary_like((span, fixed), (span, fixed))
        y, is_solved, steps = self._minimise(span, fixed, _start(state, span, fixed))
        found = Solution.of(y, span, fixed)
        # The logits already depend on the images and the ridge, so differentiate the
        # gradient directly only in the labels and the weights.
        moving = replace(fixed, labels=problem.labels, weights=problem.weights)
        gradient = span.gradient(y, found.logits(problem), moving)
        y = _implicit(y, gradient, (span, fixed))
        bias = y[:, -1] @ span.contrasts if span.use_intercept else None
        fitted = with_head(model, found.weights(y, problem).T, bias)
        head = jax.lax.stop_gradient(fitted.head)
        norm = _gradient_norm(head, fixed)
        state = jax.tree.map(lambda x, old: x.astype(old.dtype), head, state)
        return Fitted(fitted, is_solved, norm, stats={"steps": steps}), state

    def _minimise(self, span, problem, y):
        """Newton's method for the root of the gradient. Returns the solution, whether
        the method converged, and the number of steps.

        A step is halved until the slope of the loss along it is not much above zero.
        (The slope starts negative and increases along the step.) The last step is small
        and is taken whole. Values of the loss are not compared, because rounding
        affects them long before it affects the gradient. Each iteration tries one
        fraction, so the compiled program contains the gradient once.
        """
        norm = lambda y: jnp.max(jnp.abs(span.logits(y)))
        tol = float(jnp.finfo(y.dtype).eps) ** 0.5
        rtol = tol if self.rtol is None else self.rtol
        atol = tol if self.atol is None else self.atol

        def body(carry):
            y, step, slope, fraction, _, count = carry
            tried = y + fraction * step
            gradient = span.gradient(tried, span.logits(tried), problem)
            is_short = jnp.vdot(gradient, step) <= 0.5 * jnp.abs(slope)

            def accept():
                curvature = span.curvature(tried, problem)
                step = -_solve(span, curvature, problem, gradient, tol)
                is_last = norm(step) <= atol + rtol * norm(tried)
                new_y = tried + jnp.where(is_last, 1, 0) * step
                return new_y, step, jnp.vdot(gradient, step), one, is_last

            def halve():
                return y, step, slope, fraction / 2, no

            new = jax.lax.cond(is_short | (fraction <= 1e-6), accept, halve)
            return *new, count + 1

        constants = jnp.ones((), y.dtype), jnp.array(False), jnp.array(0)
        y, one, no, zero = vary_like((y, *constants), (y, span, problem))
        carry = (y, 0 * y, 0 * one, 0 * one, no, zero)
        keep_going = lambda c: ~c[4] & (c[5] < self.max_steps) & jnp.isfinite(c[2])
        y, *_, is_solved, count = jax.lax.while_loop(keep_going, body, carry)
        return y, is_solved, count


def _start(head: eqx.nn.Linear, span: Span, problem: SpanProblem) -> Array:
    """The coordinates of `head` if they are close to a solution, otherwise zero.

    They are close if the gradient is less than a tenth of the gradient at zero, and the
    loss cancels at least half of the ridge's gradient along them. Where the softmax is
    saturated, Newton's method may not converge.
    """
    y = jax.lax.stop_gradient(span.coordinates(head)).astype(span.features.dtype)
    zero = jnp.zeros_like(y)
    gradient, at_zero = (span.gradient(x, span.logits(x), problem) for x in (y, zero))
    is_near = jnp.linalg.norm(gradient) < 0.1 * jnp.linalg.norm(at_zero)
    ridge = problem.scale * jnp.sum(span.weights(y) ** 2)
    is_pulled = jnp.vdot(gradient, y) <= 0.5 * ridge
    return jnp.where(is_near & is_pulled, y, zero)


# Larger systems are solved faster by conjugate gradients, and as accurately if the
# condition number is below this.
_MOST_FOR_CHOLESKY = 100
_LARGEST_CONDITION = 3e5


def _solve(
    span: Span,
    curvature: Float[Array, "n k k"],
    problem: SpanProblem,
    vector: Float[Array, "k m"],
    rtol: float,
) -> Float[Array, "k m"]:
    """Applies the inverse of the Hessian with this curvature to a vector."""

    def solve_cholesky(vector):
        hessian = span.hessian(curvature, problem)
        factor = jax.scipy.linalg.cho_factor(hessian, lower=True)
        solution = jax.scipy.linalg.cho_solve(factor, jnp.ravel(vector.T))
        return solution.reshape(vector.T.shape).T

    def solve_cg(vector):
        # Scale the largest entry to one, so that no square underflows.
        size = jnp.max(jnp.abs(vector))
        size = jnp.where(size > 0, size, 1)
        solution, _ = jax.scipy.sparse.linalg.cg(
            lambda vector: span.hessian_product(curvature, problem, vector),
            vector / size,
            tol=rtol,
            maxiter=1000,
        )
        return size * solution

    if vector.size <= _MOST_FOR_CHOLESKY:
        return solve_cholesky(vector)
    if span.basis is None:
        return solve_cg(vector)
    features = span.features[:, : len(span.shift)]
    largest = jnp.max(jnp.sum(features**2, axis=0))
    condition = largest * jnp.max(jnp.trace(curvature, axis1=1, axis2=2))
    # One decision for all problems of a `vmap`, so that only one of the solves runs.
    is_well_conditioned = condition / _LARGEST_CONDITION <= problem.scale
    return jax.lax.cond(
        eqxi.unvmap_all(is_well_conditioned), solve_cg, solve_cholesky, vector
    )


@eqx.filter_custom_jvp
def _implicit(y, gradient, fixed):
    """Returns the solution `y`, with the derivative given by the implicit function
    theorem applied to its gradient.

    Don't use `optimistix.ImplicitAdjoint`: Lineax checks its linear solve with an error
    from a callback, and JAX's persistent compilation cache skips programs with
    callbacks.
    """
    return y


@_implicit.def_jvp
def _(primals, tangents):
    y, gradient, (span, problem) = primals
    # A second derivative would be wrong.
    message = "`SpanSolver` can be differentiated only once. Use `ArgminSolver`."
    eqxi.nondifferentiable(gradient, msg=message)
    curvature = span.curvature(y, problem)
    rtol = float(jnp.finfo(y.dtype).eps) ** 0.75
    y_dot = jax.lax.custom_linear_solve(
        lambda vector: span.hessian_product(curvature, problem, vector),
        tangents[1],
        lambda _, vector: _solve(span, curvature, problem, vector, rtol),
        symmetric=True,
    )
    return y, -y_dot


def _gradient_norm(head: eqx.nn.Linear, problem: SpanProblem) -> Float[Array, ""]:
    """Like `gradient_norm`, but to full relative precision. With a ridge of 1e-16 the
    gradient of the ridge is smaller than the rounding errors of the probabilities,
    whose differences `gradient_norm` takes."""
    weight, bias = head.weight, head.bias
    logits = problem.images @ weight.T
    logits = logits if bias is None else logits + bias
    residuals = problem.residuals(logits)
    gradient = problem.scale * weight - residuals.T @ problem.images
    if bias is not None:
        gradient = (gradient, jnp.sum(residuals, axis=0))
    return optax.tree.norm(gradient) / len(problem.images)
