import math

import equinox as eqx
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from .._checks import check_at_least
from .._conversions import ArrayOrList, as_array, name_value
from .._error import error_if
from .._losses import AbstractLoss, CrossEntropy
from . import _initialisers
from ._dataset import Dataset


class DistilledSet(eqx.Module):
    r"""A distilled set: synthetic images, their labels, and the inner problem that they
    are made for. It is all that is needed to retrain.

    **Attributes:**

    - `images`: the synthetic images $\theta$, in the units of the real images that the
        classifier is meant for, and of any sign.
    - `labels`: class indices in $[0, c)$; or, in floating point, the logits of soft
        labels ([`eqdistill.CrossEntropy`][]) or targets ([`eqdistill.SquaredError`][]).
    - `log_l2`: the logarithm of the ridge $\lambda$, so that it stays positive when it
        is learned.
    - `loss`: the loss of the inner problem.
    """

    images: Float[Array, "n *shape"]
    labels: Int[Array, " n"] | Float[Array, "n c"]
    log_l2: Float[Array, ""]
    loss: AbstractLoss

    def __init__(
        self,
        images: ArrayOrList,
        labels: ArrayOrList,
        *,
        l2: ArrayLike,
        loss: AbstractLoss = CrossEntropy(),
    ):
        r"""**Arguments:**

        - `images`: shape `(n, *shape)`, floating point, finite. An array, or a list.
        - `labels`: either integer class indices of shape `(n,)`, or floating-point
            labels of shape `(n, c)`, which `loss` gives a meaning.
        - `l2`: the ridge $\lambda > 0$. Logistic regression does well at 0.1. A network
            takes 1e-3 or less: a larger ridge shrinks all of its weights to zero.
            (Keyword only argument.)
        - `loss`: the loss of the inner problem. (Keyword only argument.)

        **Raises:**

        A `TypeError` for images or labels of the wrong dtype, a `ValueError` for those
        of the wrong shape, or for probabilities in the place of logits; and an error
        (at run time, if the values are traced) if the images or soft labels are not
        finite, a class index is negative, or `l2` is not positive and finite.
        """
        images = jnp.asarray(as_array("images", images))
        labels = as_array("labels", labels)
        # Before they become narrower.
        is_wide = isinstance(labels, np.ndarray) and labels.dtype.kind in "iu"
        if is_wide and labels.size and labels.max() >= 2**31:
            raise ValueError(
                "`labels` must be class indices of 31 bits; got values up to "
                f"{labels.max()}."
            )
        labels = jnp.asarray(labels)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                "`images` must be floating point, since they are to be learned; got "
                f"dtype {images.dtype}. Real images become so by "
                "`Dataset.floating`."
            )
        if images.ndim < 2 or images.size == 0:
            raise ValueError(
                "`images` must have shape (n, *shape) and hold at least one pixel; got "
                f"shape {images.shape}."
            )
        if jnp.issubdtype(labels.dtype, jnp.integer):
            wanted, ndim = "class indices of shape (n,)", 1
        elif jnp.issubdtype(labels.dtype, jnp.floating):
            wanted, ndim = "soft labels or targets of shape (n, c)", 2
        else:
            raise TypeError(
                "`labels` must be integer class indices or floating point; got "
                f"dtype {labels.dtype}."
            )
        if labels.ndim != ndim or labels.shape[0] != images.shape[0]:
            raise ValueError(
                f"`labels` of dtype {labels.dtype} must be {wanted} with "
                f"n = {images.shape[0]} as in `images`; got shape {labels.shape}."
            )
        l2 = jnp.asarray(as_array("l2", l2), images.dtype)
        if l2.shape != ():
            raise ValueError(f"`l2` must be a scalar; got shape {l2.shape}.")
        self.images = error_if(
            images,
            lambda x: ~(abs(x) < np.inf).all(),
            "`images` must be finite; some pixels are NaN or infinite.",
        )
        self.labels = error_if(
            labels,
            lambda x: ~((x >= 0) if ndim == 1 else (abs(x) < np.inf)).all(),
            "`labels` must be non-negative class indices, or finite in floating point; "
            "some are not.",
        )
        if ndim == 2 and isinstance(loss, CrossEntropy) and _are_probabilities(labels):
            raise ValueError(
                "`labels` in floating point must be logits for `CrossEntropy`; got "
                "probabilities, which are at least 0 and have a sum of 1 in each row. "
                "Take their logarithms, or class indices for one-hot rows."
            )
        self.log_l2 = jnp.log(
            error_if(
                l2,
                lambda x: ~((x > 0) & (x < np.inf)),
                f"`l2` must be positive and finite; got {name_value(l2)}.",
            )
        )
        self.loss = loss

    def decode(self) -> "DistilledSet":
        """The distilled set itself. Other parameterisations of a distilled set, which
        learn something else than its images, have a `decode` too."""
        return self

    @classmethod
    def from_noise(
        cls,
        train: Dataset,
        n: int | None = None,
        *,
        l2: ArrayLike,
        scale: float,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""Images of independent normal noise, $\theta_{ij} \sim \mathcal{N}(0, s^2)$.

        **Arguments:**

        - `train`: the dataset to distil, for the shape of its images and its classes.
        - `n`: the number of images. Their labels run through the classes in turn, so
            that `n = m * num_classes` gives `m` images per class. Defaults to one
            image per class.
        - `l2`: the ridge $\lambda > 0$, as for [`eqdistill.DistilledSet`][]. (Keyword
            only argument.)
        - `scale`: the standard deviation $s > 0$. A convex inner problem does best from
            weak noise: JAXopt's notebook takes one over the number of pixels of an
            image. A network does best from noise as strong as its data, such as 0.3.
            (Keyword only argument.)
        - `key`: a `jax.random.key` for the noise. (Keyword only argument.)

        **Returns:**

        A `DistilledSet` with hard labels.

        **Raises:**

        A `ValueError` if `n` or `scale` is not positive.

        Source: the start of JAXopt's dataset-distillation notebook.
        """
        labels = _cyclic_labels(train, n)
        if not 0 < scale < math.inf:
            raise ValueError(f"`scale` must be positive and finite; got {scale}.")
        images = scale * jr.normal(key, (labels.shape[0], *train.shape))
        return cls(images, labels, l2=l2)

    @classmethod
    def from_real(
        cls,
        train: Dataset,
        n: int | None = None,
        *,
        l2: ArrayLike,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""Random real images of each class, without repeats.

        **Arguments:**

        - `train`: the dataset to distil.
        - `n`, `l2`: as for [`eqdistill.DistilledSet.from_noise`][].
        - `key`: a `jax.random.key` for the choice. (Keyword only argument.)

        **Returns:**

        A `DistilledSet` with hard labels.

        **Raises:**

        A `ValueError` if `n` asks for more images of a class than `train` has.

        Source: the baseline of random real images in Wang et al., *Dataset
        Distillation*, 2018.
        """
        return cls._by_class(train, n, l2, _initialisers.real, key)

    @classmethod
    def from_class_means(
        cls,
        train: Dataset,
        n: int | None = None,
        *,
        l2: ArrayLike,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""The mean of each class; with several images per class, the means of random
        disjoint parts of the class, equal in size to within one image.

        **Arguments:**

        - `train`: the dataset to distil.
        - `n`, `l2`: as for [`eqdistill.DistilledSet.from_noise`][].
        - `key`: a `jax.random.key` for the parts. (Keyword only argument.)

        **Returns:**

        A `DistilledSet` with hard labels.

        **Raises:**

        A `ValueError` if `n` asks for more images of a class than `train` has.
        """
        return cls._by_class(train, n, l2, _initialisers.class_means, key)

    @classmethod
    def from_kmeans(
        cls,
        train: Dataset,
        n: int | None = None,
        *,
        l2: ArrayLike,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""The centroids of each class by k-means, from one start that is drawn by
        k-means++, of at most 30 iterations. With one image per class it is the class
        mean.

        **Arguments:**

        - `train`: the dataset to distil.
        - `n`, `l2`: as for [`eqdistill.DistilledSet.from_noise`][].
        - `key`: a `jax.random.key` for the start. (Keyword only argument.)

        **Returns:**

        A `DistilledSet` with hard labels.

        **Raises:**

        A `ValueError` if `n` asks for more images of a class than `train` has.
        An `ImportError` without scikit-learn, which is in `eqdistill[data]`.

        Source: the k-means baseline of Wang et al., *Dataset Distillation*, 2018; Lloyd
        1982.
        """
        return cls._by_class(train, n, l2, _initialisers.kmeans, key)

    @classmethod
    def from_herding(
        cls,
        train: Dataset,
        n: int | None = None,
        *,
        l2: ArrayLike,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""Real images of each class, chosen by greedy herding in pixel space: the
        next is the one that brings the mean of those chosen nearest to the class mean
        $\mu$, without repeats,

        $$x_{i} = \arg\min_x \left\| \mu - \frac{1}{i} \Big(x + \sum_{j<i} x_j\Big)
        \right\|.$$

        **Arguments:**

        - `train`: the dataset to distil.
        - `n`, `l2`: as for [`eqdistill.DistilledSet.from_noise`][].
        - `key`: not used, as there is nothing random in this. It is here so that all
            constructors are called alike. (Keyword only argument.)

        **Returns:**

        A `DistilledSet` with hard labels.

        **Raises:**

        A `ValueError` if `n` asks for more images of a class than `train` has.

        Source: Welling, *Herding dynamical weights to learn*, 2009; in this greedy
        form, Rebuffi et al., *iCaRL*, 2017, Algorithm 4.
        """
        return cls._by_class(train, n, l2, _initialisers.herding, key)

    @classmethod
    def _by_class(cls, train, n, l2, choose, key):
        labels = _cyclic_labels(train, n)
        images = _initialisers.by_class(train, labels, choose, key)
        return cls(images, labels, l2=l2)

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def nbytes(self) -> int:
        """The size of the images and the labels, in bytes."""
        return self.images.nbytes + self.labels.nbytes

    @property
    def l2(self) -> Float[Array, ""]:
        r"""The ridge $\lambda$."""
        return jnp.exp(self.log_l2)


def _are_probabilities(labels: Array) -> bool:
    """Whether labels that are not traced can be nothing else."""
    if isinstance(labels, jax.core.Tracer):
        return False
    rows = np.asarray(labels, np.float64)
    return bool((rows >= 0).all() and (abs(rows.sum(axis=1) - 1) < 1e-3).all())


def _cyclic_labels(train: Dataset, n: int | None) -> Int[np.ndarray, " n"]:
    n = train.num_classes if n is None else n
    check_at_least(1, n=n)
    return np.arange(n, dtype=np.int32) % train.num_classes
