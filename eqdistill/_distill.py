import contextlib
from collections.abc import Callable

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from ._auto_solver import AutoSolver
from ._checks import check_data
from ._dataset import Dataset
from ._distillation import (
    Distillation,
    DistillationError,
    History,
    NO_HISTORY,
    to_history,
)
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver
from ._outer_loop import (
    compiled,
    new_state,
    on_host,
    quiet_blas,
    run_block,
    Status,
)
from ._outer_loss import outer_loss
from ._set_up import set_up


def distill(
    distilled: DistilledSet,
    classifier: PyTree,
    train: Dataset,
    *,
    inner: AbstractInnerSolver = AutoSolver(),
    optimiser: optax.GradientTransformation = optax.adam(0.02),
    steps: int = 50,
    learn: PyTree[bool] | None = None,
    batch_size: int | None = None,
    key: PRNGKeyArray | None = None,
    tolerance: float = 0.0,
    accuracy: float | None = None,
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
        until all have been used. Defaults to all of them.
    - `key`: a `jax.random.key` for the choice of the batches. Needed for them alone.
    - `tolerance`: stop when the Euclidean norm of the hypergradient is at most this.
    - `accuracy`: between 0 and 1: solve the inner problem and for the adjoint just so
        well that the bound on the hypergradient's error is at most this fraction of its
        norm, as far as rounding allows: see `error_bound` in [`eqdistill.History`][].
        Needs a [`eqdistill.LogisticRegression`][] without an intercept, and
        [`eqdistill.AutoSolver`][] or [`eqdistill.SpanSolver`][]. Defaults to solving
        both as well as can be, which for up to 300 unknowns takes no longer. With a
        line search, it takes one more hypergradient in each step.
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
    if held_out is not None:
        check_data("held_out", held_out, distilled, classifier)
    for name, value in (
        ("steps", steps),
        ("block_size", block_size),
        ("patience", patience),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    problem, learned = set_up(
        distilled,
        classifier,
        train,
        inner=inner,
        optimiser=optimiser,
        learn=learn,
        batch_size=batch_size,
        key=key,
        tolerance=tolerance,
        accuracy=accuracy,
    )
    state = new_state(learned, problem)
    run = compiled(run_block, problem, len(distilled))
    blocks = []
    held_out_losses = []
    best, least_loss, since_best = learned, np.inf, 0

    def so_far(learned) -> Distillation:
        return Distillation(
            distilled=eqx.combine(learned, problem.frozen),
            history=jax.tree.map(lambda *x: np.concatenate(x), NO_HISTORY, *blocks),
            converged=bool(on_host(state.status) == Status.converged),
            held_out_loss=np.array(held_out_losses, np.float32),
        )

    with quiet_blas(problem), _progress_bar(steps, progress) as show:
        while int(state.step) < steps:
            start = int(state.step)
            num_steps = min(block_size, steps - start)
            try:
                num_steps_now = jax.device_put(np.array(num_steps))
                state, rows = run(state, num_steps_now, problem, block_size)
                end = int(state.step)
            except eqx.EquinoxRuntimeError as e:
                raise DistillationError(
                    f"Distillation stopped in the {num_steps} steps after step "
                    f"{start}: the inner solver raised the error above.",
                    so_far(state.last_good),
                ) from e
            blocks.append(to_history(np.asarray(rows), end - start))
            show(blocks[-1])
            status = on_host(state.status)
            has_converged = bool(status == Status.converged)
            if not (has_converged or bool(status == Status.running)):
                raise DistillationError(
                    f"Distillation stopped at step {end}: {Status[status]}.",
                    so_far(state.last_good),
                )
            if held_out is None:
                best = state.learned
            else:
                here = eqx.combine(state.learned, problem.frozen)
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
