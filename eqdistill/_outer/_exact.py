import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import scipy.linalg
import scipy.special
from jaxtyping import Array, Float, Int, PyTree

from .._classifier import takes_pixels
from .._data._distilled_set import DistilledSet
from .._inner._fit import check_fit
from .._losses import CrossEntropy
from .._softmax import label_residual


def distill_exactly(
    start: DistilledSet,
    model: PyTree,
    *,
    l2: float | None = None,
) -> DistilledSet:
    r"""Finds a distilled set whose inner problem has a given linear model as its
    solution: a fit to the set from scratch has the weights $W$ and the intercept $b$ of
    that model. It needs no real data and no outer loop.

    The inner problem is convex. $W$ and $b$ are therefore its solution if and only if

    $$\theta^\top A = n \lambda W, \qquad 1^\top A = 0, \qquad
    A = T - \mathrm{softmax}(\theta W + 1 b^\top),$$

    with the probabilities $T$ of the labels, and without the second equation if there
    is no intercept. The part of the images in the span of $W$ is found from these
    equations by the Levenberg-Marquardt method in double precision. The rest is that of
    `start`, less what would change $\theta^\top A$. The more images there are, the
    more do they resemble those of `start`.

    !!! Example

        ```python
        start = eqd.DistilledSet.from_real(train, l2=0.1, key=jr.key(0))
        exact = eqd.distill_exactly(start, model)
        eqd.fit(exact, model).model  # has the weights of `model`
        ```

    **Arguments:**

    - `start`: gives the part of the images outside the span of $W$, and the labels.
        Class indices are kept. The logits of soft labels change together with the
        images.
    - `model`: the model that the fit is to equal: an
        [`eqdistill.LogisticRegression`][]. Only differences between classes have an
        effect: the weights of the fit have a mean of zero over the classes.
    - `l2`: the ridge $\lambda$. Defaults to the largest of $\bar\lambda / 2,
        \bar\lambda / 4, \dots, \bar\lambda / 256$ with which a solution is found: the
        larger the ridge, the better conditioned is the fit. (Keyword only argument.)

    **Returns:**

    The [`eqdistill.DistilledSet`][], in the dtype of `start`. In double precision the
    weights of the fit to it are off by less than a millionth of their norm; in single
    precision, by what the rounding of the images makes of it.

    **Raises:**

    A `TypeError` if the model is not an [`eqdistill.LogisticRegression`][], or the
    loss is not [`eqdistill.CrossEntropy`][]. A `ValueError` that says why if there is
    no solution:

    - if there are fewer images than $\mathrm{rank}(W)$ (with `c` classes mostly $c -
        1$), or than $\mathrm{rank}(W) + 1$ with an intercept;
    - with an intercept, if a class has no image among hard labels;
    - if the ridge is above $\bar\lambda = W_0((c - 1) / e) / \|W\|^2$, with Lambert's
        function $W_0$, at which there are no such images, whatever their labels;
    - or if none was found.

    Source: `docs/mathematics.md`, which has the proofs. For ridge regression in place
    of the softmax, Chen et al., *Provable and Efficient Dataset Distillation for Kernel
    Ridge Regression*, 2024.
    """
    if not takes_pixels(model):
        raise TypeError(
            "`model` must be a `LogisticRegression`, which is linear in the "
            f"pixels; got a {type(model).__name__}."
        )
    if not isinstance(start.loss, CrossEntropy):
        raise TypeError(
            "`start` must have `CrossEntropy` as its loss; got "
            f"`{type(start.loss).__name__}`."
        )
    check_fit(start, model)
    # Double precision whatever the caller's: in single, the fit would be off by its
    # condition number times a rounding error of every step here.
    with jax.enable_x64(True):
        target = _Target.of(model.head)
        _check_solvable(start, target)
        if l2 is not None and not 0 < l2 <= target.max_l2:
            raise ValueError(
                f"`l2` must be positive and at most {target.max_l2:.4g}, above which "
                "no images and labels have the weights of `model` as their fit; "
                f"got {l2:.4g}."
            )
        pixels = jnp.asarray(start.images, float).reshape(len(start), -1)
        hard = start.labels.ndim == 1
        labels = start.labels if hard else start.labels.astype(float)
        ridge = target.max_l2 / 2 if l2 is None else l2
        smallest = target.max_l2 / 256 if l2 is None else l2
        while True:
            images, found, error = _solve(target, pixels, labels, jnp.asarray(ridge))
            if error < 1e-9 or ridge <= smallest:
                break
            ridge /= 2
        if not error < 1e-9:
            advice = "a smaller `l2`" if l2 is not None else "more images"
            if hard:
                advice += " or soft labels"
            raise ValueError(
                "No images were found, starting from `start`, that have `model` "
                f"as their fit. The last ones tried, at l2 = {ridge:.2g}, leave a "
                f"relative residual of {error:.1g} in the equations; 1e-9 is wanted. "
                f"Try {advice}."
            )
        images, found = np.asarray(images), np.asarray(found)
    dtype = start.images.dtype
    images = images.reshape(start.images.shape).astype(dtype)
    return DistilledSet(images, found if hard else found.astype(dtype), l2=ridge)


class _Target(eqx.Module):
    r"""A model with the centred weights $W = Q S H_{:r}$, of rank $r$: an
    orthonormal `basis` $Q$, the singular values $S$, and all contrasts $H$ between
    classes, of which the first $r$ span the rows of $W$."""

    basis: Float[Array, "p r"]
    singular_values: Float[Array, " r"]
    contrasts: Float[Array, "k c"]
    intercept: Float[Array, " c"] | None

    @staticmethod
    def of(head: eqx.nn.Linear) -> "_Target":
        weights = np.asarray(head.weight, np.float64).T
        intercept = head.bias
        if intercept is not None:
            intercept = np.asarray(intercept, np.float64)
            intercept = jnp.asarray(intercept - intercept.mean())
        if not (
            np.isfinite(weights).all()
            and (intercept is None or jnp.isfinite(intercept).all())
        ):
            raise ValueError(
                "`model` must have finite weights and intercept; some are NaN or "
                "infinite."
            )
        contrasts = scipy.linalg.helmert(weights.shape[1])
        q, s, gt = np.linalg.svd(weights @ contrasts.T)
        rounding = 8 * float(jnp.finfo(head.weight.dtype).eps)
        rank = int(np.sum(s > rounding * np.linalg.norm(weights)))
        if rank == 0:
            raise ValueError(
                "`model` must have weights that differ between classes; all of "
                "them are equal."
            )
        return _Target(
            jnp.asarray(q[:, :rank]),
            jnp.asarray(s[:rank]),
            jnp.asarray(gt @ contrasts),
            intercept,
        )

    @property
    def max_l2(self) -> float:
        num_classes = self.contrasts.shape[1]
        margin = scipy.special.lambertw((num_classes - 1) / np.e).real
        return float(margin / np.sum(np.square(self.singular_values)))

    def coordinates(self, images: Float[Array, "n p"]) -> Float[Array, "n r"]:
        return images @ self.basis

    def start(
        self, labels: Int[Array, " n"] | Float[Array, "n c"]
    ) -> Float[Array, "n r"]:
        """The coordinates of images to which the model gives the frequencies of
        the labels: there the equation of the intercept holds."""
        r = len(self.singular_values)
        if self.intercept is None:
            return jnp.zeros((len(labels), r))
        num_classes = self.contrasts.shape[1]
        hard = labels.ndim == 1
        each = jax.nn.one_hot(labels, num_classes) if hard else jax.nn.softmax(labels)
        logits = jnp.log(jnp.mean(each, axis=0)) - self.intercept
        coordinates = logits @ self.contrasts[:r].T / self.singular_values
        return jnp.tile(coordinates, (len(labels), 1))

    def logits(self, coordinates: Float[Array, "n r"]) -> Float[Array, "n c"]:
        s = self.singular_values
        logits = (coordinates * s) @ self.contrasts[: len(s)]
        return logits if self.intercept is None else logits + self.intercept


def _check_solvable(start: DistilledSet, target: _Target) -> None:
    rank = len(target.singular_values)
    has_intercept = target.intercept is not None
    if len(start) < rank + has_intercept:
        rank_of = f"the weights of `model` have rank {rank} over the classes"
        if has_intercept:
            rank_of += ", and its intercept takes one image more"
        raise ValueError(
            f"`start` must have at least {rank + has_intercept} images, since "
            f"{rank_of}; got {len(start)}."
        )
    num_classes = target.contrasts.shape[1]
    if has_intercept and start.labels.ndim == 1:
        missing = np.setdiff1d(np.arange(num_classes), start.labels)
        if len(missing) > 0:
            raise ValueError(
                "`start` must have an image of every class, or soft labels, since "
                "`model` has an intercept: fitted to no image of class "
                f"{missing[0]}, its logit would fall without end."
            )


@eqx.filter_jit
def _solve(
    target: _Target,
    images: Float[Array, "n p"],
    labels: Int[Array, " n"] | Float[Array, "n c"],
    l2: Float[Array, ""],
) -> tuple[
    Float[Array, "n p"], Int[Array, " n"] | Float[Array, "n c"], Float[Array, ""]
]:
    """The images and labels, and the largest relative residual of the equations."""
    s = target.singular_values
    num_contrasts = len(target.contrasts)
    scale = len(images) * l2
    wanted = jnp.zeros((len(s), num_contrasts)).at[:, : len(s)].set(jnp.diag(s))

    def residuals(unknowns):
        coordinates, logits = unknowns
        soft_or_hard = labels if logits is None else logits
        return label_residual(target.logits(coordinates), soft_or_hard)

    def equations(unknowns, _):
        a = residuals(unknowns)
        weights = unknowns[0].T @ a @ target.contrasts.T / scale - wanted
        # Relative to the least singular value: the fit is to be right in every one.
        return weights / s[-1], None if target.intercept is None else jnp.sum(a, 0)

    solution = optx.least_squares(
        equations,
        optx.LevenbergMarquardt(
            rtol=1e-10,
            atol=1e-24,
            linear_solver=lx.LSMR(rtol=1e-13, atol=1e-13, conlim=1e12),
        ),
        (target.start(labels), None if labels.ndim == 1 else labels),
        max_steps=100,
        throw=False,
    )
    coordinates, logits = solution.value
    error = optax.tree.norm(equations(solution.value, None), ord=jnp.inf)

    # Outside the span of W, the images must not add to the weights: they are made
    # orthogonal to the residuals.
    outside = images - target.coordinates(images) @ target.basis.T
    left, sizes, _ = jnp.linalg.svd(residuals(solution.value), full_matrices=False)
    left = jnp.where(sizes > 1e-10 * sizes[0], left, 0)
    outside = outside - left @ (left.T @ outside)
    images = coordinates @ target.basis.T + outside
    return images, labels if logits is None else logits, error
