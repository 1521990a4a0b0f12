import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import scipy.linalg
import scipy.special
from jaxtyping import Array, Float, PyTree

from .._classifier import takes_pixels
from .._conversions import Labels
from .._data._distilled_set import DistilledSet
from .._inner._fit import check_fit
from .._losses import CrossEntropy
from .._softmax import label_residual
from .._typechecking import describe


def distill_exactly(
    start: DistilledSet, model: PyTree, *, l2: float | None = None
) -> DistilledSet:
    r"""Constructs a distilled set from which training recovers a given linear model,
    with weights $W$ and intercept $b$. This needs no real data and no outer loop.

    The inner problem is convex, so $W$ and $b$ are its solution if and only if

    $$\theta^\top A = n \lambda W, \qquad 1^\top A = 0, \qquad
    A = T - \mathrm{softmax}(\theta W + 1 b^\top),$$

    where $T$ are the probabilities of the labels. Without an intercept, the second
    equation is dropped. The Levenberg-Marquardt method solves these equations, in
    double precision, for the component of the images in the span of $W$. The orthogonal
    component is that of `start`, minus the part that would change $\theta^\top A$.
    The more images there are, the closer they stay to `start`.

    **Arguments:**

    - `start`: provides the labels, and the images outside the span of $W$. Must have
        the loss [`eqdistill.CrossEntropy`][]. Class indices are kept. The logits of
        soft labels are solved for together with the images.
    - `model`: the [`eqdistill.linear.LogisticRegression`][] to recover, up to a
        constant: fitted weights have mean zero over the classes.
    - `l2`: the ridge $\lambda$. Defaults to the largest of $\bar\lambda / 2,
        \bar\lambda / 4, \dots, \bar\lambda / 256$ that has a solution, because a larger
        ridge makes the fit better conditioned.

    **Returns:** the [`eqdistill.DistilledSet`][], in the dtype of `start`. In double
    precision, the relative error of the recovered weights is below a millionth. In
    single precision, it is dominated by rounding of the images.

    **Raises:** a `TypeError` for another model or loss, or a `ValueError`:

    - if `start` has weights;
    - if there are fewer images than $\mathrm{rank}(W)$, which is usually $c - 1$, or
        fewer than $\mathrm{rank}(W) + 1$ with an intercept;
    - with an intercept and class indices, if a class has no image;
    - if the ridge is above $\bar\lambda = W_0((c - 1) / e) / \|W\|^2$, where $W_0$ is
        Lambert's function: no images and labels solve the equations;
    - or if no solution was found.

    Source: [exact distillation](../explanation/exact-distillation.md) has the proofs.
    For ridge regression instead of the softmax, Chen et al., *Provable and Efficient
    Dataset Distillation for Kernel Ridge Regression*, 2024.
    """
    if not takes_pixels(model):
        raise TypeError(f"`model` must be `LogisticRegression`; got {describe(model)}.")
    if not isinstance(start.loss, CrossEntropy):
        got = describe(start.loss)
        raise TypeError(f"`start` must have the loss `CrossEntropy`; got {got}.")
    if start.log_weights is not None:
        raise ValueError("`start` must have no weights.")
    check_fit(start, model)
    # In single precision, rounding errors would be multiplied by the condition number
    # of the fit.
    with jax.enable_x64(True):
        target = _Target.of(model.head)
        hard, has_intercept = start.labels.ndim == 1, target.intercept is not None
        least = len(target.singular_values) + has_intercept
        if len(start) < least:
            more = " plus one for its intercept" if has_intercept else ""
            raise ValueError(
                f"`start` must have at least {least} images, the rank of the weights "
                f"of `model`{more}; got {len(start)}."
            )
        missing = np.setdiff1d(np.arange(target.contrasts.shape[1]), start.labels)
        if has_intercept and hard and len(missing) > 0:
            raise ValueError(
                "`start` must have an image of every class, or soft labels, because "
                f"`model` has an intercept; got no image of class {missing[0]}."
            )
        if l2 is not None and not 0 < l2 <= target.max_l2:
            raise ValueError(
                f"`l2` must be positive and at most {target.max_l2:.4g}, the largest "
                f"ridge with which `model` can be recovered; got {l2:.4g}."
            )
        pixels = jnp.asarray(start.images, float).reshape(len(start), -1)
        labels = start.labels if hard else start.labels.astype(float)
        ridges = [target.max_l2 / 2**i for i in range(1, 9)] if l2 is None else [l2]
        ridge = error = np.inf
        for ridge in ridges:
            images, found, error = _solve(target, pixels, labels, jnp.asarray(ridge))
            if error < 1e-9:
                break
        else:
            advice = "more images" if l2 is None else "a smaller `l2`"
            advice += " or soft labels" if hard else ""
            raise ValueError(
                "No images were found from which training recovers `model`. The last "
                f"attempt, at l2 = {ridge:.2g}, has a relative residual of "
                f"{error:.1g} instead of 1e-9. Try {advice}."
            )
        images = np.asarray(images, start.images.dtype).reshape(start.images.shape)
        found = np.asarray(found, start.labels.dtype)
    return DistilledSet(images, found, l2=ridge, class_names=start.class_names)


class _Target(eqx.Module):
    r"""A model with centred weights $W = Q S H_{:r}$ of rank $r$: an orthonormal
    `basis` $Q$, the singular values $S$, and the contrasts $H$ between classes, of
    which the first $r$ span the rows of $W$."""

    basis: Float[Array, "p r"]
    singular_values: Float[Array, " r"]
    contrasts: Float[Array, "k c"]
    intercept: Float[Array, " c"] | None

    @staticmethod
    def of(head: eqx.nn.Linear) -> "_Target":
        weights = np.asarray(head.weight, np.float64).T
        bias = np.zeros(1) if head.bias is None else np.asarray(head.bias, np.float64)
        if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
            raise ValueError("`model` must have finite weights and intercept.")
        contrasts = scipy.linalg.helmert(weights.shape[1])
        q, s, gt = np.linalg.svd(weights @ contrasts.T)
        rounding = 8 * float(jnp.finfo(head.weight.dtype).eps)
        rank = int(np.sum(s > rounding * np.linalg.norm(weights)))
        if rank == 0:
            raise ValueError("`model` must have weights that differ between classes.")
        intercept = None if head.bias is None else jnp.asarray(bias - bias.mean())
        arrays = q[:, :rank], s[:rank], gt @ contrasts
        basis, values, contrasts = map(jnp.asarray, arrays)
        return _Target(basis, values, contrasts, intercept)

    @property
    def max_l2(self) -> float:
        num_classes = self.contrasts.shape[1]
        margin = scipy.special.lambertw((num_classes - 1) / np.e).real
        return float(margin / np.sum(np.square(self.singular_values)))

    def start(self, labels: Labels) -> Float[Array, "n r"]:
        """The coordinates of images for which the model predicts the frequencies of the
        labels, so that the equation of the intercept holds."""
        r, num_classes = len(self.singular_values), self.contrasts.shape[1]
        if self.intercept is None:
            return jnp.zeros((len(labels), r))
        hard = labels.ndim == 1
        each = jax.nn.one_hot(labels, num_classes) if hard else jax.nn.softmax(labels)
        logits = jnp.log(jnp.mean(each, axis=0)) - self.intercept
        coordinates = logits @ self.contrasts[:r].T / self.singular_values
        return jnp.tile(coordinates, (len(labels), 1))

    def logits(self, coordinates: Float[Array, "n r"]) -> Float[Array, "n c"]:
        s = self.singular_values
        logits = (coordinates * s) @ self.contrasts[: len(s)]
        return logits if self.intercept is None else logits + self.intercept


@eqx.filter_jit
def _solve(
    target: _Target, images: Float[Array, "n p"], labels: Labels, l2: Float[Array, ""]
) -> tuple[Float[Array, "n p"], Labels, Float[Array, ""]]:
    """Returns the images, the labels, and the largest relative residual."""
    s = target.singular_values
    scale = len(images) * l2
    wanted = jnp.pad(jnp.diag(s), ((0, 0), (0, len(target.contrasts) - len(s))))

    def residuals(unknowns):
        coordinates, logits = unknowns
        soft_or_hard = labels if logits is None else logits
        return label_residual(target.logits(coordinates), soft_or_hard)

    def equations(unknowns, _):
        a = residuals(unknowns)
        weights = unknowns[0].T @ a @ target.contrasts.T / scale - wanted
        # Relative to the smallest singular value, so that all of them are recovered.
        return weights / s[-1], None if target.intercept is None else jnp.sum(a, 0)

    linear_solver = lx.LSMR(rtol=1e-13, atol=1e-13, conlim=1e12)
    solver = optx.LevenbergMarquardt(1e-10, 1e-24, linear_solver=linear_solver)
    first = target.start(labels), None if labels.ndim == 1 else labels
    solution = optx.least_squares(equations, solver, first, max_steps=100, throw=False)
    coordinates, logits = solution.value
    error = optax.tree.norm(equations(solution.value, None), ord=jnp.inf)

    # Outside the span of W, the images must not contribute to the weights. This makes
    # them orthogonal to the residuals.
    outside = images - images @ target.basis @ target.basis.T
    left, sizes, _ = jnp.linalg.svd(residuals(solution.value), full_matrices=False)
    left = jnp.where(sizes > 1e-10 * sizes[0], left, 0)
    outside = outside - left @ (left.T @ outside)
    images = coordinates @ target.basis.T + outside
    return images, labels if logits is None else logits, error
