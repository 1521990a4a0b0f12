from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, PyTree

from .._checks import check_at_least, error_if
from .._classifier import parameters
from .._conversions import ArrayOrList, as_array, as_int, as_int_or_none
from .._data._augmentation import AbstractAugmentation, augment
from .._data._distilled_set import DistilledSet
from .._data._permutation import batch_at
from .._typechecking import describe
from ._inner_solver import AbstractInnerSolver, Fitted, inner_loss, stop_gradient
from ._unrolled_adjoint import AbstractUnrolledAdjoint, AbstractWindow, DirectAdjoint


class UnrolledSolver(AbstractInnerSolver[None]):
    r"""Trains the model for a fixed number of steps of an Optax optimiser, starting
    from the model's own parameters:

    $$w_{t+1} = w_t - u_t\left(\nabla_w g(w_t; \theta)\right), \qquad
    w^\star(\theta) = w_T,$$

    where $g$ is [`eqdistill.inner_loss`][], including its ridge. Derivatives are taken
    through these steps. To draw new initial parameters in each outer step, use
    [`eqdistill.Fresh`][]: `Bilevel(Fresh(make), UnrolledSolver(...))`.

    `converged` is true if the fitted parameters are finite. `gradient_norm` is the norm
    of the gradient in the last step, before the update.

    A model with `equinox.nn.Dropout` is called with a `key` in each step. The fitted
    model is used in inference mode.

    !!! Example

        ```python
        inner = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, steps=100)
        ```

    !!! warning

        Adam divides by the square root of its second moment, which has no derivative at
        zero, and the gradient of a parameter can be zero. Differentiating such a run
        raises an error. Use `functools.partial(optax.adam, eps_root=1e-8)`.

    Source: Maclaurin et al., *Gradient-based hyperparameter optimization through
    reversible learning*, 2015; Wang et al., *Dataset distillation*, 2018.
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

        - `make`: constructs the optimiser, with the hyperparameters as keyword
            arguments. Define it once, outside any loop: each new function recompiles
            the solver.
        - `hyperparameters`: positive numbers or arrays of positive numbers, for example
            one for each step. Their logarithms are stored, so that they stay positive
            when they are learned.
        - `steps`: the number of steps $T$, at least 1.

        All other arguments are keyword only.

        - `batch_size`: the number of distilled images in a step. Defaults to all.
        - `shuffle`: if `True`, batches are drawn without replacement, and an epoch ends
            when less than a full batch is left. If `False`, batches are taken in
            order, and the first image follows the last.
        - `augmentation`: applied to each image at random in every step. Defaults to
            none.
        - `window`: chooses the steps that are differentiated, for example
            [`eqdistill.adjoints.LastSteps`][] or
            [`eqdistill.adjoints.RandomWindow`][]. Its size is at most `steps`. The run
            ends with the last step of the window. Defaults to all steps.
        - `adjoint`: [`eqdistill.adjoints.DirectAdjoint`][], or
            [`eqdistill.adjoints.RecursiveCheckpointAdjoint`][] for runs that do not fit
            in memory.
        """
        check_at_least(1, steps=steps, batch_size=batch_size)
        if window is not None and not 1 <= window.size <= steps:
            raise ValueError(
                f"`window` must have from 1 to {steps} steps, the length of the run; "
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
        """**Raises:** a `ValueError` if `batch_size` exceeds the number of distilled
        images."""
        if self.batch_size is not None and self.batch_size > len(distilled):
            raise ValueError(
                f"`batch_size` must be at most {len(distilled)}, the number of "
                f"distilled images; got {self.batch_size}."
            )

    def __call__(self, distilled: DistilledSet, model: PyTree, state, *, key):
        """**Raises:** a `ValueError` if the fit is differentiated and the optimiser has
        no derivative at a zero gradient."""
        params, static = eqx.partition(model, parameters(model))
        window_key, *keys = jr.split(key, 4)
        args = (distilled, self.log_hyperparameters, static, keys)
        zero = jnp.zeros_like(optax.tree.norm(params))
        carry = (params, self._optimiser(self.log_hyperparameters).init(params), zero)
        first, length = jnp.array(0), self.steps
        if self.window is not None:
            carry, fixed_args = stop_gradient((carry, args))
            one = lambda i, carry: self._step(carry, fixed_args, i)

            def norm_after(carry, i):
                carry = one(i, carry)
                return carry, carry[2]

            norms = lambda: jax.lax.scan(norm_after, carry, jnp.arange(self.steps))[1]
            first = self.window.start(self.steps, norms, key=window_key)
            length = self.window.size
            carry = jax.lax.fori_loop(0, first, one, carry)
        # Everything that is differentiated is an argument of the step.
        step = stop_gradient(self)._step
        carry = self.adjoint.loop(step, carry, args, first, length)
        params, _, norm = carry
        params = _check_differentiable(params, self)
        is_finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]
        return Fitted(
            model=eqx.combine(params, static),
            converged=jnp.array(is_finite).all(),
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
        batch = self._batch(distilled, step, batch_key, augmentation_key)

        def loss(params):
            model = eqx.combine(params, static)
            if not has_dropout(model):
                return inner_loss(batch, eqx.nn.inference_mode(model))
            return inner_loss(batch, model, key=jr.fold_in(dropout_key, step))

        gradient = jax.grad(loss)(params)
        optimiser = self._optimiser(log_hyperparameters)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state, params)
        updates = optax.tree.cast_like(updates, params)
        norm = optax.tree.norm(jax.lax.stop_gradient(gradient)).astype(carry[2].dtype)
        return eqx.apply_updates(params, updates), optimiser_state, norm

    def _batch(self, distilled, step, batch_key, augmentation_key) -> DistilledSet:
        where = lambda d: (d.images, d.labels, d.log_weights)
        rows, size, n = where(distilled), self.batch_size, len(distilled)
        if size is not None:
            if self.shuffle:
                chosen = batch_at(step, size, n, key=batch_key)
            else:
                chosen = (step * size + jnp.arange(size)) % n
            rows = jax.tree.map(lambda x: x[chosen], rows)
        if self.augmentation is not None:
            step_key = jr.fold_in(augmentation_key, step)
            images, *others = rows
            rows = augment(self.augmentation, images, key=step_key), *others
        return eqx.tree_at(where, distilled, rows, is_leaf=lambda x: x is None)


def log_positive(name: str, value: ArrayOrList) -> Float[Array, "..."]:
    """The logarithm of a positive number or of an array of positive numbers. Raises
    a `ValueError` if a value is not positive and finite."""
    array = error_if(
        jnp.asarray(as_array(name, value), jnp.result_type(float)),
        lambda x: ~((x > 0) & (x < jnp.inf)).all(),
        f"`{name}` must be positive and finite; got {describe(value)}.",
    )
    return jnp.log(array)


def has_dropout(model: PyTree) -> bool:
    is_dropout = lambda x: isinstance(x, eqx.nn.Dropout)
    nodes = jax.tree.leaves(model, is_leaf=is_dropout)
    return any(is_dropout(x) and not x.inference for x in nodes)


@eqx.filter_custom_jvp
def _check_differentiable(params: PyTree, solver: UnrolledSolver) -> PyTree:
    """Returns the parameters unchanged. Raises a `ValueError` if they are
    differentiated and the optimiser has no derivative at a zero gradient."""
    return params


@_check_differentiable.def_jvp
def _(primals, tangents):
    params, solver = primals
    # Any values will do, but they must be concrete.
    with jax.ensure_compile_time_eval():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        shapes = {k: x.shape for k, x in solver.log_hyperparameters.items()}
        optimiser = solver.make(**{k: jnp.full(x, 0.5) for k, x in shapes.items()})
        update = lambda g: optimiser.update(g, optimiser.init(zeros), zeros)[0]
        _, changes = jax.jvp(update, (zeros,), (optax.tree.ones_like(zeros),))
        is_nan = any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(changes))
    if is_nan:
        raise ValueError(
            "`make` must return an optimiser that is differentiable at a zero "
            "gradient. Adam and its variants are not unless `eps_root` is positive: "
            "use `functools.partial(optax.adam, eps_root=1e-8)`."
        )
    return params, tangents[0]
