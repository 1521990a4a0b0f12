import contextlib
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Float, PRNGKeyArray, PyTree

from ._auto_solver import AutoSolver
from ._checks import check_data, check_inner
from ._classifier import LogisticRegression
from ._dataset import Dataset
from ._distilled_set import DistilledSet
from ._growing_batch import GrowingBatch, GrowingLayout
from ._inner_solver import AbstractInnerSolver
from ._layout import AbstractLayout, RowLayout
from ._linear_layout import LinearLayout
from ._outer_loop import Problem, run_block, State, Status, StepInfo
from ._outer_loss import outer_loss


class History(eqx.Module):
    """What happened at each step of the outer loop, before its update.

    **Attributes:**

    - `loss`: the outer loss, in nats per image: on the step's batch, if batches are
        used.
    - `gradient_norm`: the Euclidean norm of the hypergradient over all that is
        learned.
    - `inner_residual`: the `gradient_norm` of the step's [`eqdistill.Fitted`][].
    - `adjoint_residual`: that of the adjoint's linear system, relative to its right-hand
        side.
    - `error_bound`: a bound on the Euclidean distance of the hypergradient from the
        exact one, but for rounding errors. It holds for an
        [`eqdistill.LogisticRegression`][] without an intercept, and is infinite for
        all else, for which none is known.
    - `num_images`: the number of real images in the step's batch.

    The two before the last are infinite for a step whose gradient a line search kept.
    """

    loss: Float[np.ndarray, " steps"]
    gradient_norm: Float[np.ndarray, " steps"]
    inner_residual: Float[np.ndarray, " steps"]
    adjoint_residual: Float[np.ndarray, " steps"]
    error_bound: Float[np.ndarray, " steps"]
    num_images: Float[np.ndarray, " steps"]

    def __len__(self) -> int:
        return len(self.loss)


class Distillation(eqx.Module):
    """The result of [`eqdistill.distill`][].

    **Attributes:**

    - `distilled`: the distilled set, after the last update; with held-out data, the
        best by these.
    - `history`: what happened at each step.
    - `converged`: whether the gradient norm reached the tolerance that was asked for.
    - `held_out_loss`: the outer loss on the held-out data after each block of steps, in
        nats per image. Empty if no data were held out.
    """

    distilled: DistilledSet
    history: History
    converged: bool
    held_out_loss: Float[np.ndarray, " blocks"]


class DistillationError(RuntimeError):
    """Raised when a distillation cannot go on.

    **Attributes:**

    - `distillation`: a [`eqdistill.Distillation`][] with the last good distilled set:
        the last one at which the outer loss and its gradient were known to be finite
        and the inner solver to converge, or else the one that it began with.
    """

    distillation: Distillation

    def __init__(self, message: str, distillation: Distillation):
        super().__init__(message)
        self.distillation = distillation


def distill(
    distilled: DistilledSet,
    classifier: PyTree,
    train: Dataset,
    *,
    inner: AbstractInnerSolver = AutoSolver(),
    optimiser: optax.GradientTransformation = optax.adam(0.02),
    steps: int = 50,
    learn: PyTree[bool] | None = None,
    batch_size: int | GrowingBatch | None = None,
    key: PRNGKeyArray | None = None,
    tolerance: float = 0.0,
    block_size: int = 10,
    held_out: Dataset | None = None,
    patience: int = 3,
    callback: Callable[[Distillation], bool | None] | None = None,
    progress: bool = False,
) -> Distillation:
    r"""Distils a dataset: minimises the outer loss over a distilled set,

    $$\min_\theta F(\theta) = \frac{1}{N} \sum_{i=1}^N \ell(y_i,
    w^\star(\theta)(x_i)),$$

    by the steps of an Optax optimiser along the hypergradient $\nabla F$.

    **Arguments:**

    - `distilled`: the distilled set to begin with.
    - `classifier`: as for [`eqdistill.fit`][].
    - `train`: the real data to distil.

    All other arguments are keyword only.

    - `inner`: how to fit the classifier.
    - `optimiser`: any Optax optimiser. Those with a line search, such as
        `optax.lbfgs`, are given the value, gradient and value function that they need.
        A convex inner problem and all of the data in each step converge in far fewer
        steps with `optax.lbfgs(learning_rate=1.0, linesearch=None)`, and in fewer yet
        if that is [`eqdistill.whitened`][].
    - `steps`: the most steps to take.
    - `learn`: what is learned: a pytree of bools with the structure of `distilled`.
        Defaults to its images.
    - `batch_size`: the number of real images in a step, drawn without replacement
        until all have been used; or a [`eqdistill.GrowingBatch`][]. Defaults to all of
        them.
    - `key`: a `jax.random.key` for the choice of the batches. Needed for them alone.
    - `tolerance`: stop when the Euclidean norm of the hypergradient is at most this.
    - `block_size`: the number of steps that are compiled into one call, between which
        progress is shown and `callback` is called.
    - `held_out`: real data to watch for overfitting by, which are not in `train`: see
        [`eqdistill.Dataset.split`][]. After each block the outer loss on them is taken,
        and the distilled set with the least is what is returned.
    - `patience`: stop after so many blocks without a lesser loss on `held_out`.
    - `callback`: called after each block with the [`eqdistill.Distillation`][] so far.
        Distillation stops early if it returns `True`.
    - `progress`: whether to show a progress bar. Needs `tqdm`.

    **Returns:**

    A [`eqdistill.Distillation`][].

    **Raises:**

    - A `TypeError` or `ValueError` as [`eqdistill.outer_loss`][], or for an argument
        that is out of its range.
    - A [`eqdistill.DistillationError`][], with the last good distilled set in it, if
        the inner solver fails, or the loss, its gradient or the distilled set stop
        being finite.

    Source: the bilevel problem is that of JAXopt's dataset-distillation notebook; its
    gradient by implicit differentiation, Pedregosa 2016, equation (2).
    """
    distilled = check_inner(distilled, classifier)
    check_data("train", train, distilled, classifier)
    if held_out is not None:
        check_data("held_out", held_out, distilled, classifier)
    for name, value in (
        ("steps", steps),
        ("block_size", block_size),
        ("patience", patience),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must not be negative; got {tolerance}.")
    if batch_size is None:
        key = jr.key(0) if key is None else key
    elif isinstance(batch_size, int) and not 1 <= batch_size <= len(train):
        raise ValueError(
            f"`batch_size` must be from 1 to {len(train)}, the number of images in "
            f"`train`; got {batch_size}."
        )
    elif key is None:
        raise ValueError("`key` must be given with `batch_size`, to draw batches by.")
    if not isinstance(optimiser, optax.GradientTransformation):
        raise TypeError(
            "`optimiser` must be an Optax optimiser, an "
            f"`optax.GradientTransformation`; got a {type(optimiser).__name__}."
        )
    learned, frozen = _partition(distilled, learn)
    layout = _lay_out(train, classifier, batch_size, key)
    optimiser_state = optimiser.init(learned)

    problem = Problem(
        frozen=frozen,
        classifier=classifier,
        layout=layout,
        inner=inner,
        optimiser=optax.with_extra_args_support(optimiser),
        tolerance=tolerance,
        batch_size=batch_size,
        new_optimiser_state=(
            optimiser_state if isinstance(batch_size, GrowingBatch) else None
        ),
    )
    state = State(
        learned=learned,
        last_good=learned,
        optimiser_state=optimiser_state,
        key=key,
        order=jnp.arange(len(train)),
        is_whole=jnp.array(False),
        step=jnp.array(0),
        status=Status.running,
    )
    blocks = []
    held_out_losses = []
    best, least_loss, since_best = learned, np.inf, 0

    def so_far(learned) -> Distillation:
        return Distillation(
            distilled=eqx.combine(learned, frozen),
            history=jax.tree.map(lambda *x: np.concatenate(x), _NO_HISTORY, *blocks),
            converged=bool(state.status == Status.converged),
            held_out_loss=np.array(held_out_losses, np.float32),
        )

    with _progress_bar(steps, progress) as show:
        while int(state.step) < steps:
            start = int(state.step)
            num_steps = min(block_size, steps - start)
            try:
                state, info = run_block(
                    state, jnp.array(num_steps), problem, block_size
                )
                end = int(state.step)
            except eqx.EquinoxRuntimeError as e:
                raise DistillationError(
                    f"Distillation stopped in the {num_steps} steps after step "
                    f"{start}: the inner solver raised the error above.",
                    so_far(state.last_good),
                ) from e
            blocks.append(_history(info, end - start))
            show(blocks[-1])
            has_converged = bool(state.status == Status.converged)
            if not (has_converged or bool(state.status == Status.running)):
                raise DistillationError(
                    f"Distillation stopped at step {end}: {Status[state.status]}.",
                    so_far(state.last_good),
                )
            if held_out is None:
                best = state.learned
            else:
                here = eqx.combine(state.learned, frozen)
                loss = float(outer_loss(here, classifier, held_out, inner, throw=False))
                held_out_losses.append(loss)
                since_best += 1
                if loss < least_loss:
                    best, least_loss, since_best = state.learned, loss, 0
            if has_converged or since_best >= patience:
                break
            if callback is not None and callback(so_far(best)):
                break
    return so_far(best)


_NO_HISTORY = History(*[np.zeros(0, np.float32)] * 6)


def _lay_out(train: Dataset, classifier: PyTree, batch_size, key) -> AbstractLayout:
    is_linear = isinstance(classifier, LogisticRegression)
    if isinstance(batch_size, int):
        # Of any rows.
        return RowLayout.of(train)
    of = LinearLayout.of if is_linear else RowLayout.of
    if batch_size is None:
        return of(train)
    half = round(batch_size.fraction * len(train) / 2)
    if not 0 < 2 * half < len(train):
        raise ValueError(
            "`batch_size.fraction` must leave at least one image in each half of the "
            f"part to start on, and beyond it; got {batch_size.fraction} of {len(train)}."
        )
    order = np.asarray(jr.permutation(key, len(train)))
    images, labels = np.asarray(train.images), np.asarray(train.labels)
    first, second, others = (
        of(
            eqx.tree_at(
                lambda d: (d.images, d.labels), train, (images[rows], labels[rows])
            )
        )
        for rows in np.split(order, (half, 2 * half))
    )
    return GrowingLayout((first, second), others, jnp.array(False))


def _history(info: StepInfo, num_steps: int) -> History:
    return History(*(np.asarray(x)[:num_steps] for x in jax.tree.leaves(info)))


def _partition(
    distilled: DistilledSet, learn: PyTree[bool] | None
) -> tuple[PyTree, PyTree]:
    if learn is None:
        nothing = jax.tree.map(lambda _: False, distilled)
        learn = eqx.tree_at(lambda d: d.images, nothing, True)
    try:
        learned, frozen = eqx.partition(distilled, learn)
    except (TypeError, ValueError) as e:
        raise ValueError(
            "`learn` must be a pytree of bools with the structure of `distilled`; got "
            f"{learn}."
        ) from e
    leaves = jax.tree.leaves(learned)
    if len(leaves) == 0 or not all(map(eqx.is_inexact_array, leaves)):
        raise ValueError(
            "`learn` must pick at least one array of `distilled`, and none but those "
            f"of floating point; it picks {learned}."
        )
    return learned, frozen


@contextlib.contextmanager
def _progress_bar(steps: int, progress: bool):
    if not progress:
        yield lambda history: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as e:
        raise ImportError(
            "`progress=True` needs tqdm: pip install 'eqdistill[progress]'."
        ) from e
    with tqdm(total=steps, unit="step") as bar:

        def show(history: History) -> None:
            if len(history) > 0:
                bar.set_postfix(loss=f"{history.loss[-1]:.4f}", refresh=False)
                bar.update(len(history))

        yield show
