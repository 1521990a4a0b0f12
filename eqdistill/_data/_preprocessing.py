import abc
import functools
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float
from threadpoolctl import threadpool_limits

from .._checks import check_at_least
from .._conversions import as_float
from .._sharding import to_host
from ._dataset import Dataset


class AbstractPreprocessing(eqx.Module):
    """An invertible map of one image, fitted to real images.
    [`eqdistill.Dataset.map`][] applies it to all images of a dataset."""

    @abc.abstractmethod
    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Maps one image in the units of [`eqdistill.Dataset.floating`][]."""

    @abc.abstractmethod
    def inverse(self, image: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Maps one preprocessed image back to the units of the real images."""


class Standardisation(AbstractPreprocessing):
    r"""Gives each channel of an image, or each column of a table, mean zero and
    standard deviation one,

    $$z_c = (x_c - \mu_c) / \sigma_c.$$

    **Attributes:** `mean` and `deviation`: $\mu$ and $\sigma$, of the same shape.

    - For images of shape `(channels, height, width)`, this is `(channels, 1, 1)`.
    - For the rows of a table, of shape `(columns,)`, this is `(columns,)`. A flattened
        image is such a row. To scale all its pixels alike, standardise it before it is
        flattened.
    - Anything else has one channel, so all axes have size 1.
    """

    mean: Float[Array, "*ones"]
    deviation: Float[Array, "*ones"]

    @classmethod
    def fit(cls, train: Dataset) -> "Standardisation":
        """Returns the standardisation with the mean and the standard deviation of the
        images of `train`. A constant channel or column becomes zero: its `deviation` is
        set to one. Raises a `ValueError` if all channels or columns are constant."""
        all_axes = tuple(range(train.images.ndim))
        axes = {1: (0,), 3: (0, 2, 3)}.get(len(train.shape), all_axes)
        mean_over = lambda x: np.mean(x, axis=axes, dtype=np.float64, keepdims=True)
        mean = _mean_of_chunks(train, mean_over)[0]
        variance = _mean_of_chunks(train, lambda x: mean_over((x - mean) ** 2))[0]
        # Channels that are constant up to rounding have a tiny variance.
        dtype = Dataset.to_floating(train.images[:1]).dtype
        varies = variance > (jnp.finfo(dtype).eps * mean) ** 2
        if not varies.any():
            raise ValueError(
                "`train` must have a channel or a column that varies; all are constant."
            )
        deviation = np.where(varies, variance, 1) ** 0.5
        return cls(jnp.asarray(mean, float), jnp.asarray(deviation, float))

    def __call__(self, image):
        self._check(image)
        return (image - self.mean) / self.deviation

    def inverse(self, image):
        self._check(image)
        return self.mean + self.deviation * image

    def _check(self, image: Float[Array, "*shape"]) -> None:
        shape, ones = image.shape, self.mean.shape
        if len(shape) != len(ones) or (len(shape) in (1, 3) and shape[0] != ones[0]):
            raise ValueError(
                "`image` must have the channels or columns of the real images, "
                f"{ones}; got shape {shape}."
            )


class ZCA(AbstractPreprocessing):
    r"""Regularised whitening with a symmetric matrix, which changes the image as little
    as possible,

    $$z = W (x - \mu), \qquad W = U \Big(\Lambda + \rho \frac{\mathrm{tr}\, \Lambda}{p}
    I\Big)^{-1/2} U^\top,$$

    with the mean $\mu$ and the covariance $U \Lambda U^\top$ of the $p$ pixels and
    channels.

    **Attributes:** `mean`, $\mu$, in the shape of an image; `whitening`, the matrix
    $W$, shape `(p, p)`; and `regularisation`, $\rho$.

    Source: Coates and Ng, *Learning Feature Representations with K-means*, 2012. The
    regularisation relative to the mean eigenvalue is from Nguyen et al., *Dataset
    Distillation with Infinitely Wide Convolutional Networks*, 2021. They first divide
    each image by its norm, which is not invertible.
    """

    mean: Float[Array, "*shape"]
    whitening: Float[Array, "p p"]
    regularisation: float = eqx.field(static=True, converter=as_float)

    @classmethod
    def fit(cls, train: Dataset, *, regularisation: float = 0.1) -> "ZCA":
        r"""Returns the whitening fitted to the covariance of the images of `train`, in
        $O(N p^2 + p^3)$ operations. The `regularisation` $\rho \ge 0$ must be positive
        if the covariance is singular."""
        check_at_least(0, regularisation=regularisation)
        mean = _mean_of_chunks(train, lambda x: np.mean(x, axis=0, dtype=np.float64))

        def covariance_of(x: np.ndarray) -> np.ndarray:
            rows = (x - mean).reshape(len(x), -1).astype(x.dtype)
            return np.asarray(_product(rows.T, rows)) / len(rows)

        covariance = _mean_of_chunks(train, covariance_of)
        # One thread: several are slower, and keep spinning afterwards.
        with threadpool_limits(limits=1, user_api="blas"):
            eigenvalues, vectors = scipy.linalg.eigh(covariance, driver="evd")
            eigenvalues += regularisation * np.mean(eigenvalues)
            rounding = 10 * np.finfo(jnp.result_type(float)).eps
            if not eigenvalues[0] > rounding * eigenvalues[-1]:
                raise ValueError(
                    "`regularisation` must be larger, because the covariance of "
                    f"`train` is singular; got {regularisation}."
                )
            whitening = (vectors / np.sqrt(eigenvalues)) @ vectors.T
        return cls(
            jnp.asarray(mean, float), jnp.asarray(whitening, float), regularisation
        )

    def __call__(self, image):
        if image.shape != self.mean.shape:
            raise ValueError(
                f"`image` must have the shape of the real images, {self.mean.shape}; "
                f"got {image.shape}."
            )
        whitened = _product(self.whitening, (image - self.mean).ravel())
        return whitened.reshape(image.shape)

    def inverse(self, image):
        # Solve, so that only one matrix of p x p is stored.
        centred = jax.scipy.linalg.solve(self.whitening, image.ravel(), assume_a="pos")
        return self.mean + centred.reshape(image.shape)


# By default, some accelerators round factors to 10 bits.
_product = functools.partial(jnp.matmul, precision="highest")


def _mean_of_chunks(train: Dataset, mean: Callable) -> np.ndarray:
    """The mean over all images, in double precision, from the means of chunks."""
    total = 0
    # A chunk holds a few thousand small images, or fewer large ones, as doubles.
    size = max(1, 2**26 // (8 * math.prod(train.shape)))
    for first in range(0, len(train), size):
        chunk = to_host(Dataset.to_floating(train.images[first : first + size]))
        total = total + len(chunk) * mean(chunk)
    return np.asarray(total / len(train))
