from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import lineax as lx
import optax
import optimistix as optx
import scipy.linalg
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from ._adjoint import DampedCG
from ._classifier import LogisticRegression
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver, Fitted
from ._losses import label_residual, softmax_change, softmax_covariance


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
    theorem.

    It is exact to rounding for ridges from 1 down to 1e-8 in single precision: for hard
    and soft labels, equal images, and more images than pixels. The one exception are
    equal images of different hard labels, which single precision cannot tell apart at
    ridges below 1e-4: there it does not converge, and says so. Only its first
    derivatives are right, forward and backward.

    !!! info

        Up to 2,000 unknowns $r c$, each step solves with a dense matrix of them, of 16
        MB at most in single precision. Above, it takes conjugate gradients, which need
        no matrix, and many iterations where the ridge is small.

    **Attributes:**

    - `rtol`, `atol`: Newton's method ends with a step that moves no logit by more than
        `atol + rtol * (the largest logit)`. Its error after that step is about the
        square of this. Both default to the square root of the machine's precision.
    - `max_steps`: the most steps of Newton's method and of its line search together.

    Source: Kimeldorf and Wahba 1971 for the representer theorem; `docs/mathematics.md`
    for the derivative.
    """

    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100

    def __call__(
        self, classifier: PyTree, distilled: DistilledSet, tilt: PyTree | None = None
    ) -> Fitted:
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `TypeError` if the classifier is not a [`eqdistill.LogisticRegression`][].
        """
        if not isinstance(classifier, LogisticRegression):
            raise TypeError(
                "`SpanSolver` fits a `LogisticRegression`, which is linear in its "
                f"parameters; got a {type(classifier).__name__}. Use `ArgminSolver`."
            )
        n = len(distilled)
        _, c = classifier.weights.shape
        images = distilled.images.reshape(n, -1)
        problem = _Problem(
            images,
            distilled.labels,
            (n * distilled.l2).astype(images.dtype),
            jax.tree.map(lambda x: x.astype(images.dtype), tilt),
        )
        fixed = jax.lax.stop_gradient(problem)
        span = _Span.of(fixed.images, c)

        tolerance = float(jnp.finfo(images.dtype).eps) ** 0.5
        solution = optx.root_find(
            lambda y, problem: span.gradient(y, span.logits(y), problem),
            _ConvexNewton(
                rtol=tolerance if self.rtol is None else self.rtol,
                atol=tolerance if self.atol is None else self.atol,
                norm=lambda y: jnp.max(jnp.abs(span.logits(y))),
                solve=lambda y, vector: _solve(span, y, fixed, vector),
            ),
            _start(classifier, span, fixed),
            args=fixed,
            max_steps=self.max_steps,
            throw=False,
        )
        anchor = _Anchor.of(solution.value, span, fixed)
        # Not in the images and the ridge: see `_Anchor`.
        free = eqx.tree_at(
            lambda p: (p.labels, p.tilt),
            fixed,
            (problem.labels, problem.tilt),
            is_leaf=lambda x: x is None,
        )
        coordinates = _implicit(
            solution.value,
            span.gradient(solution.value, anchor.logits(problem), free),
            (span, fixed),
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


class _Problem(eqx.Module):
    """With `n` times the ridge, and the tilt, which is zero."""

    images: Float[Array, "n p"]
    labels: Int[Array, " n"] | Float[Array, "n c"]
    scale: Float[Array, ""]
    tilt: LogisticRegression | None


class _Coordinates(eqx.Module):
    r"""The unknowns, both without their mean over the classes, which has no effect.

    A classifier in the span has weights $Q V$ and intercept $b$, of which
    `weights` is $V + S^{-1} U^\top 1 b^\top$ and `intercept` is $b$. A change of the
    latter then leaves the logits as they are, as far as the images are independent, and
    so is told apart from one of the former by the ridge alone, however small.
    """

    weights: Float[Array, "r k"]
    intercept: Float[Array, " k"] | None


class _Span(eqx.Module):
    r"""The singular value decomposition $\theta = U S Q^\top$, and a basis of the
    contrasts between classes."""

    left: Float[Array, "n r"]
    singular_values: Float[Array, " r"]
    basis: Float[Array, "r p"]
    contrasts: Float[Array, "k c"]

    @staticmethod
    def of(images: Float[Array, "n p"], num_classes: int) -> "_Span":
        left, singular_values, basis = jnp.linalg.svd(images, full_matrices=False)
        # What is below rounding is zero: equal images differ in nothing.
        rounding = max(images.shape) * jnp.finfo(images.dtype).eps
        is_zero = ~(singular_values > rounding * singular_values[0])
        return _Span(
            jnp.where(is_zero, 0, left),
            jnp.where(is_zero, 0, singular_values),
            basis,
            jnp.asarray(scipy.linalg.helmert(num_classes), images.dtype),
        )

    @property
    def features(self) -> Float[Array, "n r"]:
        return self.left * self.singular_values

    @property
    def inverse(self) -> Float[Array, " r"]:
        s = self.singular_values
        return jnp.where(s > 0, 1 / jnp.where(s > 0, s, 1), 0)

    @property
    def shift(self) -> Float[Array, " r"]:
        return self.inverse * jnp.sum(self.left, axis=0)

    @property
    def outside(self) -> Float[Array, " n"]:
        outside = 1 - self.left @ jnp.sum(self.left, axis=0)
        # As for the singular values: what is below rounding is zero.
        rounding = len(outside) * jnp.finfo(outside.dtype).eps
        return jnp.where(jnp.max(jnp.abs(outside)) > rounding, outside, 0)

    def coordinates(self, classifier: LogisticRegression) -> _Coordinates:
        """Of the classifier in the span that is nearest."""
        weights = self.basis @ classifier.weights @ self.contrasts.T
        if classifier.intercept is None:
            return _Coordinates(weights, None)
        intercept = self.contrasts @ classifier.intercept
        return _Coordinates(weights + jnp.outer(self.shift, intercept), intercept)

    def weights(self, y: _Coordinates) -> Float[Array, "r k"]:
        if y.intercept is None:
            return y.weights
        return y.weights - jnp.outer(self.shift, y.intercept)

    def logits(self, y: _Coordinates) -> Float[Array, "n c"]:
        contrasts = self.features @ y.weights
        if y.intercept is not None:
            contrasts = contrasts + jnp.outer(self.outside, y.intercept)
        return contrasts @ self.contrasts

    def gradient(
        self, y: _Coordinates, logits: Float[Array, "n c"], problem: _Problem
    ) -> _Coordinates:
        """`n` times the gradient of the inner loss in the coordinates, if these are its
        logits."""
        residuals = label_residual(logits, problem.labels) @ self.contrasts.T
        ridge = problem.scale * self.weights(y)
        weights = ridge - self.features.T @ residuals
        if y.intercept is None:
            return _Coordinates(weights, None)
        intercept = -self.shift @ ridge - self.outside @ residuals
        if problem.tilt is not None and problem.tilt.intercept is not None:
            tilt = len(logits) * problem.tilt.intercept
            intercept = intercept + self.contrasts @ tilt
        return _Coordinates(weights, intercept)

    def hessian_product(
        self, y: _Coordinates, problem: _Problem, vector: _Coordinates
    ) -> _Coordinates:
        """The derivative of `gradient` at `y` along `vector`."""
        change = softmax_change(self.logits(y), self.logits(vector)) @ self.contrasts.T
        ridge = problem.scale * self.weights(vector)
        weights = ridge + self.features.T @ change
        if y.intercept is None:
            return _Coordinates(weights, None)
        return _Coordinates(weights, self.outside @ change - self.shift @ ridge)

    def hessian(self, y: _Coordinates, problem: _Problem) -> Float[Array, "m m"]:
        """The same derivative as a matrix, of the coordinates one after the other."""
        covariance = softmax_covariance(self.logits(y))
        covariance = self.contrasts @ covariance @ self.contrasts.T
        features = self.features
        if y.intercept is not None:
            features = jnp.concatenate([features, self.outside[:, None]], axis=1)
        matrix = jnp.einsum("na,nb,nkl->akbl", features, features, covariance)
        num_contrasts = len(self.contrasts)
        matrix = matrix.reshape(features.shape[1] * num_contrasts, -1)
        if y.intercept is None:
            return matrix + problem.scale * jnp.eye(len(matrix), dtype=matrix.dtype)
        rank, dtype = len(self.shift), matrix.dtype
        shift = jnp.concatenate([jnp.eye(rank, dtype=dtype), -self.shift[:, None]], 1)
        ridge = problem.scale * (shift.T @ shift)
        return matrix + jnp.kron(ridge, jnp.eye(num_contrasts, dtype=dtype))


def _start(
    classifier: LogisticRegression, span: _Span, problem: _Problem
) -> _Coordinates:
    """The classifier's coordinates, if they are near a solution, in that the gradient
    of the loss cancels half of that of the ridge; or zero. From where a softmax is
    saturated, Newton's method may not return."""
    y = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x).astype(span.basis.dtype),
        span.coordinates(classifier),
    )
    gradient = span.gradient(y, span.logits(y), problem)
    ridge = problem.scale * jnp.linalg.norm(span.weights(y))
    is_near = optax.tree.norm(gradient) < 0.5 * ridge
    return optax.tree.where(is_near, y, optax.tree.zeros_like(y))


def _solve(
    span: _Span, y: _Coordinates, problem: _Problem, vector: _Coordinates
) -> _Coordinates:
    """The inverse of the Hessian at `y`, times a vector."""
    flat, unravel = ravel_pytree(vector)
    # A matrix of all the unknowns, for as long as it is small.
    if flat.size <= 2000:
        factor = jax.scipy.linalg.cho_factor(span.hessian(y, problem), lower=True)
        return unravel(jax.scipy.linalg.cho_solve(factor, flat))
    hessian = lx.FunctionLinearOperator(
        lambda vector: span.hessian_product(y, problem, vector),
        jax.eval_shape(lambda: vector),
        lx.positive_semidefinite_tag,
    )
    solver = DampedCG(rtol=float(jnp.finfo(flat.dtype).eps) ** 0.5)
    return lx.linear_solve(hessian, vector, solver, throw=False).value


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
    y, _, (span, problem) = primals
    _, gradient_dot, _ = tangents
    y_dot = jax.lax.custom_linear_solve(
        lambda vector: span.hessian_product(y, problem, vector),
        gradient_dot,
        lambda _, vector: _solve(span, y, problem, vector),
        symmetric=True,
    )
    return y, optax.tree.scale(-1.0, y_dot)


class _Anchor(eqx.Module):
    r"""What is needed to differentiate a solution $W = Q V$, which leaves the span of
    the images when the images change.

    Let $A$ be its residuals. To first order in a change of the images and the ridge,
    the solution is

    $$W = \theta^\top A / n \lambda - \tau / \lambda + Q \, (V - V_0)$$

    with the tilt $\tau$, and with $A$, $Q$ and the coordinates $V_0$ held fixed: the
    change of $A$ is multiplied by the old images, and so stays in their span. For the
    first term's value $Q V_0$ is put: it is exact to rounding, where a small difference
    over a small ridge is not.
    """

    span: _Span
    at: _Coordinates
    residuals: Float[Array, "n c"]

    @staticmethod
    def of(y: _Coordinates, span: _Span, problem: _Problem) -> "_Anchor":
        # Of the residuals, that part which makes up the weights follows from them:
        # taken from the logits, it would be a small difference of large numbers.
        residuals = label_residual(span.logits(y), problem.labels)
        outside = residuals - span.left @ (span.left.T @ residuals)
        within = (span.left * span.inverse) @ span.weights(y) @ span.contrasts
        return jax.lax.stop_gradient(_Anchor(span, y, outside + problem.scale * within))

    def weights(self, y: _Coordinates, problem: _Problem) -> Float[Array, "p c"]:
        moving = problem.images.T @ self.residuals / problem.scale
        if problem.tilt is not None:
            ridge = problem.scale / len(problem.images)
            moving = moving - problem.tilt.weights / ridge
        within = self.span.basis.T @ self.span.weights(y) @ self.span.contrasts
        return _moving_as(within, moving)

    def logits(self, problem: _Problem) -> Float[Array, "n c"]:
        moving = problem.images @ self.weights(self.at, problem)
        return _moving_as(self.span.logits(self.at), moving)


def _gradient_norm(fitted: LogisticRegression, problem: _Problem) -> Float[Array, ""]:
    """As `gradient_norm`, which it takes XLA longer to compile."""
    weights, intercept = jax.lax.stop_gradient((fitted.weights, fitted.intercept))
    logits = problem.images @ weights
    logits = logits if intercept is None else logits + intercept
    residuals = label_residual(logits, problem.labels)
    gradient = problem.scale * weights - problem.images.T @ residuals
    if intercept is not None:
        gradient = (gradient, jnp.sum(residuals, axis=0))
    return optax.tree.norm(gradient) / len(problem.images)


@jax.custom_jvp
def _moving_as(x: Array, y: Array) -> Array:
    """`x`, but with the derivative of `y` added to its own."""
    del y
    return x


@_moving_as.defjvp
def _(primals, tangents):
    x_dot, y_dot = tangents
    return _moving_as(*primals), x_dot + y_dot


class _NewtonState(eqx.Module):
    """The step to take next from `y`, the function's slope along it, and the fraction
    of it to try."""

    step: PyTree
    slope: Scalar
    fraction: Scalar
    terminate: Bool[Array, ""]


class _ConvexNewton(optx.AbstractRootFinder):
    """Newton's method for the root of the gradient of a strictly convex function.

    Each step but the last, which is small, is halved until the function's slope along
    it is not much above zero: from a negative value, it can only grow. Values of the
    function, which rounding blurs long before its gradient, are not compared.
    `solve(y, v)` is the inverse of the Hessian at `y`, times `v`.

    A step of the loop tries one fraction, so that the gradient is in the program once.
    """

    rtol: float
    atol: float
    norm: Callable[[PyTree], Scalar]
    solve: Callable[[PyTree, PyTree], PyTree]

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, f_struct, aux_struct, tags
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(y)))
        return _NewtonState(optax.tree.zeros_like(y), zero, zero, jnp.array(False))

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        tried = optax.tree.add_scale(y, state.fraction, state.step)
        gradient, aux = fn(tried, args)
        slope = optax.tree.vdot(gradient, state.step)
        is_short = (slope <= 0.9 * jnp.abs(state.slope)) | (state.fraction <= 1e-6)

        def go_on():
            step = optax.tree.scale(-1.0, self.solve(tried, gradient))
            is_last = self.norm(step) <= self.atol + self.rtol * self.norm(tried)
            y = optax.tree.add_scale(tried, jnp.where(is_last, 1.0, 0.0), step)
            new_slope = jnp.asarray(optax.tree.vdot(gradient, step))
            return y, _NewtonState(step, new_slope, jnp.ones_like(new_slope), is_last)

        def halve():
            halved = eqx.tree_at(lambda s: s.fraction, state, state.fraction / 2)
            return y, halved

        y, state = jax.lax.cond(is_short, go_on, halve)
        return y, state, aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.terminate, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}
