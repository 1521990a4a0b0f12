from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_at_least
from .._classifier import parameters
from .._conversions import ArrayOrList, as_array, as_int, as_int_or_none, name_value
from .._data._augmentation import AbstractAugmentation, augment
from .._data._distilled_set import DistilledSet
from .._data._permutation import batch_at, half_bits
from .._error import error_if
from ._inner_solver import AbstractInnerSolver, Fitted, inner_loss, stop_gradient
from ._unrolled_adjoint import AbstractUnrolledAdjoint, DirectAdjoint
from ._window import AbstractWindow


class UnrolledSolver(AbstractInnerSolver[None]):
    r"""Trains the model for a number of steps of an Optax optimiser, from the
    parameters that the model has:

    $$w_{t+1} = w_t - u_t\left(\nabla_w g(w_t; \theta)\right), \qquad
    w^\star(\theta) = w_T,$$

    where $g$ is [`eqdistill.inner_loss`][], with its ridge. The derivative is that of
    the steps. For initial parameters that are drawn anew in each outer step, put it
    into an [`eqdistill.RandomInitialisation`][].

    There is nothing to converge to: the fit has `converged` if its parameters are
    finite. The `gradient_norm` is that of the last step, before its update.

    A model with `equinox.nn.Dropout` is called with a `key` in each step, and
    is in inference mode thereafter.

    !!! Example

        ```python
        inner = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, steps=100)
        ```

        Learned step sizes, one for each step, from images in turn:

        ```python
        def make(learning_rate):
            return optax.sgd(lambda step: learning_rate[step])


        inner = eqd.UnrolledSolver(
            make,
            {"learning_rate": jnp.full(30, 0.02)},
            steps=30,
            batch_size=10,
            shuffle=False,
        )
        result = eqd.distill(start, model, train, inner=inner, learn=True)
        ```

    !!! warning

        Adam divides by the root of its second moment, which has no derivative at zero,
        and the gradient of a parameter may be zero. A derivative of such a run is
        refused. `functools.partial(optax.adam, eps_root=1e-8)` has a derivative.

    Source: Maclaurin et al., *Gradient-based hyperparameter optimization through
    reversible learning*, 2015; Wang et al., *Dataset distillation*, 2018.

    **Attributes:**

    - `make`: makes the optimiser, from hyperparameters as keyword arguments.
    - `log_hyperparameters`: the logarithms of the hyperparameters, so that they stay
        positive when they are learned.
    - `steps`: the number of steps $T$.
    - `batch_size`: the number of distilled images in a step, or `None` for all.
    - `shuffle`: whether batches are drawn at random, or follow each other.
    - `augmentation`: how the distilled images are changed in a step, or `None`.
    - `window`: which steps are differentiated, or `None` for all.
    - `adjoint`: how they are differentiated.
    """

    make: Callable[..., optax.GradientTransformation] = eqx.field(static=True)
    log_hyperparameters: dict[str, Float[Array, "..."]]
    steps: int = eqx.field(static=True, converter=as_int)
    batch_size: int | None = eqx.field(static=True, converter=as_int_or_none)
    shuffle: bool = eqx.field(static=True)
    augmentation: AbstractAugmentation | None
    window: AbstractWindow | None
    adjoint: AbstractUnrolledAdjoint

    def __init__(
        self,
        make: Callable[..., optax.GradientTransformation],
        hyperparameters: Mapping[str, ArrayOrList],
        steps: int,
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        augmentation: AbstractAugmentation | None = None,
        window: AbstractWindow | None = None,
        adjoint: AbstractUnrolledAdjoint = DirectAdjoint(),
    ):
        """**Arguments:**

        - `make`: as above. Must be a function that is made once, such as `optax.adam`:
            for a new function, the solver is compiled anew.
        - `hyperparameters`: positive numbers, or arrays of them, such as one for each
            step.
        - `steps`: the number of steps, at least 1.

        All other arguments are keyword only.

        - `batch_size`: the number of distilled images in a step. Defaults to all of
            them.
        - `shuffle`: whether a batch is drawn at random without replacement, until there
            are fewer images left than a batch; or the next images in their order, and
            the first ones after the last.
        - `augmentation`: changes each image at random, in each step anew. Defaults to
            no change.
        - `window`: which steps are differentiated, such as the last ones,
            [`eqdistill.LastSteps`][], or those of an [`eqdistill.RandomWindow`][]. The
            run ends with the window. Defaults to all steps.
        - `adjoint`: how they are differentiated: an [`eqdistill.DirectAdjoint`][], or
            an [`eqdistill.RecursiveCheckpointAdjoint`][] for runs that are too long for
            the memory, or an [`eqdistill.ForwardAdjoint`][].

        **Raises:**

        A `ValueError` for an argument out of its range.
        """
        check_at_least(1, steps=steps, batch_size=batch_size)
        if window is not None and not 1 <= window.size <= steps:
            raise ValueError(
                f"`window` must have from 1 to {steps} steps, as many as the run has; "
                f"got {window.size}."
            )
        self.make = make
        self.log_hyperparameters = {
            name: log_positive(f"hyperparameters[{name!r}]", value)
            for name, value in hyperparameters.items()
        }
        self.steps = steps
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.window = window
        self.adjoint = adjoint

    def init(self, distilled, model, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `ValueError` if a batch has more images than there are; or if batches,
        augmentations, dropout or windows are to be drawn and there is no `key`.
        """
        if self.batch_size is not None and self.batch_size > len(distilled):
            raise ValueError(
                f"`batch_size` must be at most {len(distilled)}, the number of "
                f"distilled images; got {self.batch_size}."
            )
        draws = {
            "batches": self.batch_size is not None and self.shuffle,
            "augmentations": self.augmentation is not None,
            "dropout": has_dropout(model),
        }
        drawn = [name for name, is_drawn in draws.items() if is_drawn]
        if drawn and key is None:
            raise ValueError(
                f"`key` must be given with an `UnrolledSolver` that draws "
                f"{' and '.join(drawn)} at random; got None."
            )
        return None

    def __call__(self, distilled: DistilledSet, model: PyTree, state, *, key):
        """As [`eqdistill.AbstractInnerSolver`][].

        **Raises:**

        A `ValueError` when it is differentiated, if the optimiser has no derivative
        where a gradient is zero; and as the `window` and the `adjoint`.
        """
        params, static = eqx.partition(model, parameters(model))
        window_key, *keys = [None] * 4 if key is None else jr.split(key, 4)
        args = (distilled, self.log_hyperparameters, static, keys)
        zero = jnp.zeros_like(optax.tree.norm(params))
        carry = (params, self._optimiser(self.log_hyperparameters).init(params), zero)
        if self.window is None:
            first, length = jnp.array(0), self.steps
        else:
            fixed_carry, fixed_args = stop_gradient((carry, args))
            one = lambda carry, i: self._step(carry, fixed_args, i)
            norms = lambda: _norms(one, fixed_carry, self.steps)
            first = self.window.start(self.steps, norms, key=window_key)
            length = self.window.size
            carry = jax.lax.fori_loop(
                0, first, lambda i, carry: one(carry, i), fixed_carry
            )
        # All that is differentiated is in the arguments of the step.
        step = stop_gradient(self)._step
        carry = self.adjoint.loop(step, carry, args, first, length)
        params, _, norm = carry
        params = _refuse_kinks(params, self)
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]
        return Fitted(
            model=eqx.combine(params, static),
            converged=jnp.array(finite).all(),
            gradient_norm=jax.lax.stop_gradient(norm),
            stats={"steps": first + length},
        ), state

    def _optimiser(self, log_hyperparameters) -> optax.GradientTransformation:
        return self.make(**{k: jnp.exp(x) for k, x in log_hyperparameters.items()})

    def _step(self, carry, args, step):
        """One step: the parameters, the state of the optimiser, and the norm of the
        gradient before the step."""
        params, optimiser_state, _ = carry
        distilled, log_hyperparameters, static, keys = args
        batch_key, augmentation_key, dropout_key = keys
        rows = self._rows(distilled, step, batch_key, augmentation_key)

        def loss(params):
            model = eqx.combine(params, static)
            if not has_dropout(model):
                return inner_loss(rows, eqx.nn.inference_mode(model))
            return inner_loss(rows, model, key=jr.fold_in(dropout_key, step))

        gradient = jax.grad(loss)(params)
        optimiser = self._optimiser(log_hyperparameters)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state, params)
        updates = optax.tree.cast_like(updates, params)
        norm = optax.tree.norm(jax.lax.stop_gradient(gradient)).astype(carry[2].dtype)
        return eqx.apply_updates(params, updates), optimiser_state, norm

    def _rows(
        self,
        distilled: DistilledSet,
        step: Int[Array, ""],
        batch_key: PRNGKeyArray | None,
        augmentation_key: PRNGKeyArray | None,
    ) -> DistilledSet:
        """The distilled images of a step. There are keys if they are needed, as `init`
        has checked."""
        images, labels, n = distilled.images, distilled.labels, len(distilled)
        size = self.batch_size
        if size is not None:
            if self.shuffle:
                assert batch_key is not None
                chosen = batch_at(step, size, n, half_bits(n), key=batch_key)
            else:
                chosen = (step * size + jnp.arange(size)) % n
            images, labels = images[chosen], labels[chosen]
        if self.augmentation is not None:
            assert augmentation_key is not None
            own_key = jr.fold_in(augmentation_key, step)
            images = augment(self.augmentation, images, key=own_key)
        return eqx.tree_at(lambda d: (d.images, d.labels), distilled, (images, labels))


def log_positive(name: str, value: ArrayOrList) -> Float[Array, "..."]:
    """The logarithm of a number, or of an array of numbers, that must be positive.

    **Raises:**

    An error, at run time if the values are traced, if they are not.
    """
    array = as_array(name, value)
    return jnp.log(
        error_if(
            jnp.asarray(array, jnp.result_type(float)),
            lambda x: ~((x > 0) & (x < jnp.inf)).all(),
            f"`{name}` must be positive and finite; got {name_value(value)}.",
        )
    )


def has_dropout(model: PyTree) -> bool:
    is_dropout = lambda x: isinstance(x, eqx.nn.Dropout)
    nodes = jax.tree.leaves(model, is_leaf=is_dropout)
    return any(is_dropout(x) and not x.inference for x in nodes)


def _norms(step, carry, steps: int) -> Float[Array, " steps"]:
    """The norm of the gradient at each step."""

    def body(carry, i):
        carry = step(carry, i)
        return carry, carry[2]

    return jax.lax.scan(body, carry, jnp.arange(steps))[1]


@eqx.filter_custom_jvp
def _refuse_kinks(params: PyTree, solver: UnrolledSolver) -> PyTree:
    """The parameters as they are. To differentiate them is refused if the optimiser has
    no derivative where a gradient is zero.

    **Raises:**

    A `ValueError`.
    """
    del solver
    return params


@_refuse_kinks.def_jvp
def _(primals, tangents):
    params, solver = primals
    # The values do not matter, and must be known now.
    with jax.ensure_compile_time_eval():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        optimiser = solver.make(
            **{k: jnp.full(x.shape, 0.5) for k, x in solver.log_hyperparameters.items()}
        )
        update = lambda g: optimiser.update(g, optimiser.init(zeros), zeros)[0]
        ones = jax.tree.map(jnp.ones_like, zeros)
        _, changes = jax.jvp(update, (zeros,), (ones,))
        has_kink = any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(changes))
    if has_kink:
        raise ValueError(
            "`make` must make an optimiser with a derivative where a gradient is zero. "
            "Adam and its kin have none, unless `eps_root` is positive: give "
            "`functools.partial(optax.adam, eps_root=1e-8)`."
        )
    return params, tangents[0]
