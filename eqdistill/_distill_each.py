from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int, PyTree

from ._auto_solver import AutoSolver
from ._checks import check_inner
from ._dataset import Dataset
from ._distillation import (
    Distillation,
    DistillationError,
    NO_HISTORY,
    to_history,
)
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver
from ._outer_loop import (
    compiled,
    new_state,
    on_host,
    Problem,
    quiet_blas,
    run_block,
    Status,
)
from ._set_up import partition, set_up


def distill_each(
    starts: Sequence[DistilledSet],
    classifier: PyTree,
    train: Dataset,
    *,
    inner: AbstractInnerSolver = AutoSolver(),
    optimiser: optax.GradientTransformation = optax.adam(0.02),
    steps: int = 50,
    learn: PyTree[bool] | None = None,
    tolerance: float = 0.0,
    accuracy: float | None = None,
) -> list[Distillation]:
    """Distils from several starts at once, such as the noise of several seeds: as
    [`eqdistill.distill`][] from each of them, in one program under `jax.vmap`, for
    which the real data are laid out once, and read once a step.

    !!! Example

        ```python
        keys = jr.split(jr.key(0), 32)
        starts = [eqd.DistilledSet.from_noise(train, key=key) for key in keys]
        results = eqd.distill_each(starts, classifier, train)
        ```

    **Arguments:**

    - `starts`: the distilled sets to begin with, all of one shape.
    - `classifier`, `train`: as for [`eqdistill.distill`][].

    All other arguments are keyword only, and as for [`eqdistill.distill`][].

    **Returns:**

    A list of [`eqdistill.Distillation`][]s, one for each start.

    **Raises:**

    As [`eqdistill.distill`][], for the first start that fails, or for the first of all
    if the inner solver raises an error of its own; and a `ValueError` if there are no
    starts, or they differ in shape.
    """
    if len(starts) == 0:
        raise ValueError("`starts` must hold at least one distilled set; got none.")
    first, *others = (_describe(start) for start in starts)
    for i, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(
                "`starts` must be distilled sets of one shape; the first has "
                f"{first}, that of index {i} has {other}."
            )
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1; got {steps}.")
    problem, _ = set_up(
        starts[0],
        classifier,
        train,
        inner=inner,
        optimiser=optimiser,
        learn=learn,
        batch_size=None,
        key=None,
        tolerance=tolerance,
        accuracy=accuracy,
    )
    for start in starts[1:]:
        check_inner(start, classifier)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    learned, frozen = partition(stacked, learn)
    try:
        with quiet_blas(problem):
            run = compiled(_run_each, problem, len(starts[0]))
            num_steps = jax.device_put(np.array(steps))
            found = run(learned, frozen, problem, num_steps, steps)
            # To be taken apart on the host, where nothing need be compiled for it.
            frozen, states, blocks = jax.device_get((frozen, *found))
    except eqx.EquinoxRuntimeError as e:
        raise DistillationError(
            "Distillation stopped: the inner solver raised the error above, from one "
            "of the starts. It is not known which; the first is as it began.",
            Distillation(starts[0], NO_HISTORY, False, np.zeros(0, np.float32)),
        ) from e
    results = []
    for i in range(len(starts)):
        own, state, rows = jax.tree.map(lambda x, i=i: x[i], (frozen, states, blocks))
        is_good = bool(state.status == Status.running)
        has_converged = bool(state.status == Status.converged)
        at = state.learned if is_good or has_converged else state.last_good
        result = Distillation(
            distilled=jax.tree.map(jnp.asarray, eqx.combine(at, own)),
            history=to_history(rows, int(state.step)),
            converged=has_converged,
            held_out_loss=np.zeros(0, np.float32),
        )
        if not (is_good or has_converged):
            raise DistillationError(
                f"Distillation from the start of index {i} stopped at step "
                f"{int(state.step)}: {Status[on_host(state.status)]}.",
                result,
            )
        results.append(result)
    return results


def _describe(start: DistilledSet) -> str:
    images, labels = start.images, start.labels
    return (
        f"images of shape {images.shape} and dtype {images.dtype}, labels of shape "
        f"{labels.shape} and dtype {labels.dtype}"
    )


def _run_each(
    learned: PyTree,
    frozen: PyTree,
    problem: Problem,
    num_steps: Int[jax.Array, ""],
    block_size: int,
):
    def run(learned, frozen):
        own = eqx.tree_at(lambda p: p.frozen, problem, frozen)
        state, rows = run_block(new_state(learned, own), num_steps, own, block_size)
        # Not what is the same for all, of which there would then be many copies.
        needed = eqx.tree_at(
            lambda s: (s.start, s.optimiser_state), state, (None, None)
        )
        return needed, rows

    return eqx.filter_vmap(run)(learned, frozen)
