from collections.abc import Sequence

import equinox as eqx
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from .._checks import check_positive, error_if
from .._conversions import ArrayOrList, as_array, as_weights, Labels
from .._losses import AbstractLoss, CrossEntropy, SquaredError
from .._sharding import replicate, to_host
from .._typechecking import describe
from . import _initialisers
from ._class_names import check_class_names, check_same_classes, count_classes
from ._dataset import Dataset
from ._parameterisation import AbstractParameterisation


class DistilledSet(AbstractParameterisation):
    r"""Synthetic images with their labels, the ridge and the loss: everything that is
    needed to train a model on them.

    **Attributes:** `images`, `labels`, `loss` and `class_names` as below, and `log_l2`
    and `log_weights`: the logarithms of the ridge $\lambda$ and of the weights. Storing
    logarithms keeps both positive when they are learned. `log_weights` is `None` if all
    examples count equally.
    """

    images: Float[Array, "n *shape"]
    labels: Labels
    log_l2: Float[Array, ""]
    log_weights: Float[Array, " n"] | None
    loss: AbstractLoss
    class_names: tuple[str, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        images: ArrayOrList,
        labels: ArrayOrList,
        *,
        l2: ArrayLike,
        loss: AbstractLoss = CrossEntropy(),
        weights: ArrayOrList | None = None,
        class_names: list[str] | tuple[str, ...] | None = None,
    ):
        r"""**Arguments:**

        - `images`: the synthetic images $\theta$, an array or a list of shape
            `(n, *shape)`, floating point, finite, in the units of the real images.
        - `labels`: class indices in $[0, c)$ of shape `(n,)`; or a floating-point
            array of shape `(n, c)` that suits the loss: the logits of soft labels, not
            their probabilities ([`eqdistill.CrossEntropy`][]); targets
            ([`eqdistill.SquaredError`][]); or the probability of each class
            ([`eqdistill.BinaryCrossEntropy`][]).
        - `l2`: the ridge $\lambda > 0$. Logistic regression works well at 0.1. Networks
            need 1e-3 or less, as a larger ridge shrinks all of their weights to zero.
        - `loss`: the loss that models are trained with.
        - `weights`: how much each example counts in the loss, positive numbers of shape
            `(n,)`: an example of weight 2 counts as much as two of weight 1. The
            weights are divided by their mean. By default, all examples count equally.
        - `class_names`: the name of each class or column of the labels, all different,
            or `None` if they have no names. Real data with other names, or with the
            same names in a different order, raise an error.

        Traced values raise no error; invalid floating-point ones become NaN.
        """
        images = jnp.asarray(as_array("images", images))
        labels = as_array("labels", labels)
        # Check before JAX narrows them to 32 bits.
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
        self.log_weights = None
        if weights is not None:
            self.log_weights = jnp.log(as_weights(weights, n)).astype(images.dtype)
        message = f"`l2` must be positive and finite; got {l2}."
        ridge = error_if(ridge, lambda x: ~((x > 0) & (x < np.inf)), message)
        self.log_l2 = jnp.log(ridge)
        self.loss = loss
        num_classes = count_classes(labels, class_names)
        self.class_names = check_class_names(class_names, num_classes)

    def decode(self) -> "DistilledSet":
        """Returns the distilled set itself."""
        return self

    def with_targets(self, num_classes: int) -> "DistilledSet":
        r"""Replaces class indices $y$ with learnable targets $e_y - 1/c$ of shape
        `(n, c)`, for [`eqdistill.SquaredError`][].

        **Arguments:** `num_classes`: $c$, larger than every class index.
        """
        if self.labels.ndim != 1:
            raise ValueError(
                "`with_targets` needs class indices as labels; got labels of shape "
                f"{self.labels.shape} in floating point."
            )
        message = f"`num_classes` must be larger than every label; got {num_classes}."
        labels = error_if(self.labels, lambda x: (x >= num_classes).any(), message)
        check_class_names(self.class_names, num_classes)
        loss = SquaredError()
        targets = loss.targets(labels, num_classes).astype(self.images.dtype)
        return eqx.tree_at(lambda d: (d.labels, d.loss), self, (targets, loss))

    @classmethod
    def concatenate(
        cls,
        sets: Sequence["DistilledSet | Dataset"],
        *,
        weights: Sequence[float] | None = None,
        num_classes: int | None = None,
        l2: ArrayLike | None = None,
    ) -> "DistilledSet":
        r"""The union of distilled sets and real data, in the order given.

        !!! Example
            ```python
            # Each old distilled image counts as much as 130 of the new real ones.
            union = eqd.DistilledSet.concatenate([old, new], weights=[130, 1])
            ```

        **Arguments:**

        - `sets`: one or more distilled sets, and any number of real datasets, with
            images of the same shape and in the same units. All distilled sets must have
            the same loss.

        All other arguments are keyword only.

        - `weights`: a positive number for each of the `sets`, which multiplies the
            weights of its examples. Defaults to one.
        - `num_classes`: the number of classes of the union, if some of the sets have
            soft labels or targets with fewer columns. The classes of each set are the
            first of these. Its examples belong to none of the classes that the set
            lacks.
        - `l2`: the ridge. Defaults to that of the first distilled set.

        If some labels are soft labels or targets, class indices are converted by
        `loss.targets`, for example to the logits of a probability of one.

        The class names are those of the set with the most names. The names of every
        other set must be the first of these.

        **Raises:** a `ValueError` if the sets do not fit together.
        """
        sets = list(sets)
        distilled = [x for x in sets if isinstance(x, DistilledSet)]
        if not distilled:
            raise ValueError("`sets` must have at least one `DistilledSet`; got none.")
        factors = [1.0] * len(sets) if weights is None else list(weights)
        if len(factors) != len(sets):
            raise ValueError(
                f"`weights` must be a number for each of the {len(sets)} `sets`; got "
                f"{len(factors)}."
            )
        check_positive(**{f"weights[{i}]": x for i, x in enumerate(factors)})
        shapes, loss = {x.images.shape[1:] for x in sets}, distilled[0].loss
        if len(shapes) > 1:
            raise ValueError(f"`sets` must have equal image shapes; got {shapes}.")
        if not all(eqx.tree_equal(x.loss, loss) for x in distilled):
            raise ValueError("`sets` must have the same loss; got different ones.")
        columns = {x.labels.shape[1] for x in sets if x.labels.ndim == 2}
        if num_classes is None and len(columns) > 1:
            raise ValueError(
                "`num_classes` must be given, because the sets have labels with "
                f"{sorted(columns)} columns."
            )
        most = max(sets, key=lambda x: len(x.class_names or ()))
        for i, x in enumerate(sets):
            if x.class_names != (most.class_names or ())[: len(x.class_names or ())]:
                check_same_classes("a set", most, f"`sets[{i}]`", x)
        labels = [x.labels for x in sets]
        for x in labels:
            if not isinstance(x, jax.core.Tracer):
                loss.check_labels(to_host(x))
        if columns:
            c = max(columns) if num_classes is None else num_classes
            message = f"`num_classes` must be larger than every label; got {c}."
            is_bad = lambda y: (y >= c).any() & (y.ndim == 1)
            labels = [loss.targets(error_if(y, is_bad, message), c) for y in labels]
        images = [x.floating() if isinstance(x, Dataset) else x.images for x in sets]
        union = None
        if weights is not None or any(x.weights is not None for x in sets):
            ones = lambda x: jnp.ones(len(x)) if x.weights is None else x.weights
            pairs = zip(factors, sets, strict=True)
            union = jnp.concatenate([factor * ones(x) for factor, x in pairs])
        return cls(
            jnp.concatenate([x.astype(distilled[0].images.dtype) for x in images]),
            jnp.concatenate(labels),
            l2=distilled[0].l2 if l2 is None else l2,
            loss=loss,
            weights=union,
            class_names=most.class_names,
        )

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

        - `train`: the dataset to distil, which provides the image shape and the
            classes. If it has targets, the targets of random examples are used.
        - `n`: the number of images. Labels cycle through the class indices, so that
            `n = m * num_classes` gives `m` images per class. Or a list of the number of
            images of each class. Defaults to one per class; with targets, there is no
            default.
        - `l2`: the ridge $\lambda > 0$, as in [`eqdistill.DistilledSet`][].
        - `scale`: the standard deviation $s > 0$. Linear models work best from weak
            noise: JAXopt's notebook uses one over the number of pixels of an image.
            Networks need noise as strong as the data, such as 0.3.
        - `loss`: the loss that models are trained with. Defaults to
            [`eqdistill.CrossEntropy`][], and with targets to
            [`eqdistill.SquaredError`][].

        Raises a `ValueError` if a class among the labels has no image in `train`.

        Source: the initialisation in JAXopt's dataset-distillation notebook.
        """
        check_positive(scale=scale)
        if train.has_targets:
            n = _initialisers.number_of_rows(train, n)
            rows = jr.choice(jr.fold_in(key, 1), len(train), (n,), replace=False)
            labels = to_host(train.labels)[np.asarray(rows)]
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
        each image keeps its own target.

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
        r"""Like [`eqdistill.DistilledSet.from_real`][], but with the mean of each
        class. With several images per class, the images are the means of random
        disjoint parts of the class, equal in size to within one image."""
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
        r"""Like [`eqdistill.DistilledSet.from_real`][], but with the k-means centroids
        of each class, from one k-means++ initialisation and at most 30 iterations. With
        one image per class, this is the class mean. With targets, each image is
        clustered together with its targets. Columns of larger scale weigh more, so
        standardise tabular data and targets first. Needs `eqdistill[data]`.

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
        r"""Like [`eqdistill.DistilledSet.from_real`][], but with images chosen by
        greedy herding in pixel space: each image brings the mean of the chosen images
        as close as possible to the class mean $\mu$, without repeats,

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
        names = train.class_names
        made = cls(images, labels, l2=l2, loss=loss, class_names=names)
        return replicate(made, train.sharding)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nbytes(self) -> int:
        """The size of the images and the labels, in bytes."""
        return self.images.nbytes + self.labels.nbytes

    @property
    def weights(self) -> Float[Array, " n"] | None:
        """The weight of each image, or `None` if all are one."""
        return None if self.log_weights is None else jnp.exp(self.log_weights)

    def weigh(self, rows: Float[Array, "n *rest"]) -> Float[Array, "n *rest"]:
        """Multiplies a row for each image by the square root of its weight, so that a
        sum of squares over rows is weighted."""
        if self.log_weights is None:
            return rows
        roots = jnp.exp(self.log_weights / 2).astype(rows.dtype)
        return jnp.expand_dims(roots, range(1, rows.ndim)) * rows

    @property
    def l2(self) -> Float[Array, ""]:
        r"""The ridge $\lambda$."""
        return jnp.exp(self.log_l2)
