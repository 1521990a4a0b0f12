"""Finds a few images that yield exactly the weights of a fit to all training data.

Fits a logistic regression to all training images. Then finds a few images, near real
ones, whose fit has the same weights. This takes no gradient of an outer loss and no
pass over the data. Finally, eqdistill and scikit-learn are fitted to these images from
scratch. Writes `exact.png`, with the images before and after and the weights of both
fits; and `exact.safetensors`, whose accuracy `python -m eqdistill check` measures
again.
"""

import argparse
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _common import run
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

import eqdistill as eqd


def main(
    dataset: str,
    n: int,
    intercept: bool,
    noise: bool,
    l2: float,
    seed: int,
    output: Path,
) -> None:
    train, test = eqd.datasets.load(dataset)
    p, c = train.images[0].size, train.num_classes
    untrained = eqd.linear.LogisticRegression(p, c, use_intercept=intercept)

    begin = time.perf_counter()
    everything = eqd.DistilledSet(train.floating(), train.labels, l2=l2)
    full = jax.block_until_ready(eqd.fit(everything, untrained).model)
    seconds_of_fit = time.perf_counter() - begin

    # Single precision would hide how well the weights agree.
    with jax.enable_x64(True):
        full, untrained = to_double(full), to_double(untrained)
        # `distill_exactly` finds the ridge: the ridge of the start has no effect.
        key = jr.key(seed)
        if noise:
            start = eqd.DistilledSet.from_noise(train, n, l2=0.1, scale=1 / p, key=key)
        else:
            start = eqd.DistilledSet.from_real(train, n, l2=0.1, key=key)
        start = to_double(start)
        begin = time.perf_counter()
        exact = jax.block_until_ready(eqd.linear.distill_exactly(start, full))
        seconds = time.perf_counter() - begin
        solver = eqd.linear.SpanSolver()
        refit = eqd.evaluate(exact, untrained, test, inner=solver)
        by_scikit_learn = fit_by_scikit_learn(exact, untrained)

        output.mkdir(parents=True, exist_ok=True)
        file, picture = output / "exact.safetensors", output / "exact.png"
        eqd.save(file, exact, refit, dataset=dataset)
        draw(start, exact, full, refit.fitted.model).savefig(picture)
        print(f"fit to all {len(train)} images: {seconds_of_fit:.1f} s")
        print(f"{n} images from its weights: {seconds:.1f} s, ridge {exact.l2:.3g}\n")
        print("| fitted to | by | test accuracy | error of the weights |")
        print("|---|---|---|---|")
        for rows in (
            (f"{len(train)} images", "eqdistill", full),
            (f"{n} images", "eqdistill", refit.fitted.model),
            (f"{n} images", "scikit-learn", by_scikit_learn),
        ):
            *names, model = rows
            print(
                f"| {' | '.join(names)} | {accuracy(model, test):.2%} "
                f"| {relative_error(model, full):.1e} |"
            )
    print(f"\nfiles {picture}, {file}")


def to_double(tree):
    return jax.tree.map(
        lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, tree
    )


def accuracy(model: eqd.linear.LinearClassifier, data: eqd.Dataset) -> float:
    logits = jax.vmap(model)(data.floating())
    return float(jnp.mean(jnp.argmax(logits, axis=1) == data.labels))


def relative_error(
    model: eqd.linear.LinearClassifier, want: eqd.linear.LinearClassifier
) -> float:
    """The relative error of the weights. Their mean over the classes is left out,
    because it has no effect."""
    weights, wanted = (
        k.head.weight - jnp.mean(k.head.weight, axis=0) for k in (model, want)
    )
    return float(jnp.linalg.norm(weights - wanted) / jnp.linalg.norm(wanted))


def fit_by_scikit_learn(
    distilled: eqd.DistilledSet, model: eqd.linear.LinearClassifier
) -> eqd.linear.LinearClassifier:
    """Repeats each image once for each class, with a weight of zero if the image is of
    another class: scikit-learn only has weights for classes that it has seen."""
    n, (c, _) = len(distilled), model.head.weight.shape
    fitted = SklearnLogisticRegression(
        C=1 / (n * float(distilled.l2)),
        fit_intercept=model.head.bias is not None,
        solver="newton-cg",
        tol=1e-12,
        max_iter=1000,
    ).fit(
        np.repeat(np.reshape(distilled.images, (n, -1)), c, axis=0),
        np.tile(np.arange(c), n),
        sample_weight=np.ravel(jax.nn.one_hot(distilled.labels, c)),
    )
    weight, bias = jnp.asarray(fitted.coef_), jnp.asarray(fitted.intercept_)
    return eqx.tree_at(
        lambda k: (k.head.weight, k.head.bias),
        model,
        (weight, bias if model.head.use_bias else None),
        is_leaf=lambda x: x is None,
    )


def draw(
    start: eqd.DistilledSet,
    exact: eqd.DistilledSet,
    full: eqd.linear.LinearClassifier,
    refit: eqd.linear.LinearClassifier,
) -> Figure:
    """Draws the first images and the weights of their classes, with a symmetric scale
    for each row."""
    shape = start.images.shape[1:]
    num_columns = min(len(start), 10)
    labels = np.asarray(start.labels[:num_columns])
    pixels = lambda k: np.reshape(k.head.weight[labels], (-1, *shape))
    rows = {
        "start": start.images[:num_columns],
        "exact": exact.images[:num_columns],
        "weights,\nall data": pixels(full),
        "weights,\nrefitted": pixels(refit),
    }
    figure = Figure(
        figsize=(0.8 * num_columns + 0.4, 3.6), dpi=200, layout="constrained"
    )
    axes = np.asarray(figure.subplots(len(rows), num_columns, squeeze=False))
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        limit = np.abs(images).max()
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image, cmap="gray_r", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(name, fontsize=8)
    for axis, label in zip(axes[0], labels, strict=True):
        axis.set_title(label, fontsize=9)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--dataset", default="mnist", choices=["mnist", "fashion_mnist", "digits"]
    )
    parser.add_argument(
        "--images", dest="n", type=int, default=10, help="number of images"
    )
    parser.add_argument("--intercept", action="store_true", help="add an intercept")
    parser.add_argument(
        "--noise", action="store_true", help="start from noise, not from real images"
    )
    parser.add_argument(
        "--l2", type=float, default=1e-5, help="the ridge of the fit to all images"
    )
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
