from collections.abc import Sequence

import equinox as eqx
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from .._checks import check_positive, error_if
from .._conversions import ArrayOrList, as_array, Labels
from .._losses import AbstractLoss, CrossEntropy, SquaredError
from .._sharding import replicate
from .._typechecking import describe
from . import _initialisers
from ._dataset import Dataset
from ._parameterisation import AbstractParameterisation


class DistilledSet(AbstractParameterisation):
    r"""Synthetic images with their labels, the ridge and the loss: everything that is
    needed to train a model on them.

    **Attributes:** `images`, `labels` and `loss` as below, and `log_l2`: the logarithm
    of the ridge $\lambda$, which keeps a learned ridge positive.
    """

    images: Float[Array, "n *shape"]
    labels: Labels
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

        - `images`: the synthetic images $\theta$, an array or a list of shape
            `(n, *shape)`, floating point, finite, in the units of the real images.
        - `labels`: class indices in $[0, c)$ of shape `(n,)`; or, in floating point and
            of shape `(n, c)`, what the loss takes: the logits of soft labels
            ([`eqdistill.CrossEntropy`][]), but not their probabilities; targets
            ([`eqdistill.SquaredError`][]); or the probability of each class
            ([`eqdistill.BinaryCrossEntropy`][]).
        - `l2`: the ridge $\lambda > 0$. Logistic regression works well at 0.1. Networks
            need 1e-3 or less, as a larger ridge shrinks all of their weights to zero.
        - `loss`: the loss that models are trained with.

        Traced values are not refused, but bad ones in floating point become NaN.
        """
        images = jnp.asarray(as_array("images", images))
        labels = as_array("labels", labels)
        # Checked before JAX narrows them to 32 bits.
        is_wide = isinstance(labels, np.ndarray) and labels.dtype.kind in "iu"
        if is_wide and labels.size and labels.max() >= 2**31:
            raise ValueError(f"`labels` must be below 2^31; got up to {labels.max()}.")
        labels = jnp.asarray(labels)
        is_floating = jnp.issubdtype(images.dtype, jnp.floating)
        if not is_floating or images.ndim < 2 or images.size == 0:
            raise ValueError(
                "`images` must be floating point, of shape (n, *shape), with at least "
                f"one pixel; got {describe(images)}. `Dataset.floating` converts real "
                "images."
            )
        n, is_hard = len(images), jnp.issubdtype(labels.dtype, jnp.integer)
        is_known = is_hard or jnp.issubdtype(labels.dtype, jnp.floating)
        if not is_known or labels.ndim != 2 - is_hard or len(labels) != n:
            raise ValueError(
                f"`labels` must be integer class indices of shape ({n},), or soft "
                f"labels or targets in floating point, of shape ({n}, c); got "
                f"{describe(labels)}."
            )
        ridge = jnp.asarray(as_array("l2", l2), images.dtype)
        if ridge.shape != ():
            raise ValueError(f"`l2` must be a scalar; got shape {ridge.shape}.")
        message = "`images` must be finite; some pixels are NaN or infinite."
        self.images = error_if(images, lambda x: ~(abs(x) < np.inf).all(), message)
        self.labels = error_if(
            labels,
            lambda x: ~((x >= 0) if is_hard else (abs(x) < np.inf)).all(),
            "`labels` must be non-negative class indices, or finite in floating point; "
            "some are not.",
        )
        if not isinstance(labels, jax.core.Tracer):
            loss.check_labels(np.asarray(labels))
        message = f"`l2` must be positive and finite; got {l2}."
        ridge = error_if(ridge, lambda x: ~((x > 0) & (x < np.inf)), message)
        self.log_l2 = jnp.log(ridge)
        self.loss = loss

    def decode(self) -> "DistilledSet":
        """Returns the distilled set itself."""
        return self

    def with_targets(self, num_classes: int) -> "DistilledSet":
        r"""Replaces class indices $y$ by learnable targets $e_y - 1/c$, of shape
        `(n, c)`, of [`eqdistill.SquaredError`][].

        **Arguments:** `num_classes`: $c$, larger than every class index.
        """
        if self.labels.ndim != 1:
            raise ValueError(
                "`with_targets` needs class indices as labels; got labels of shape "
                f"{self.labels.shape} in floating point."
            )
        message = f"`num_classes` must be larger than every label; got {num_classes}."
        labels = error_if(self.labels, lambda x: (x >= num_classes).any(), message)
        loss = SquaredError()
        targets = loss.targets(labels, num_classes).astype(self.images.dtype)
        return eqx.tree_at(lambda d: (d.labels, d.loss), self, (targets, loss))

    @classmethod
    def from_noise(
        cls,
        train: Dataset,
        n: int | Sequence[int] | None = None,
        *,
        l2: ArrayLike,
        scale: float,
        loss: AbstractLoss | None = None,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""Images of independent normal noise, $\theta_{ij} \sim \mathcal{N}(0, s^2)$.

        **Arguments:**

        - `train`: the dataset to distil, for the shape of its images and its classes.
            If it has targets, those of random examples are taken.
        - `n`: the number of images. Labels cycle through the class indices, so that
            `n = m * num_classes` gives `m` images per class. Or a list of the number of
            images of each class. Defaults to one per class; with targets, there is no
            default.
        - `l2`: the ridge $\lambda > 0$, as in [`eqdistill.DistilledSet`][].
        - `scale`: the standard deviation $s > 0$. Linear models work best from weak
            noise: JAXopt's notebook takes one over the number of pixels of an image.
            Networks need noise as strong as the data, such as 0.3.
        - `loss`: the loss that models are trained with. Defaults to
            [`eqdistill.CrossEntropy`][], and with targets to
            [`eqdistill.SquaredError`][].

        Raises a `ValueError` if `train` has no image of a class that has a label.

        Source: the start of JAXopt's dataset-distillation notebook.
        """
        check_positive(scale=scale)
        if train.has_targets:
            n = _initialisers.number_of_rows(train, n)
            rows = jr.choice(jr.fold_in(key, 1), len(train), (n,), replace=False)
            labels = train.labels[rows]
        else:
            labels = _initialisers.class_labels(train, n)
        images = scale * jr.normal(key, (len(labels), *train.shape))
        return cls._of(train, images, labels, l2, loss)

    @classmethod
    def from_real(
        cls,
        train: Dataset,
        n: int | Sequence[int] | None = None,
        *,
        l2: ArrayLike,
        loss: AbstractLoss | None = None,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""Random real images of each class, without repeats. Arguments and result are
        as for [`eqdistill.DistilledSet.from_noise`][]. Raises a `ValueError` if `train`
        has too few images of a class. Images with targets are treated as one class, and
        each image has its own target.

        Source: the baseline of random real images in Wang et al., *Dataset
        Distillation*, 2018.
        """
        return cls._by_class(train, n, l2, loss, _initialisers.real, key)

    @classmethod
    def from_class_means(
        cls,
        train: Dataset,
        n: int | Sequence[int] | None = None,
        *,
        l2: ArrayLike,
        loss: AbstractLoss | None = None,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""As [`eqdistill.DistilledSet.from_real`][], with the mean of each class; or
        with several images per class, the means of random disjoint parts of the class,
        equal in size to within one image."""
        return cls._by_class(train, n, l2, loss, _initialisers.class_means, key)

    @classmethod
    def from_kmeans(
        cls,
        train: Dataset,
        n: int | Sequence[int] | None = None,
        *,
        l2: ArrayLike,
        loss: AbstractLoss | None = None,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""As [`eqdistill.DistilledSet.from_real`][], with the centroids of each class
        by k-means, from one start by k-means++ and with at most 30 iterations. A single
        image per class is the class mean. With targets, the columns of both are
        clustered together. Columns of larger scale weigh more: standardise tables,
        and targets, first. Needs `eqdistill[data]`.

        Source: the k-means baseline of Wang et al., *Dataset Distillation*, 2018; Lloyd
        1982.
        """
        return cls._by_class(train, n, l2, loss, _initialisers.kmeans, key)

    @classmethod
    def from_herding(
        cls,
        train: Dataset,
        n: int | Sequence[int] | None = None,
        *,
        l2: ArrayLike,
        loss: AbstractLoss | None = None,
        key: PRNGKeyArray,
    ) -> "DistilledSet":
        r"""As [`eqdistill.DistilledSet.from_real`][], with images chosen by greedy
        herding in pixel space: each image brings the mean of the chosen images as close
        as possible to the class mean $\mu$, without repeats,

        $$x_{i} = \arg\min_x \left\| \mu - \frac{1}{i} \Big(x + \sum_{j<i} x_j\Big)
        \right\|.$$

        The choice is deterministic, so `key` has no effect.

        Source: Welling, *Herding dynamical weights to learn*, 2009; in this greedy
        form, Rebuffi et al., *iCaRL*, 2017, Algorithm 4.
        """
        return cls._by_class(train, n, l2, loss, _initialisers.herding, key)

    @classmethod
    def _by_class(cls, train, n, l2, loss, choose, key):
        images, labels = _initialisers.choose_images(train, n, choose, key)
        return cls._of(train, images, labels, l2, loss)

    @classmethod
    def _of(cls, train, images, labels, l2, loss):
        if loss is None:
            loss = SquaredError() if train.has_targets else CrossEntropy()
        return replicate(cls(images, labels, l2=l2, loss=loss), train.sharding)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nbytes(self) -> int:
        """The size of the images and the labels, in bytes."""
        return self.images.nbytes + self.labels.nbytes

    @property
    def l2(self) -> Float[Array, ""]:
        r"""The ridge $\lambda$."""
        return jnp.exp(self.log_l2)
