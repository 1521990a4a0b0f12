from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ._conversions import as_int


class Frozen(eqx.Module):
    """Holds a module whose arrays are not parameters: they are neither fitted nor
    shrunk by the ridge. Calling a `Frozen` calls its module.

    `jax.lax.stop_gradient` is no substitute, as the ridge would still shrink the
    arrays.

    **Arguments:**

    - `module`: any pytree, such as the trained layers below a new head.
    """

    module: PyTree

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@runtime_checkable
class HasPenalised(Protocol):
    """A module that leaves some of its parameters out of the ridge, such as an
    intercept. It may stand anywhere in a classifier."""

    def penalised(self) -> PyTree[bool]:
        """**Returns:**

        A pytree of bools with the structure of the module: the leaves that the ridge
        is taken over.
        """
        ...


def parameters(classifier: PyTree) -> PyTree[bool]:
    """Says which leaves of a classifier are its parameters: every floating-point array
    that is not inside an [`eqdistill.Frozen`][].

    **Arguments:**

    - `classifier`: any pytree.

    **Returns:**

    A pytree of bools with the structure of `classifier`, as `equinox.partition` takes
    it.
    """

    def of_node(node):
        is_fitted = not isinstance(node, Frozen)
        return jax.tree.map(lambda x: is_fitted and eqx.is_inexact_array(x), node)

    return jax.tree.map(of_node, classifier, is_leaf=lambda x: isinstance(x, Frozen))


def squared_norm(classifier: PyTree) -> Float[Array, ""]:
    r"""The squared norm $\|w\|^2$ of the parameters that the ridge is taken over."""

    def of_node(node):
        mask = parameters(node)
        if isinstance(node, HasPenalised):
            mask = jax.tree.map(lambda a, b: a and b, mask, node.penalised())
        leaves = jax.tree.leaves(eqx.filter(node, mask))
        return sum((jnp.sum(x**2) for x in leaves), start=0.0)

    is_node = lambda x: isinstance(x, Frozen | HasPenalised)
    nodes = jax.tree.leaves(classifier, is_leaf=is_node)
    return jnp.asarray(sum(map(of_node, nodes), start=0.0))


class LinearClassifier(eqx.Module):
    r"""A classifier that is linear in its parameters: fixed features of an image, and
    a linear head on them, $x \mapsto W \phi(x) + b$.

    The inner problem of such a classifier is convex. The features are frozen: only the
    head is fitted. The intercept $b$ is optional, and the ridge is not taken over it.

    [`eqdistill.LogisticRegression`][] is the one whose features are the pixels, and
    [`eqdistill.last_layer`][] makes one of a network.
    """

    features: Frozen
    head: eqx.nn.Linear

    def __init__(self, features: Callable, head: eqx.nn.Linear):
        """**Arguments:**

        - `features`: a map from one image, of shape `(*shape,)`, to its features, of
            shape `(p,)`. Dropout in it is turned off.
        - `head`: the linear map from `p` features to `c` outputs. Its `weight` has
            shape `(c, p)` and its `bias`, if there is one, shape `(c,)`.
        """
        features = eqx.nn.inference_mode(features)
        self.features = features if isinstance(features, Frozen) else Frozen(features)
        self.head = head

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " c"]:
        """**Arguments:**

        - `image`: one image.

        **Returns:**

        The outputs of the head, one for each class.

        **Raises:**

        A `ValueError` if the image does not have as many features as the head takes.
        """
        features = self.features(image)
        wanted = (self.head.in_features,)
        if jnp.shape(features) != wanted:
            raise ValueError(
                f"`image` must have features of shape {wanted}, as the head of this "
                f"`LinearClassifier` takes them; an image of shape {image.shape} has "
                f"features of shape {jnp.shape(features)}."
            )
        return self.head(features)

    def penalised(self) -> "LinearClassifier":
        """The ridge is not taken over the intercept."""
        everything = jax.tree.map(lambda _: True, self)
        if self.head.bias is None:
            return everything
        return eqx.tree_at(lambda c: c.head.bias, everything, False)


class Pixels(eqx.Module):
    """The features of logistic regression: the pixels of an image, in a row."""

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " p"]:
        return jnp.ravel(image)


def takes_pixels(classifier: PyTree) -> bool:
    """Whether a classifier is linear in the pixels of an image."""
    return isinstance(classifier, LinearClassifier) and isinstance(
        classifier.features.module, Pixels
    )


def LogisticRegression(
    in_features: int, num_classes: int, *, use_intercept: bool = False, dtype=None
) -> LinearClassifier:
    r"""Multiclass logistic regression, $x \mapsto W \mathrm{vec}(x) + b$: the
    [`eqdistill.LinearClassifier`][] whose features are the pixels.

    **Arguments:**

    - `in_features`: the number of pixels $p$ of one image, of any shape.
    - `num_classes`: the number of classes $c$.
    - `use_intercept`: whether to add the intercept $b$, over which the ridge is not
        taken. (Keyword only argument.)
    - `dtype`: the dtype of the parameters. Defaults to JAX's default floating dtype.
        (Keyword only argument.)

    **Returns:**

    A classifier whose parameters are zero. The inner problem is convex, so that its
    solution does not depend on where a solver starts.

    **Raises:**

    A `ValueError` if either size is not positive; a `TypeError` if `dtype` is not a
    floating dtype.
    """
    for name, value in (("in_features", in_features), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    dtype = jnp.result_type(float) if dtype is None else _floating(dtype)
    in_features, num_classes = as_int(in_features), as_int(num_classes)
    head = eqx.filter_eval_shape(
        eqx.nn.Linear,
        in_features,
        num_classes,
        use_bias=use_intercept,
        dtype=dtype,
        key=jax.random.key(0),
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), head)
    return LinearClassifier(Pixels(), zeros)


def _floating(dtype: Any) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"`dtype` must be a floating dtype; got {dtype!r}.")
    return found


def last_layer(
    network: PyTree,
    where: Callable[[PyTree], eqx.nn.Linear] = lambda network: network.layers[-1],
) -> LinearClassifier:
    """Makes a linear classifier of a network: all layers but the last are frozen, and
    the last one is the head.

    **Arguments:**

    - `network`: an `equinox.Module` whose last operation is an `equinox.nn.Linear`.
    - `where`: picks that layer. The default suits an `equinox.nn.Sequential` and an
        `equinox.nn.MLP`.

    **Returns:**

    An [`eqdistill.LinearClassifier`][] that computes what the network computes.

    **Raises:**

    A `TypeError` if `where` does not pick an `equinox.nn.Linear`.
    """
    try:
        head = where(network)
    except (AttributeError, LookupError, TypeError) as e:
        raise TypeError(
            "`where` must pick the last layer of `network`, an `equinox.nn.Linear`; of "
            f"a {type(network).__name__} it raised a {type(e).__name__}."
        ) from None
    if not isinstance(head, eqx.nn.Linear):
        raise TypeError(
            "`where` must pick the last layer of `network`, an `equinox.nn.Linear`; "
            f"got a {type(head).__name__}."
        )
    return LinearClassifier(eqx.tree_at(where, network, eqx.nn.Identity()), head)
