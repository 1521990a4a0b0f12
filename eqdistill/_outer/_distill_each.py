from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import array_difference, check_at_least, check_key
from .._data._dataset import Dataset
from .._inner._auto_solver import AutoSolver
from .._inner._fit import check_inner
from .._inner._inner_solver import AbstractInnerSolver
from ._data import AbstractData
from ._distill_state import REASONS, Status
from ._distillation import (
    Distillation,
    DistillationError,
    NO_ROWS,
    to_result,
    to_rows,
)
from ._loop import CompiledStep
from ._outer_loss import decode
from ._problem import Problem


def distill_each(
    starts: Sequence[PyTree],
    model: PyTree,
    train: Dataset | AbstractData,
    *,
    inner: AbstractInnerSolver = AutoSolver(),
    optimiser: optax.GradientTransformation = optax.adam(0.02),
    steps: int = 50,
    learn: PyTree[bool] | None = None,
    tolerance: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> list[Distillation]:
    """Distils from several starts at once, such as the noise of several seeds: as
    [`eqdistill.distill`][] from each of them, in one program under `jax.vmap`, which
    reads the real data once a step for all.

    !!! Example

        ```python
        keys = jr.split(jr.key(0), 32)
        starts = [
            eqd.DistilledSet.from_noise(train, l2=0.1, scale=0.01, key=key)
            for key in keys
        ]
        results = eqd.distill_each(starts, model, train)
        ```

    **Arguments:**

    - `starts`: the distilled sets to begin with, all of one shape.
    - `model`, `train`: as for [`eqdistill.distill`][].

    All other arguments are keyword only, and as for [`eqdistill.distill`][]. Each start
    has a `key` of its own, split from the one that is given.

    **Returns:**

    A list of [`eqdistill.Distillation`][]s, one for each start.

    **Raises:**

    As [`eqdistill.distill`][], for the first start that fails, or for the first start
    if the inner solver raises an error of its own; and a `ValueError` if there are no
    starts, or they differ in shape.
    """
    if len(starts) == 0:
        raise ValueError("`starts` must hold at least one distilled set; got none.")
    (first, fixed), *others = (eqx.partition(start, eqx.is_array) for start in starts)
    for i, (other, other_fixed) in enumerate(others, start=1):
        difference = array_difference(first, other)
        if difference is None and not eqx.tree_equal(fixed, other_fixed):
            difference = f"{fixed} wanted, {other_fixed} got"
        if difference is not None:
            raise ValueError(
                "`starts` must be distilled sets of one shape, that of the first; the "
                f"one of index {i} differs: {difference}."
            )
    check_at_least(1, steps=steps)
    check_key("key", key)
    problem = Problem(
        starts[0],
        model,
        train,
        inner,
        optimiser=optimiser,
        learn=learn,
        tolerance=tolerance,
    )
    for start in starts[1:]:
        check_inner(decode(start), model, inner)
    arrays = [eqx.filter((start, inner), eqx.is_array) for start in starts]
    arrays = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    keys = None if key is None else jr.split(key, len(starts))
    state = eqx.filter_vmap(problem._init_from)(arrays, keys)
    run = CompiledStep(problem, state, is_batched=True)
    rows = []
    try:
        for step in range(1, steps + 1):
            rows.append(run())
            if step % 10 == 0 and (run.state().status != Status.RUNNING).all():
                break
        # Taken apart on the host, for which nothing is compiled.
        state = jax.tree.map(_to_host, run.state())
        rows = jax.device_get(rows)
    except jax.errors.JaxRuntimeError as e:
        state = jax.tree.map(lambda x: x[0], state)
        raise DistillationError(
            "Distillation stopped: the inner solver raised the error above, from one "
            "of the starts. It is not known which; the first is as it began.",
            to_result(problem, state, NO_ROWS),
        ) from e
    results = []
    for i in range(len(starts)):
        own = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), state)
        mine = [row[i] for row in rows]
        status = Status(int(own.status))
        result = to_result(
            problem,
            own,
            to_rows(mine, int(own.step)),
            has_failed=status in REASONS,
        )
        if status in REASONS:
            raise DistillationError(
                f"Distillation from the start of index {i} stopped at step "
                f"{int(own.step)}: {REASONS[status]}.",
                result,
            )
        results.append(result)
    return results


def _to_host(x: jax.Array):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else jax.device_get(x)
