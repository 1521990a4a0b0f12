import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jaxtyping import Array, Float, PyTree
from threadpoolctl import threadpool_limits

from .._checks import check_positive
from .._data._dataset import Dataset
from .._sharding import to_host


def whitened(
    optimiser: optax.GradientTransformation,
    train: Dataset,
    *,
    damping: float = 0.01,
    scale: float = 2.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets an optimiser work in coordinates in which the real images are white. Images
    $\theta$ of $p$ pixels have the coordinates $\theta L / s$, where

    $$L L^\top = C + \delta \, \mathrm{tr}(C) \, I, \qquad
    C = \frac{1}{m} \sum_{i=1}^m x_i x_i^\top.$$

    For a linear model, the Hessian of the outer loss is roughly a multiple of $C$. It
    is far better conditioned in these coordinates, which cuts the number of steps of
    L-BFGS to between a quarter and a half. $C$ is estimated from at most 1,024 evenly
    spaced real images.

    !!! warning
        L-BFGS without a line search may diverge from a start at which the loss is far
        from convex. On MNIST it diverges from ten real images, but not from noise or
        class means. From real images, use `optax.lbfgs()` without `whitened`.

        A line search stores its last gradient in these coordinates, so
        `optax.value_and_grad_from_state` must not be used.

    **Arguments:**

    - `optimiser`: any Optax optimiser.
    - `train`: the real data.
    - `damping`: $\delta > 0$.
    - `scale`: $s > 0$. The first step of L-BFGS has length at most one in these
        coordinates. The default saves a step or two for ridges around 0.1. The learning
        rate of Adam is effectively multiplied by $s$, and that of gradient descent by
        $s^2$.

    **Returns:** an Optax optimiser for the `images` of a distilled set. All other
    learned arrays are only divided by $s$. Its state holds two $p \times p$ matrices.
    Its `init` raises a `ValueError` if the learned arrays include no `images` of the
    shape of `train`.

    Source: LeCun et al., *Efficient BackProp*, 1998, for the principle.
    """
    check_positive(damping=damping, scale=scale)
    optimiser = optax.with_extra_args_support(optimiser)
    first_matrices = _matrices(train, damping, scale)
    change = ft.partial(_change, train.shape)

    def init(params) -> Any:
        factor, _ = first_matrices
        return first_matrices, optimiser.init(change(params, factor, 1 / scale))

    def update(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("`whitened` needs `params` in each update.")
        # From the state, because arrays in the closure would be compiled as constants.
        (factor, inverse), inner = state
        back = lambda tree: change(tree, inverse, scale)
        of_gradient = lambda tree: change(tree, inverse.T, scale)
        if "grad" in extra_args:
            extra_args["grad"] = of_gradient(extra_args["grad"])
        if "value_fn" in extra_args:
            value_fn = extra_args["value_fn"]
            extra_args["value_fn"] = lambda params: value_fn(back(params))
        updates, params = of_gradient(updates), change(params, factor, 1 / scale)
        updates, inner = optimiser.update(updates, inner, params, **extra_args)
        return back(updates), ((factor, inverse), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _matrices(
    train: Dataset, damping: float, scale: float
) -> tuple[Float[Array, "p p"], Float[Array, "p p"]]:
    """Returns $L / s$ and its inverse."""
    some = Dataset.to_floating(train.images[:: -(-len(train) // 1024)])
    images = to_host(some).astype(jnp.result_type(float)).reshape(len(some), -1)
    # On one thread, because OpenBLAS's threads keep spinning afterwards.
    with threadpool_limits(limits=1, user_api="blas"):
        moments = images.T @ images / len(images)
        one = np.eye(len(moments), dtype=moments.dtype)
        moments += one * (damping * np.trace(moments) or 1.0)  # If all images are zero.
        factor = scipy.linalg.cholesky(moments, lower=True)
        # The factor is well conditioned, and products are faster than solves.
        inverse = scipy.linalg.solve_triangular(factor, one, lower=True)
    return jnp.asarray(factor / scale), jnp.asarray(inverse * scale)


def _change(
    shape: tuple[int, ...], tree: PyTree, matrix: Float[Array, "p p"], scale: float
) -> PyTree:
    """Multiplies the images in the tree by the matrix, and the rest by the scale.
    Images are recognised by their name, because soft labels may have the same shape."""
    as_name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    shapes = {as_name(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}
    is_images = lambda x: x.split(".")[-1] == "images" and shapes[x][1:] == shape
    images = set(filter(is_images, shapes))
    if not images:
        raise ValueError(
            f"`whitened` needs learned `images` of shape {shape}, as in `train`; got "
            f"{shapes}."
        )

    def product(path: tuple, x: Array) -> Array:
        if as_name(path) in images:
            return (x.reshape(len(x), -1) @ matrix).reshape(x.shape)
        return scale * x

    return jax.tree.map_with_path(product, tree)
