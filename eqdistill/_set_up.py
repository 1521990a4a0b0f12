import equinox as eqx
import jax
import optax
from jaxtyping import PRNGKeyArray, PyTree

from ._auto_solver import AutoSolver
from ._checks import check_data, check_inner
from ._classifier import LogisticRegression
from ._dataset import Dataset
from ._distilled_set import DistilledSet
from ._inner_solver import AbstractInnerSolver
from ._layout import AbstractLayout, RowLayout
from ._linear_layout import LinearLayout
from ._outer_loop import Problem
from ._span_solver import SpanSolver


def set_up(
    distilled: DistilledSet,
    classifier: PyTree,
    train: Dataset,
    *,
    inner: AbstractInnerSolver,
    optimiser: optax.GradientTransformation,
    learn: PyTree[bool] | None,
    batch_size: int | None,
    key: PRNGKeyArray | None,
    tolerance: float,
    accuracy: float | None,
) -> tuple[Problem, PyTree]:
    """All that stays fixed over the outer loop, and what is to be learned.

    **Raises:**

    As [`eqdistill.distill`][], for an argument that is not as it should be.
    """
    distilled = check_inner(distilled, classifier)
    check_data("train", train, distilled, classifier)
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must not be negative; got {tolerance}.")
    if accuracy is not None:
        inner = _to_steer(accuracy, inner, classifier)
    if batch_size is not None and not 1 <= batch_size <= len(train):
        raise ValueError(
            f"`batch_size` must be from 1 to {len(train)}, the number of images in "
            f"`train`; got {batch_size}."
        )
    if batch_size is not None and key is None:
        raise ValueError("`key` must be given with `batch_size`, to draw batches by.")
    if not isinstance(optimiser, optax.GradientTransformation):
        raise TypeError(
            "`optimiser` must be an Optax optimiser, an "
            f"`optax.GradientTransformation`; got a {type(optimiser).__name__}."
        )
    learned, frozen = partition(distilled, learn)
    problem = Problem(
        frozen=frozen,
        classifier=classifier,
        layout=_lay_out(train, classifier, batch_size),
        inner=inner,
        optimiser=optax.with_extra_args_support(optimiser),
        tolerance=tolerance,
        accuracy=accuracy,
        batch_size=batch_size,
        key=key,
    )
    return problem, learned


def _to_steer(
    accuracy: float, inner: AbstractInnerSolver, classifier: PyTree
) -> SpanSolver:
    if not 0 < accuracy < 1:
        raise ValueError(f"`accuracy` must be between 0 and 1; got {accuracy}.")
    if not isinstance(classifier, LogisticRegression):
        got = f"a {type(classifier).__name__}"
    elif classifier.intercept is not None:
        got = "one with an intercept"
    elif not isinstance(inner, SpanSolver | AutoSolver):
        got = f"`inner` of type {type(inner).__name__}"
    else:
        return inner if isinstance(inner, SpanSolver) else SpanSolver()
    raise ValueError(
        "`accuracy` needs a bound on the error of the hypergradient, and a solver that "
        "can be told when to stop: a `LogisticRegression` without an intercept, and "
        f"`AutoSolver` or `SpanSolver` as `inner`; got {got}."
    )


def partition(
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


def _lay_out(
    train: Dataset, classifier: PyTree, batch_size: int | None
) -> AbstractLayout:
    # Batches are of any rows.
    if isinstance(classifier, LogisticRegression) and batch_size is None:
        return LinearLayout.of(train)
    return RowLayout.of(train)
