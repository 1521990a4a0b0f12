import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.sparse.linalg
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._classifier import takes_pixels
from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from .._data._parameterisation import AbstractParameterisation
from .._inner._argmin_solver import ArgminSolver
from .._inner._auto_solver import AutoSolver
from .._inner._fit import fit
from .._inner._inner_solver import AbstractInnerSolver, Fitted
from .._inner._unrolled_solver import UnrolledSolver
from .._losses import CrossEntropy, DefaultOuterLoss
from .._models._models import AbstractModels
from .._softmax import label_residual, softmax_change
from .._typechecking import describe
from ._data import example_loss, FullBatch


class HypergradientError(eqx.Module):
    """How accurate a hypergradient is.

    **Attributes:**

    - `norm`: the Euclidean norm of the hypergradient, over all float arrays of `start`.
    - `error`: its Euclidean distance to the hypergradient of the reference.
    - `bound`: a bound on its Euclidean distance to the exact hypergradient; infinite if
        none is known.
    - `inner_residual`: the `gradient_norm` of the [`eqdistill.Fitted`][].
    """

    norm: float
    error: float
    bound: float
    inner_residual: float


def hypergradient_error(
    start: AbstractParameterisation,
    model: PyTree,
    data: Dataset,
    inner: AbstractInnerSolver = AutoSolver(),
    *,
    reference: AbstractInnerSolver | None = None,
    key: PRNGKeyArray | None = None,
) -> HypergradientError:
    """Measures how accurate a hypergradient is: by its distance to a reference in
    double precision, and by an a posteriori bound where one is known. The outer loss is
    the default of [`eqdistill.Bilevel`][].

    A bound is known for [`eqdistill.linear.LogisticRegression`][] without an intercept,
    with cross-entropy. It is pessimistic, because it divides by the ridge twice: at
    small ridges it may exceed the hypergradient itself.

    **Arguments:**

    - `start`, `model`, `inner`: as for [`eqdistill.Bilevel`][], but `model` must not be
        a source of models, which would draw different models in double precision.
    - `data`: the real data.
    - `reference`: how to fit the model for the reference. Defaults to `inner`, without
        its `window` if it is an [`eqdistill.UnrolledSolver`][], and with the default
        adjoint if it is an [`eqdistill.ArgminSolver`][]. The default tolerances of
        solvers are tighter in double precision.
    - `key`: as for [`eqdistill.fit`][].

    **Raises:** a `ValueError` if the fit of the reference does not converge.

    Source: Blondel et al., *Efficient and modular implicit differentiation*, 2022,
    Theorem 1, and Pedregosa, *Hyperparameter optimization with approximate gradient*,
    2016, Theorem 1, for the bound; its
    [proof](../explanation/hypergradients.md#how-wrong-a-hypergradient-can-be).
    """
    if isinstance(model, AbstractModels):
        raise TypeError(f"`model` must be one model; got {describe(model)}.")
    key = jr.key(0) if key is None else key
    gradient, fitted = _hypergradient(start, model, FullBatch(data), inner, key)
    with jax.enable_x64(True):
        reference = _exact(inner) if reference is None else reference
        start, model, gradient, at, reference = map(
            _to_double, (start, model, gradient, fitted.model, reference)
        )
        real = data.map(_to_double)
        wanted, found = _hypergradient(start, model, FullBatch(real), reference, key)
        if not found.converged:
            norm = f"a gradient of norm {found.gradient_norm:.2g}"
            raise ValueError(f"`reference` must fit the model; it left {norm}.")
        bound, is_linear = jnp.inf, takes_pixels(model) and model.head.bias is None
        is_linear &= data.weights is None and not data.has_targets
        if is_linear and isinstance(start, DistilledSet) and _is_plain(start):
            bound = _bound(start, at.head.weight.T, real, gradient)
        error = optax.tree.norm(optax.tree.sub(gradient, wanted))
        values = optax.tree.norm(gradient), error, bound, fitted.gradient_norm
        return HypergradientError(*map(float, values))


def _is_plain(start: DistilledSet) -> bool:
    return isinstance(start.loss, CrossEntropy) and start.log_weights is None


@eqx.filter_jit
def _hypergradient(start, model, data, inner, key) -> tuple[PyTree, Fitted]:
    def loss(start):
        distilled = start.decode()
        fitted = fit(distilled, model, inner, key=key, throw=False)
        network = eqx.nn.inference_mode(fitted.model)
        outer_loss = DefaultOuterLoss(distilled.loss)
        value = data.mean(example_loss, (outer_loss, network), jnp.array(0), key=key)
        return value, fitted

    return eqx.filter_grad(loss, has_aux=True)(start)


def _exact(inner: AbstractInnerSolver) -> AbstractInnerSolver:
    """The solver without the options that approximate its derivative."""
    if isinstance(inner, UnrolledSolver):
        return eqx.tree_at(lambda s: s.window, inner, None, is_leaf=lambda x: x is None)
    if isinstance(inner, ArgminSolver):
        return dataclasses.replace(inner, adjoint=ArgminSolver().adjoint)
    return inner


def _to_double(tree: PyTree) -> PyTree:
    to_double = lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x
    return jax.tree.map(to_double, tree)


@eqx.filter_jit
def _bound(
    distilled: DistilledSet,
    w: Float[Array, "p c"],
    data: Dataset,
    hypergradient: PyTree,
) -> Float[Array, ""]:
    r"""A bound on the distance of `hypergradient` from the exact one. The weights `w`
    are near the solution of the inner problem. The letters are those of the proof in
    `docs/explanation/hypergradients.md`: $a$, $q$, $u$, $v$, $\delta$, $\epsilon$ and
    $m$."""
    n, l2 = len(distilled), distilled.l2
    images = distilled.images.reshape(n, -1)
    real = data.images.reshape(len(data), -1)
    logits = images @ w

    def hessian(u):
        return images.T @ softmax_change(logits, images @ u) / n + l2 * u

    loss = CrossEntropy()
    v = jax.grad(lambda w: loss(real @ w, data.labels))(w)
    u, _ = jax.scipy.sparse.linalg.cg(hessian, v, tol=1e-12, maxiter=1000)
    a, q = label_residual(logits, distilled.labels), images @ u
    change = softmax_change(logits, q)
    # The hypergradient by the adjoint. The bound adds its distance to the given one.
    follows = {
        "images": ((a @ u.T - change @ w.T) / n).reshape(distilled.images.shape),
        "log_l2": -l2 * jnp.sum(u * w),
    }
    if distilled.labels.ndim == 2:
        follows["labels"] = softmax_change(distilled.labels, q) / n
    given = {name: getattr(hypergradient, name) for name in follows}
    norms, a_norms, q_norms = (jnp.linalg.norm(x, axis=1) for x in (images, a, q))
    spread = jnp.ptp(q, axis=1)
    u_norm, w_norm = jnp.linalg.norm(u), jnp.linalg.norm(w)
    delta = jnp.linalg.norm(l2 * w - images.T @ a / n) / l2
    m = jnp.mean(jnp.sum(real**2, axis=1))
    residual = jnp.linalg.norm(hessian(u) - v)
    epsilon = (delta / 2 * (m + jnp.mean(norms**2 * spread)) + residual) / l2
    of_images = (
        epsilon * (a_norms + norms * delta / 2)
        + u_norm * norms * delta / 2
        + delta * (q_norms + epsilon * norms) / 2
        + w_norm * norms * (epsilon + spread * delta) / 2
    ) / n
    moves = {
        "images": jnp.linalg.norm(of_images),
        "log_l2": l2 * (epsilon * (w_norm + delta) + u_norm * delta),
        "labels": epsilon * jnp.linalg.norm(norms) / (2 * n),
    }
    norm = lambda name: optax.tree.norm(given[name] - follows[name]) + moves[name]
    return optax.tree.norm([norm(name) for name in follows])
