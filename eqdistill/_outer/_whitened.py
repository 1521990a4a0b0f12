from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jaxtyping import Array, Float, PyTree
from threadpoolctl import threadpool_limits

from .._conversions import as_float
from .._data._dataset import Dataset


def whitened(
    optimiser: optax.GradientTransformation,
    train: Dataset,
    *,
    damping: float = 0.01,
    scale: float = 2.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets an optimiser work in coordinates in which the real images are white: for
    images $\theta$ of $p$ pixels, in $\theta L / s$ with

    $$L L^\top = C + \delta \, \mathrm{tr}(C) \, I, \qquad
    C = \frac{1}{m} \sum_{i=1}^m x_i x_i^\top.$$

    For a linear model, the Hessian of the outer loss acts on pixels nearly as a
    multiple of $C$ does. In these coordinates it is far better conditioned, and L-BFGS
    takes a half to a quarter of the steps. $C$ is taken over at most 1,024 of the real
    images, evenly spaced in their order.

    !!! warning

        L-BFGS without a line search may diverge from a start at which the loss is not
        nearly convex. It diverges from ten real images of MNIST, and not from noise or
        the means of classes. Use `optax.lbfgs()` without `whitened` from real images.

    !!! Example

        ```python
        optimiser = optax.lbfgs(learning_rate=1.0, linesearch=None)
        eqd.distill(start, model, train, optimiser=eqd.whitened(optimiser, train))
        ```

    **Arguments:**

    - `optimiser`: any Optax optimiser.
    - `train`: the real data.
    - `damping`: $\delta > 0$. (Keyword only argument.)
    - `scale`: $s > 0$. The first step of L-BFGS has a length of at most one in the
        coordinates, and of at most $s$ in the images. The default saves a step or two
        for ridges around 0.1. Steps of Adam are $s$ times as long as its learning rate
        says, and steps of gradient descent $s^2$ times. (Keyword only argument.)

    **Returns:**

    An Optax optimiser for the `images` of a distilled set, and for all else that is
    learned with them, which is only divided by $s$. It holds two matrices of
    $p \times p$.

    **Raises:**

    A `ValueError` if `damping` or `scale` is not positive, or if what is to be trained
    has no `images` of the shape of `train`.

    Source: LeCun et al., *Efficient BackProp*, 1998, for the principle.
    """
    for name, value in (("damping", damping), ("scale", scale)):
        if not value > 0:
            raise ValueError(f"`{name}` must be positive; got {value}.")
    optimiser = optax.with_extra_args_support(optimiser)
    coordinates = _Coordinates.of_data(train, damping, scale)

    def init(params) -> Any:
        return _State(coordinates, optimiser.init(coordinates.of(params)))

    def update(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("`whitened` must be given `params` with each update.")
        # From the state: those of the closure would be constants of the program.
        coordinates = state.coordinates
        if "grad" in extra_args:
            extra_args["grad"] = coordinates.of_gradient(extra_args["grad"])
        if "value_fn" in extra_args:
            value_fn = extra_args["value_fn"]
            extra_args["value_fn"] = lambda params: value_fn(coordinates.back(params))
        updates, inner = optimiser.update(
            coordinates.of_gradient(updates),
            state.inner,
            coordinates.of(params),
            **extra_args,
        )
        return coordinates.back(updates), _State(coordinates, inner)

    return optax.GradientTransformationExtraArgs(init, update)


class _Coordinates(eqx.Module):
    """Images times `factor`, all else divided by `scale`."""

    factor: Float[Array, "p p"]
    inverse: Float[Array, "p p"]
    scale: float = eqx.field(static=True, converter=as_float)
    shape: tuple[int, ...] = eqx.field(static=True)

    @staticmethod
    def of_data(train: Dataset, damping: float, scale: float) -> "_Coordinates":
        # On the host, where nothing is compiled; and on one thread, since those of
        # OpenBLAS go on spinning after it has returned.
        some = np.asarray(train.images)[:: -(-len(train) // 1024)]
        dtype = jnp.result_type(float)
        images = some.reshape(len(some), -1).astype(dtype)
        if some.dtype == np.uint8:
            images /= 255
        with threadpool_limits(limits=1, user_api="blas"):
            moments = images.T @ images / len(images)
            # Images that are zero throughout leave the coordinates as they are.
            diagonal = damping * np.trace(moments) or 1.0
            moments[np.diag_indices_from(moments)] += diagonal
            factor = scipy.linalg.cholesky(moments, lower=True)
            # Well conditioned by the damping: products with it are quicker than solves.
            (invert,) = scipy.linalg.get_lapack_funcs(["trtri"], [factor])
            inverse, _ = invert(factor, lower=True)
        factor, inverse = jax.device_put((factor / scale, inverse * scale))
        return _Coordinates(factor, inverse, scale, train.shape)

    def of(self, params: PyTree) -> PyTree:
        return self._multiply(params, self.factor, 1 / self.scale)

    def back(self, params: PyTree) -> PyTree:
        return self._multiply(params, self.inverse, self.scale)

    def of_gradient(self, gradient: PyTree) -> PyTree:
        return self._multiply(gradient, self.inverse.T, self.scale)

    def _multiply(
        self, tree: PyTree, matrix: Float[Array, "p p"], scale: float
    ) -> PyTree:
        """The images in the tree times the matrix, and all else times the scale.

        Images are what is called so, and not what has their shape: soft labels may
        have it too.
        """

        def is_images(path: tuple, x: Array) -> bool:
            name = jax.tree_util.keystr(path[-1:], simple=True)
            return name == "images" and x.shape[1:] == self.shape

        def product(path: tuple, x: Array) -> Array:
            if is_images(path, x):
                return (x.reshape(len(x), -1) @ matrix).reshape(x.shape)
            return scale * x

        found, _ = jax.tree.flatten_with_path(tree)
        if not any(is_images(*leaf) for leaf in found):
            shapes = {jax.tree_util.keystr(path): x.shape for path, x in found}
            raise ValueError(
                f"`whitened` must be given `images` of shape {self.shape}, as in "
                f"`train`, to train; got {shapes}."
            )
        return jax.tree.map_with_path(product, tree)


class _State(NamedTuple):
    coordinates: _Coordinates
    inner: optax.OptState
