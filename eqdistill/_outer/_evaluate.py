from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.random as jr
import numpy as np
from jaxtyping import Float, PRNGKeyArray, PyTree

from .._checks import check_at_least, needs
from .._data._class_names import check_same_classes
from .._data._dataset import Dataset
from .._data._distilled_set import DistilledSet
from .._inner._auto_solver import AutoSolver
from .._inner._fit import check_fit, fit
from .._inner._inner_solver import AbstractInnerSolver, Fitted
from .._models._models import AbstractModels, as_models, Fixed
from .._sharding import to_host
from .._typechecking import describe
from ._metrics import measure
from ._recipes import Recipe


class Evaluation(eqx.Module):
    """How well models do on real data after training on distilled sets. An evaluation
    is printed as `95.7% ± 0.4% (5 models)`: the mean of the first metric and its
    standard deviation.

    **Attributes:**

    - `metrics`: each metric by its name, with one row for each distilled set. For class
        indices and soft labels, `accuracy`, the fraction of the examples that a model
        classifies correctly, and `balanced accuracy`, the mean over classes of this
        fraction. The most likely class of a soft label counts as correct. For
        targets for [`eqdistill.BinaryCrossEntropy`][], `mean average precision`. For
        other targets, `R2`, the mean over columns of the coefficient of determination,
        and `mean squared error`, the mean over all numbers. `loss` is always last.
    - `per_class`: the accuracy of each class, or the average precision or $R^2$ of each
        column. NaN for a class without examples, or for a constant column.
    - `recipe`: how the models were made and trained.
    - `fitted`: the last model of the last set, as [`eqdistill.fit`][] returned it.
    - `key`: the key that the models were made with.
    """

    metrics: dict[str, Float[np.ndarray, "sets models"]]
    per_class: Float[np.ndarray, "sets models c"]
    recipe: Recipe
    fitted: Fitted
    key: PRNGKeyArray

    @property
    def metric(self) -> str:
        """The name of the first metric."""
        return next(iter(self.metrics))

    @property
    def scores(self) -> Float[np.ndarray, "sets models"]:
        """The values of the first metric."""
        return self.metrics[self.metric]

    @property
    def score(self) -> float:
        """The mean of the first metric over sets and models."""
        return float(np.mean(self.scores))

    @property
    def accuracy(self) -> float:
        """The mean accuracy over sets and models. Raises an `AttributeError` if it was
        not measured, because the real data have targets."""
        if "accuracy" not in self.metrics:
            raise AttributeError(
                "There is no accuracy, because the real data have targets. Use "
                f"`metrics` ({', '.join(map(repr, self.metrics))}), or `score`, the "
                "mean of the first."
            )
        return float(np.mean(self.metrics["accuracy"]))

    @property
    def loss(self) -> float:
        """The mean loss over sets and models, per example."""
        return float(np.mean(self.metrics["loss"]))

    @property
    def std_models(self) -> float:
        """The sample standard deviation (`ddof=1`) of the first metric over the models
        of one set, pooled over sets. NaN for one model."""
        return _pooled_std(self.scores)

    @property
    def std_sets(self) -> float:
        """The sample standard deviation (`ddof=1`), over sets, of the mean of the
        first metric on each set. NaN for one set."""
        return _pooled_std(np.mean(self.scores, axis=1)[None])

    def __repr__(self) -> str:
        is_fraction = self.metric == "accuracy"
        show = "{:.1%}".format if is_fraction else "{:.4g}".format
        sets, models = self.scores.shape
        words = show(self.score) if is_fraction else f"{self.metric} {show(self.score)}"
        if sets == 1:
            return words + f" ± {show(self.std_models)} ({models} models)" * (
                models > 1
            )
        parts = [f" ± {show(self.std_models)} over {models} models"] * (models > 1)
        return words + ",".join([*parts, f" ± {show(self.std_sets)} over {sets} sets"])


def _pooled_std(rows: Float[np.ndarray, "rows columns"]) -> float:
    is_many = rows.shape[1] > 1
    return float(np.sqrt(np.mean(np.var(rows, axis=1, ddof=1)))) if is_many else np.nan


def evaluate(
    distilled: DistilledSet | Sequence[DistilledSet],
    recipe: Recipe | AbstractModels | PyTree,
    test: Dataset,
    *,
    inner: AbstractInnerSolver | None = None,
    num_models: int | None = None,
    key: PRNGKeyArray | None = None,
    progress: bool = False,
) -> Evaluation:
    r"""Trains models on a distilled set and measures how well they do on real data. For
    class indices, this is the accuracy,

    $$\frac{1}{N} \sum_{i=1}^N \left[\arg\max_k w^\star(\theta)(x_i)_k = y_i\right].$$

    Nothing is selected on `test`. To choose between recipes or distilled
    sets, evaluate on held-out training data.

    !!! Example
        ```python
        make = functools.partial(eqd.nn.ConvNet, test.shape, test.num_classes)
        recipe = eqd.recipes.feature_regression(make)
        print(eqd.evaluate(distilled, recipe, test))  # 95.7% ± 0.4% (5 models)
        ```

    **Arguments:**

    - `distilled`: a distilled set, or several, such as sets from several seeds.
    - `recipe`: a recipe, such as the one returned by [`eqdistill.recipes.dc`][]; a
        source of models, such as [`eqdistill.Fresh`][]; or a model.
    - `test`: the real data, with images of the same shape as the distilled ones.

    All other arguments are keyword only.

    - `inner`: how to train models that come without a recipe. Defaults to
        [`eqdistill.AutoSolver`][].
    - `num_models`: the number of models for each set. Defaults to 1 if `recipe` is a
        model, and to 5 otherwise.
    - `key`: a `jax.random.key`; defaults to `jax.random.key(0)`. Model `i` is drawn and
        trained with the same keys for all sets.
    - `progress`: whether to show a progress bar over the models of each set, with the
        mean of the first metric so far. Needs `tqdm`, which is in
        `eqdistill[progress]`.

    **Returns:** an [`Evaluation`][]. Its loss on real data is the `default_outer_loss`
    of the loss that the models are trained with. A NaN output counts as a
    wrong classification.

    **Raises:** what [`eqdistill.fit`][] raises. An `ImportError` if `progress` is set
    and `tqdm` is not installed.
    """
    check_at_least(1, num_models=num_models)
    sets = [distilled] if isinstance(distilled, DistilledSet) else list(distilled)
    if not sets:
        raise ValueError("`distilled` must hold at least one distilled set; got none.")
    if not isinstance(recipe, Recipe):
        models = as_models(recipe, "`recipe` must be a `Recipe`,")
        recipe = Recipe(models, AutoSolver() if inner is None else inner)
    elif inner is not None:
        got = describe(inner)
        raise ValueError(f"`inner` must be left out with a `Recipe`; got {got}.")
    if num_models is None:
        num_models = 1 if isinstance(recipe.models, Fixed) else 5
    key = jr.key(0) if key is None else key
    found: list[list[tuple[dict[str, float], np.ndarray]]] = []
    for one in sets:
        if one.images.shape[1:] != test.shape:
            raise ValueError(
                "`test` and `distilled` must have images of the same shape; got "
                f"{test.shape} and {one.images.shape[1:]}."
            )
        check_same_classes("`distilled`", one, "`test`", test)
        prepared = recipe.prepare(one, test.num_classes)
        prepared.loss.check_labels(to_host(test.labels))
        if test.has_targets and type(prepared.loss) is not type(one.loss):
            raise ValueError(
                "`recipe` must train with the loss of the distilled set, because "
                f"`test` has targets; got {describe(prepared.loss)} for "
                f"{describe(one.loss)}."
            )
        found.append([])
        bar: Any = _bar(num_models) if progress else range(num_models)
        for j in bar:
            draw_key, fit_key, init_key = jr.split(jr.fold_in(key, j), 3)
            model = _draw(recipe.models, prepared, init_key, draw_key)
            num_outputs = check_fit(prepared, model)
            is_wrong = test.has_targets and num_outputs != test.num_classes
            if num_outputs < test.num_classes or is_wrong:
                raise ValueError(
                    "`recipe` must have models with an output for each of the "
                    f"{test.num_classes} classes or targets of `test`; got "
                    f"{num_outputs} outputs."
                )
            fitted = fit(prepared, model, recipe.inner, key=fit_key)
            found[-1].append(measure(fitted.model, prepared.loss, test))
            if progress:
                name = next(iter(found[-1][0][0]))
                mean = np.mean([values[name] for values, _ in found[-1]])
                bar.set_postfix({name: f"{mean:.4f}"})
    collect = lambda of: np.array([[of(*x) for x in row] for row in found])
    metrics = {
        name: collect(lambda values, _, name=name: values[name])
        for name in found[0][0][0]
    }
    per_class = collect(lambda _, per_class: per_class)
    return Evaluation(metrics, per_class, recipe, fitted, key)  # pyright: ignore[reportPossiblyUnboundVariable]


def _bar(num_models: int) -> Any:  # Checking an iterable's type would use it up.
    with needs("`progress=True`", "tqdm", "progress"):
        from tqdm.auto import tqdm
    return tqdm(range(num_models), desc="training models", unit="model")


@eqx.filter_jit  # Otherwise each layer of a network compiles several programs.
def _draw(models, distilled, init_key, draw_key):
    return models.draw(models.init(distilled, key=init_key), key=draw_key)
