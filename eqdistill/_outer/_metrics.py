"""How well a model does on real data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Float, PyTree

from .._chunks import CHUNK_BYTES
from .._data._dataset import Dataset, map_images
from .._inner._inner_solver import stop_gradient
from .._losses import AbstractLoss, BinaryCrossEntropy, CrossEntropy, DefaultOuterLoss
from .._sharding import to_host
from ._data import find_cached, FullBatch


def measure(
    model: PyTree, loss: AbstractLoss, test: Dataset
) -> tuple[dict[str, float], Float[np.ndarray, " c"]]:
    """The metrics of a model that was fitted with `loss`, and the first one for each
    class: see [`eqdistill.Evaluation`][]."""
    model = eqx.nn.inference_mode(model)
    labels = to_host(test.labels)
    # The most likely class of a soft label counts as the correct one.
    is_class = not test.has_targets or isinstance(loss, CrossEntropy)
    weights = np.ones(len(test)) if test.weights is None else to_host(test.weights)
    centre = None
    if not is_class:
        mean = np.average(labels, axis=0, weights=weights.astype(np.float64))
        centre = jnp.asarray(mean, float)
    parts = {x.name: x for x in find_cached(model) if x.directory is not None}
    data = FullBatch(test, cached=[*parts.values()])
    value, sums = _means(model, loss, centre, data)
    sums = [np.asarray(x, np.float64) for x in sums]
    known = sums[1] > 0
    per_class = np.full(known.shape, np.nan)
    per_class[known] = sums[0][known] / sums[1][known]
    if is_class:
        # The second sum is one up to rounding. Divide, so that 100% is exactly one.
        metrics = {"accuracy": sums[0].sum() / sums[1].sum()}
        metrics["balanced accuracy"] = per_class[known].mean()
    elif isinstance(loss, BinaryCrossEntropy):
        outputs = map_images(model, test.images, test.sharding, CHUNK_BYTES)
        known = (labels > 0.5).any(axis=0)
        per_class = average_precision(to_host(outputs), labels, weights)
        metrics = {"mean average precision": _mean(per_class[known])}
    else:
        per_class = 1 - per_class
        metrics = {"R2": _mean(per_class[known]), "mean squared error": sums[0].mean()}
    metrics = {name: float(x) for name, x in {**metrics, "loss": value}.items()}
    return metrics, per_class


def _mean(columns: Float[np.ndarray, " known"]) -> float:
    return float(columns.mean()) if columns.size else np.nan


@eqx.filter_jit
def _means(model, loss, centre, data):
    args = DefaultOuterLoss(loss), model, centre
    return data.mean(_score, args, jnp.array(0), key=jr.key(0))


def _score(args, x, y):
    loss, network, centre = args
    # Not differentiated, so that chunks have only the activations of a forward pass.
    outputs = stop_gradient(network)(x)
    if centre is None:
        y_class = y if y.ndim == 0 else jnp.argmax(y)
        is_class = jax.nn.one_hot(y_class, len(outputs))
        is_right = (jnp.argmax(outputs) == y_class) & ~jnp.isnan(outputs).any()
        sums = is_class * is_right, is_class
    else:
        sums = (outputs - y) ** 2, (y - centre) ** 2
    scores = loss(outputs[None], y[None]), sums
    return jax.tree.map(lambda x: x.astype(jnp.result_type(float)), scores)


def average_precision(
    outputs: Float[np.ndarray, "N c"],
    targets: Float[np.ndarray, "N c"],
    weights: Float[np.ndarray, " N"],
) -> Float[np.ndarray, " c"]:
    """The average precision of each column. For each positive example, take the
    fraction of positives among the examples with an output at least as large, and
    average these fractions. NaN without positives, or if an output is NaN."""
    found = np.full(outputs.shape[1], np.nan)
    for k, (scores, truth) in enumerate(zip(outputs.T, targets.T, strict=True)):
        order = np.argsort(-scores, kind="stable")
        is_positive, scores = truth[order] > 0.5, scores[order]
        w = weights[order].astype(np.float64)
        # Examples with equal outputs share the rank of the last one.
        last = np.searchsorted(-scores, -scores, side="right") - 1
        precision = (np.cumsum(w * is_positive) / np.cumsum(w))[last]
        if is_positive.any() and not np.isnan(scores).any():
            found[k] = np.average(precision[is_positive], weights=w[is_positive])
    return found
