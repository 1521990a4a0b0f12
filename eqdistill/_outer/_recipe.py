from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.random as jr
import numpy as np
from jaxtyping import Float, PRNGKeyArray, PyTree

from .._checks import check_at_least
from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from .._inner._inner_solver import AbstractInnerSolver
from ._evaluate import evaluate as evaluate_one


class Recipe(eqx.Module):
    """All that decides which accuracy a distilled set has: how networks are made, what
    the labels stand for, and how a network is trained. The same images score very
    differently by two recipes.

    **Attributes:**

    - `name`: the name of the function that made the recipe.
    - `settings`: the arguments of that function, as pairs of a name and a value.
    - `network`: makes a network from the shape of an image, the number of classes and a
        `key`, such as [`eqdistill.nn.ConvNet`][] with all else bound.
    - `initialise`: changes a network that was just made: draws its weights anew, or
        sets its last layer to zero.
    - `prepare`: the distilled set as the training sees it: with the loss, the labels
        and the weight decay of the recipe.
    - `inner`: how a network is trained.
    """

    name: str = eqx.field(static=True)
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    network: Callable = eqx.field(static=True)
    initialise: Callable = eqx.field(static=True)
    prepare: Callable = eqx.field(static=True)
    inner: AbstractInnerSolver

    def make(
        self, shape: tuple[int, ...], num_classes: int, *, key: PRNGKeyArray
    ) -> PyTree:
        """**Arguments:**

        - `shape`: the shape of an image.
        - `num_classes`: the number of classes.
        - `key`: a `jax.random.key`. (Keyword only argument.)

        **Returns:**

        A fresh network.
        """
        return _make(self.network, self.initialise, tuple(shape), num_classes, key)


@eqx.filter_jit  # One program: each layer would otherwise compile several.
def _make(network, initialise, shape, num_classes, key) -> PyTree:
    network_key, key = jr.split(key)
    return initialise(network(shape, num_classes, key=network_key), key=key)


class Evaluations(eqx.Module):
    """How well fresh networks do on real data, when they are trained on distilled sets
    by a recipe.

    **Attributes:**

    - `accuracies`: the accuracy of each network, from 0 to 1: one row for each set.
    - `key`: the key of the networks, or `None` if that is not known.
    """

    accuracies: Float[np.ndarray, "sets networks"]
    key: PRNGKeyArray | None = None

    @property
    def mean(self) -> float:
        """The mean accuracy over sets and networks."""
        return float(np.mean(self.accuracies))

    @property
    def deviation_of_networks(self) -> float:
        """The standard deviation over the networks that are trained on one set, with
        their number less one in the denominator; the root mean square over sets. NaN
        for one network."""
        return _deviation(self.accuracies)

    @property
    def deviation_of_sets(self) -> float:
        """The standard deviation over sets of the mean accuracy on a set, likewise. NaN
        for one set."""
        return _deviation(np.mean(self.accuracies, axis=1)[None])


def _deviation(rows: Float[np.ndarray, "rows columns"]) -> float:
    if rows.shape[1] < 2:
        return float("nan")
    return float(np.sqrt(np.mean(np.var(rows, axis=1, ddof=1))))


def evaluate(
    distilled: DistilledSet | Sequence[DistilledSet],
    recipe: Recipe,
    test: Dataset,
    *,
    num_networks: int = 5,
    key: PRNGKeyArray,
) -> Evaluations:
    """Trains fresh networks on a distilled set by a recipe, and measures their accuracy
    after the last step.

    Nothing is chosen here: for a choice, give held-out training data as `test`.

    !!! Example

        ```python
        recipe = eqd.recipes.dc()
        found = eqd.recipes.evaluate(distilled, recipe, test, key=jr.key(0))
        print(f"{found.mean:.1%} +- {found.deviation_of_networks:.1%}")
        ```

    **Arguments:**

    - `distilled`: the distilled set; or several, such as those of several seeds.
    - `recipe`: such as [`eqdistill.recipes.dc`][].
    - `test`: the real data.
    - `num_networks`: the number of networks for each set. (Keyword only argument.)
    - `key`: a `jax.random.key`. Network `i` is the same for all sets. (Keyword only
        argument.)

    **Returns:**

    The [`eqdistill.recipes.Evaluations`][].

    **Raises:**

    A `ValueError` if `num_networks` is less than 1, if there is no set, or if the
    labels are not of the kind that the recipe takes; and as [`eqdistill.evaluate`][].
    """
    sets = [distilled] if isinstance(distilled, DistilledSet) else list(distilled)
    check_at_least(1, num_networks=num_networks)
    if not sets:
        raise ValueError("`distilled` must hold at least one distilled set; got none.")
    accuracies = np.empty((len(sets), num_networks))
    for i, one in enumerate(sets):
        prepared = recipe.prepare(one, test.num_classes)
        for j in range(num_networks):
            network_key, training_key = jr.split(jr.fold_in(key, j))
            network = recipe.make(test.shape, test.num_classes, key=network_key)
            found = evaluate_one(
                prepared, network, test, recipe.inner, key=training_key
            )
            accuracies[i, j] = float(found.accuracy)
    return Evaluations(accuracies, key)
