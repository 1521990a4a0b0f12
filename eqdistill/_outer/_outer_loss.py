import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import array_difference, check_key, name_kind
from .._classifier import LinearClassifier
from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from .._inner._auto_solver import AutoSolver
from .._inner._fit import check_inner, count_classes, solve
from .._inner._inner_solver import AbstractInnerSolver, Fitted
from .._losses import AbstractLoss
from ._data import AbstractData
from ._mean_loss import mean_loss
from ._rows import Rows


class Outcome(eqx.Module):
    """What comes with an outer loss.

    **Attributes:**

    - `fitted`: the [`eqdistill.Fitted`][] of the inner problem.
    - `state`: the state of the inner solver, for the next outer step.
    """

    fitted: Fitted
    state: PyTree


def outer_loss(
    start: PyTree,
    model: PyTree,
    data: Dataset | AbstractData,
    inner: AbstractInnerSolver = AutoSolver(),
    state: PyTree = None,
    *,
    step: int | Int[Array, ""] = 0,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Outcome]:
    r"""The loss on real data of the model fitted to a distilled set,

    $$F(\theta) = \frac{1}{N} \sum_{i=1}^N \ell(y_i, w^\star(\theta)(x_i)),$$

    with the cross-entropy $\ell$. Its gradient is the hypergradient:
    `equinox.filter_value_and_grad(outer_loss, has_aux=True)` is what
    [`eqdistill.distill`][] calls in each step, and all that a loop of one's own needs.

    !!! Example

        ```python
        data = eqd.FullBatch(train, model)  # once, outside of the loop
        hypergradient = eqx.filter_jit(
            eqx.filter_value_and_grad(eqd.outer_loss, has_aux=True)
        )
        (loss, outcome), gradient = hypergradient(distilled, model, data)
        ```

    **Arguments:**

    - `start`: the distilled set, or another module whose `decode` gives one.
    - `model`: as for [`eqdistill.fit`][].
    - `data`: the real data. A [`eqdistill.Dataset`][] works everywhere. An
        [`eqdistill.FullBatch`][] of it is quicker, and is what a loop should use.
    - `inner`: how to fit the model.
    - `state`: the state of the inner solver, from the outcome of the step before. The
        default is a new one.
    - `step`: the number of the outer step. (Keyword only argument.)
    - `key`: a `jax.random.key`, the same for all steps of a run, for data in batches
        and solvers that draw random numbers. (Keyword only argument.)

    **Returns:**

    The mean cross-entropy, in nats per image, and the [`eqdistill.Outcome`][]. Whether
    the fit converged is in `outcome.fitted`: no error is raised if it did not.

    **Raises:**

    A `TypeError` or `ValueError` as [`eqdistill.fit`][], or if the real images are not
    of the shape of the distilled images, or are of more classes than the model
    has, or if `state` is not of this inner solver.
    """
    check_key("key", key)
    distilled = check_inner(decode(start), model, inner)
    check_data("data", data, distilled, model, inner)
    if state is not None:
        _, init_key, _ = split_key(key)
        wanted = eqx.filter_eval_shape(inner.init, distilled, model, key=init_key)
        difference = array_difference(wanted, state)
        if difference is not None:
            raise ValueError(f"`state` must be a state of `inner`: {difference}.")
    return loss_of(distilled, model, data, inner, state, step=step, key=key)


def loss_of(
    distilled: DistilledSet,
    model: PyTree,
    data: Dataset | AbstractData,
    inner: AbstractInnerSolver,
    state: PyTree,
    *,
    step: int | Int[Array, ""],
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, ""], Outcome]:
    """The outer loss, of arguments that have been checked.

    A check of traced labels would put a callback into the program, and JAX's persistent
    compilation cache does not keep such a program.
    """
    step = jnp.asarray(step)
    data_key, init_key, solver_key = split_key(key)
    if state is None:
        state = inner.init(distilled, model, key=init_key)
    if solver_key is not None:
        solver_key = jr.fold_in(solver_key, step)
    fitted, state = solve(distilled, model, inner, state, key=solver_key)
    reader = as_logits(eqx.nn.inference_mode(fitted.model), distilled.loss)
    if isinstance(data, Dataset):
        loss = mean_loss(reader, Rows(data.images, data.labels))
    else:
        loss = data.loss(reader, step, key=data_key)
    return loss, Outcome(fitted, state)


def split_key(key: PRNGKeyArray | None):
    """The keys of a run: for the order of the data, for the first state of the inner
    solver, and for its fits."""
    return (None, None, None) if key is None else tuple(jr.split(key, 3))


class _Reader(eqx.Module):
    model: PyTree
    loss: AbstractLoss

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " c"]:
        return self.loss.to_logits(self.model(image))


def as_logits(model: PyTree, loss: AbstractLoss) -> PyTree:
    """The fitted model, whose outputs are read as logits. A linear model
    stays one."""
    if isinstance(model, LinearClassifier):
        head = jax.tree.map(loss.to_logits, model.head)
        return eqx.tree_at(lambda c: c.head, model, head)
    return _Reader(model, loss)


def decode(start: PyTree) -> DistilledSet:
    """**Raises:**

    A `TypeError` if `start` does not decode to a distilled set.
    """
    if not hasattr(start, "decode") or isinstance(start, type):
        raise TypeError(
            "`start` must be a `DistilledSet`, or a module whose `decode` gives one; "
            f"got {name_kind(start)}."
        )
    distilled = start.decode()
    if not isinstance(distilled, DistilledSet):
        raise TypeError(
            f"`start.decode()` must give a `DistilledSet`; that of a "
            f"{type(start).__name__} gave a {type(distilled).__name__}."
        )
    return distilled


def check_data(
    name: str,
    data: Dataset | AbstractData,
    distilled: DistilledSet,
    model: PyTree,
    inner: AbstractInnerSolver,
) -> None:
    """Checks that a distilled set can stand for real data.

    **Raises:**

    A `ValueError` that names the argument at fault.
    """
    shape = distilled.images.shape[1:]
    if data.shape != shape:
        raise ValueError(
            f"`{name}` and `distilled` must have images of one shape; got "
            f"{data.shape} and {shape}."
        )
    num_classes = count_classes(distilled, model, inner)
    if data.num_classes > num_classes:
        fitted = "model" if model is not None else "inner"
        raise ValueError(
            f"`{fitted}` must have a logit for each of the {data.num_classes} classes "
            f"of `{name}`; it has {num_classes}."
        )
