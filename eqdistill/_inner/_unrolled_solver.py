from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

from .._classifier import parameters
from .._data._augmentation import AbstractAugmentation, augment
from .._data._distilled_set import DistilledSet
from .._data._permutation import batch_at, half_bits
from .._error import error_if
from ._inner_solver import AbstractInnerSolver, Fitted, inner_loss


class UnrolledSolver(AbstractInnerSolver[None]):
    r"""Trains the classifier for a number of steps of an Optax optimiser, from the
    parameters that the classifier has:

    $$w_{t+1} = w_t - u_t\left(\nabla_w g(w_t; \theta)\right), \qquad
    w^\star(\theta) = w_T,$$

    where $g$ is [`eqdistill.inner_loss`][], with its ridge. The derivative is that of
    the steps.

    There is nothing to converge to: the fit has `converged` if its parameters are
    finite. The `gradient_norm` is that of the last step, before its update. Dropout is
    off.

    !!! Example

        ```python
        inner = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, steps=100)
        ```

    Source: Maclaurin et al., *Gradient-based hyperparameter optimization through
    reversible learning*, 2015; Wang et al., *Dataset distillation*, 2018.

    **Attributes:**

    - `make`: makes the optimiser, from hyperparameters as keyword arguments.
    - `log_hyperparameters`: the logarithms of the hyperparameters, so that they stay
        positive when they are learned.
    - `steps`: the number of steps $T$.
    - `batch_size`: the number of distilled images in a step, or `None` for all.
    - `augmentation`: how the distilled images are changed in a step, or `None`.
    """

    make: Callable[..., optax.GradientTransformation] = eqx.field(static=True)
    log_hyperparameters: dict[str, Float[Array, "..."]]
    steps: int = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)
    augmentation: AbstractAugmentation | None

    def __init__(
        self,
        make: Callable[..., optax.GradientTransformation],
        hyperparameters: dict[str, ArrayLike],
        steps: int,
        *,
        batch_size: int | None = None,
        augmentation: AbstractAugmentation | None = None,
    ):
        """**Arguments:**

        - `make`: as above. Must be a function that is made once, such as `optax.adam`:
            for a new function, the solver is compiled anew.
        - `hyperparameters`: positive numbers, or arrays of them.
        - `steps`: the number of steps, at least 1.
        - `batch_size`: the number of distilled images in a step: drawn at random
            without replacement, until there are fewer left than a batch. Defaults to
            all of them. (Keyword only argument.)
        - `augmentation`: changes each image at random, in each step anew. Defaults to
            no change. (Keyword only argument.)

        **Raises:**

        A `ValueError` for an argument out of its range.
        """
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1; got {value}.")
        self.make = make
        self.log_hyperparameters = {
            name: jnp.log(
                error_if(
                    jnp.asarray(value, jnp.result_type(float)),
                    lambda x: ~((x > 0) & (x < jnp.inf)).all(),
                    f"`hyperparameters` must be positive and finite; {name!r} is "
                    f"{value}.",
                )
            )
            for name, value in hyperparameters.items()
        }
        self.steps = steps
        self.batch_size = batch_size
        self.augmentation = augmentation

    def init(self, distilled, classifier, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `ValueError` if a batch has more images than there are, or if batches or
        augmentations are to be drawn and there is no `key`.
        """
        del classifier
        if self.batch_size is not None and self.batch_size > len(distilled):
            raise ValueError(
                f"`batch_size` must be at most {len(distilled)}, the number of "
                f"distilled images; got {self.batch_size}."
            )
        is_random = self.batch_size is not None or self.augmentation is not None
        if is_random and key is None:
            raise ValueError(
                "`key` must be given with an `UnrolledSolver` that draws batches or "
                "augmentations at random; got None."
            )
        return None

    def __call__(self, distilled: DistilledSet, classifier: PyTree, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][]."""
        classifier = eqx.nn.inference_mode(classifier)
        params, static = eqx.partition(classifier, parameters(classifier))
        optimiser = self.make(
            **{name: jnp.exp(x) for name, x in self.log_hyperparameters.items()}
        )

        def loss(params, step):
            rows = self._rows(distilled, step, key)
            return inner_loss(rows, eqx.combine(params, static))

        def body(carry, step):
            params, optimiser_state, _ = carry
            gradient = jax.grad(loss)(params, step)
            updates, optimiser_state = optimiser.update(
                gradient, optimiser_state, params
            )
            updates = optax.tree.cast_like(updates, params)
            norm = optax.tree.norm(jax.lax.stop_gradient(gradient))
            params = eqx.apply_updates(params, updates)
            return (params, optimiser_state, norm.astype(zero.dtype)), None

        zero = jnp.zeros_like(optax.tree.norm(params))
        init = (params, optimiser.init(params), zero)
        (params, _, norm), _ = jax.lax.scan(body, init, jnp.arange(self.steps))
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]
        return Fitted(
            classifier=eqx.combine(params, static),
            converged=jnp.array(finite).all(),
            gradient_norm=norm,
            stats={"steps": jnp.array(self.steps)},
        ), state

    def _rows(
        self,
        distilled: DistilledSet,
        step: Int[Array, ""],
        key: PRNGKeyArray | None,
    ) -> DistilledSet:
        """The distilled images of a step."""
        images, labels = distilled.images, distilled.labels
        if key is not None:  # There is one if any is needed, as `init` has checked.
            batch_key, augmentation_key = jr.split(key)
            if self.batch_size is not None:
                n = len(distilled)
                chosen = batch_at(step, self.batch_size, n, half_bits(n), key=batch_key)
                images, labels = images[chosen], labels[chosen]
            if self.augmentation is not None:
                own_key = jr.fold_in(augmentation_key, step)
                images = augment(self.augmentation, images, key=own_key)
        return eqx.tree_at(lambda d: (d.images, d.labels), distilled, (images, labels))
