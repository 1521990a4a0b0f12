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
    r"""Solves the inner problem of an [`eqdistill.LinearClassifier`][] with
    [`eqdistill.CrossEntropy`][] in the span of the distilled images, or rather of their
    features.

    By the representer theorem the fitted weights are

    $$W = \frac{1}{n \lambda} \theta^\top A, \qquad
    A = T - \mathrm{softmax}\left(\theta W + 1 b^\top\right),$$

    where $A$ are the probabilities $T$ of the labels less those of the fit. The weights
    thus lie in the span of the images: $W = Q V$, with the right singular vectors $Q$
    of $\theta$. The problem that is left for $V$ has $r c$ unknowns, $r = \min(n, p)$.
    It is solved by Newton's method with a line search, from the weights of the fit
    before, and differentiated by the implicit function theorem. Linear systems of up to
    100 unknowns are solved by Cholesky decomposition, and others by conjugate
    gradients, which need no matrix.

    In single precision it is exact to rounding for ridges from 1 down to 1e-8: for hard
    and soft labels, equal images, and more images than pixels. The one exception are
    equal images of different hard labels, which single precision cannot tell apart at
    ridges below 1e-4: `converged` is `False` there. Beyond 2,000 unknowns the images
    are not decomposed, which takes longer than the solve, and $W$ is the unknown. The
    derivatives for soft labels are then exact down to ridges of 1e-4.

    The fit may be differentiated in forward and in reverse mode, but only once.

    Its state is the head of the last fit: a warm start.

    **Attributes:**

    - `rtol`, `atol`: Newton's method ends with a step that moves no logit by more than
        `atol + rtol * (the largest logit)`. The error after that step is about the
        square of this. Both default to the square root of the machine's precision.
    - `max_steps`: the most steps of Newton's method and of its line search together.

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
        """As [`eqdistill.AbstractInnerSolver`][]; raises as a call does."""
        del key
        return check_linear("SpanSolver", distilled, model, CrossEntropy).head

    def __call__(self, distilled: DistilledSet, model, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `TypeError` if the model is not an [`eqdistill.LinearClassifier`][], or
        the loss is not [`eqdistill.CrossEntropy`][]; and a `NotImplementedError` if the
        fit is differentiated twice.
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
        # Only in the labels: `found` moves with the images and the ridge.
        free = eqx.tree_at(lambda p: p.labels, fixed, problem.labels)
        coordinates = _implicit(
            solution.value,
            span.gradient(solution.value, found.logits(problem), free),
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
    """The coordinates of `head` if they are near a solution, and zero otherwise.

    They are near if the gradient is a tenth of the gradient at zero, and the loss
    cancels half of the pull of the ridge along them. Newton's method may not return
    from where the softmax is saturated.
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
    """The inverse of the Hessian with this curvature, times a vector."""
    num_unknowns = sum(x.size for x in jax.tree.leaves(vector))

    def by_matrix(vector):
        use_intercept = vector.intercept is not None
        hessian = span.hessian(curvature, problem, use_intercept)
        factor = jax.scipy.linalg.cho_factor(hessian, lower=True)
        solution = jax.scipy.linalg.cho_solve(factor, span.flatten(vector))
        return span.unflatten(solution, use_intercept)

    def by_conjugate_gradients(vector):
        # The largest entry is scaled to one, as the squares of small ones would vanish.
        size = optax.tree.norm(vector, ord="inf")
        size = jnp.where(size > 0, size, 1)
        solution, _ = jax.scipy.sparse.linalg.cg(
            lambda vector: span.hessian_product(curvature, problem, vector),
            optax.tree.scale(1 / size, vector),
            tol=rtol,
            maxiter=1000,
        )
        return optax.tree.scale(size, solution)

    if num_unknowns <= _MOST_FOR_A_MATRIX:
        return by_matrix(vector)
    if span.basis is None:
        return by_conjugate_gradients(vector)
    largest = jnp.max(jnp.sum(span.features**2, axis=0))
    condition = largest * jnp.max(jnp.trace(curvature, axis1=1, axis2=2))
    # Over all problems of a `vmap`, so that one of the two solves is done, not both.
    is_well_conditioned = condition / _LARGEST_CONDITION <= problem.scale
    return jax.lax.cond(
        eqxi.unvmap_all(is_well_conditioned),
        by_conjugate_gradients,
        by_matrix,
        vector,
    )


# Larger systems are solved sooner by conjugate gradients, and as exactly, if the
# condition of the matrix is no larger than this.
_MOST_FOR_A_MATRIX = 100
_LARGEST_CONDITION = 3e5


@jax.custom_jvp
def _only_once(y: Coordinates, gradient: Coordinates) -> Coordinates:
    """`y`, in a derivative that is not to be differentiated again: the result would be
    wrong."""
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
    """The solution `y`, which moves with its gradient as the implicit function theorem
    says.

    `optimistix.ImplicitAdjoint` would do the same, except that Lineax checks its linear
    solve by an error that is raised from a callback. JAX's persistent compilation cache
    does not keep a program with a callback.
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
    gradient of the ridge is below the rounding of the probabilities, of which
    `gradient_norm` takes differences."""
    weight, bias = jax.lax.stop_gradient((head.weight, head.bias))
    logits = problem.images @ weight.T
    logits = logits if bias is None else logits + bias
    residuals = label_residual(logits, problem.labels)
    gradient = problem.scale * weight - residuals.T @ problem.images
    if bias is not None:
        gradient = (gradient, jnp.sum(residuals, axis=0))
    return optax.tree.norm(gradient) / len(problem.images)
