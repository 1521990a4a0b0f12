from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._conversions import as_int
from ._typechecking import describe


class Frozen(eqx.Module):
    """Holds a module, or any other pytree, whose arrays are not parameters: they are
    neither fitted nor shrunk by the ridge. Calling a `Frozen` calls its module.

    `jax.lax.stop_gradient` is not a substitute, because the ridge would still shrink
    the arrays.
    """

    module: PyTree

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@runtime_checkable
class HasPenalised(Protocol):
    """A module that excludes some of its parameters from the ridge, such as an
    intercept. It may be any part of a model."""

    def penalised(self) -> PyTree[bool]:
        """Returns a pytree of bools with the structure of the module: true for the
        leaves that the ridge applies to."""
        ...


def parameters(model: PyTree) -> PyTree[bool]:
    """Selects the parameters of a model: every floating-point array that is not inside
    an [`eqdistill.nn.Frozen`][]. Returns a pytree of bools with the structure of
    `model`, as `equinox.partition` expects."""

    def of_node(node):
        is_fitted = not isinstance(node, Frozen)
        return jax.tree.map(lambda x: is_fitted and eqx.is_inexact_array(x), node)

    return jax.tree.map(of_node, model, is_leaf=lambda x: isinstance(x, Frozen))


def squared_norm(model: PyTree) -> Float[Array, ""]:
    r"""The squared norm $\|w\|^2$ of the parameters that the ridge applies to."""

    def of_node(node):
        mask = parameters(node)
        if isinstance(node, HasPenalised):
            mask = jax.tree.map(lambda a, b: a and b, mask, node.penalised())
        leaves = jax.tree.leaves(eqx.filter(node, mask))
        return sum((jnp.sum(x**2) for x in leaves), start=0.0)

    is_node = lambda x: isinstance(x, Frozen | HasPenalised)
    nodes = jax.tree.leaves(model, is_leaf=is_node)
    return jnp.asarray(sum(map(of_node, nodes), start=0.0))


class LinearClassifier(eqx.Module):
    r"""A model that is linear in its parameters: fixed features of an image, and a
    linear head on them, $x \mapsto W \phi(x) + b$.

    The inner problem of such a model is convex. The features are frozen: only the head
    is fitted. The ridge does not apply to the intercept $b$, which is optional.
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
        """Returns the outputs of the head for one image."""
        features = self.features(image)
        wanted, found = (self.head.in_features,), jnp.shape(features)
        if found != wanted:
            raise ValueError(
                f"`image` must have features of shape {wanted} for the head; got an "
                f"image of shape {image.shape}, with features of shape {found}."
            )
        return self.head(features)

    def penalised(self) -> "LinearClassifier":
        """Excludes the intercept from the ridge."""
        everything = jax.tree.map(lambda _: True, self)
        if self.head.bias is None:
            return everything
        return eqx.tree_at(lambda c: c.head.bias, everything, False)


class Pixels(eqx.Module):
    """The features of logistic regression: the pixels of an image, as a vector."""

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " p"]:
        return jnp.ravel(image)


def takes_pixels(model: PyTree) -> bool:
    """Returns whether a model is linear in the pixels of an image."""
    is_linear = isinstance(model, LinearClassifier)
    return is_linear and isinstance(model.features.module, Pixels)


def LogisticRegression(
    in_features: int, num_classes: int, *, use_intercept: bool = False, dtype=None
) -> LinearClassifier:
    r"""Multiclass logistic regression, $x \mapsto W \mathrm{vec}(x) + b$: an
    [`eqdistill.linear.LinearClassifier`][] whose features are the pixels.

    **Arguments:**

    - `in_features`: the number of pixels $p$ of one image, of any shape.
    - `num_classes`: the number of classes $c$.
    - `use_intercept`: whether to add the intercept $b$. The ridge does not apply to it.
    - `dtype`: the dtype of the parameters. Defaults to JAX's default floating dtype.

    **Returns:** a model whose parameters are zero. The inner problem is convex, so its
    solution does not depend on where a solver starts.
    """
    for name, value in (("in_features", in_features), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be a floating dtype; got {dtype}.")
    sizes = as_int(in_features), as_int(num_classes)
    linear, key = eqx.nn.Linear, jax.random.key(0)
    head = eqx.filter_eval_shape(linear, *sizes, use_intercept, dtype, key=key)
    return LinearClassifier(Pixels(), jax.tree.map(jnp.zeros_like, head))


def last_layer(
    network: PyTree, where: Callable[[PyTree], eqx.nn.Linear] | None = None
) -> LinearClassifier:
    """Turns a network into a linear model: all layers but the last are frozen, and the
    last one is the head.

    **Arguments:**

    - `network`: an `equinox.Module` whose last operation is an `equinox.nn.Linear`: no
        activation or softmax follows it.
    - `where`: selects that layer, as in `equinox.tree_at`. Defaults to the last
        `equinox.nn.Linear` of the network, in the order of its fields, that is not
        inside an [`eqdistill.nn.Frozen`][].

    **Returns:** an [`eqdistill.linear.LinearClassifier`][] with the same outputs.
    """
    select = _last_linear if where is None else where
    try:
        head = select(network)
    except (AttributeError, LookupError, TypeError):
        head = None
    if not isinstance(head, eqx.nn.Linear):
        wanted = "`network` must end with" if where is None else "`where` must select"
        got = describe(network if where is None else head)
        hint = " To select another layer, pass `where`." if where is None else ""
        raise TypeError(f"{wanted} an `equinox.nn.Linear`; got {got}.{hint}")
    return LinearClassifier(eqx.tree_at(select, network, eqx.nn.Identity()), head)


def _last_linear(network: PyTree) -> eqx.nn.Linear:
    is_node = lambda x: isinstance(x, Frozen | eqx.nn.Linear)
    nodes = jax.tree.leaves(network, is_leaf=is_node)
    return [x for x in nodes if isinstance(x, eqx.nn.Linear)][-1]
