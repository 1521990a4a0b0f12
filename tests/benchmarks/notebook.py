"""Times this package against the program of JAXopt's dataset-distillation notebook.

Both solve the notebook's problem on all of MNIST, from the same starting images, for
50 outer steps. Each is run twice in this process: the first run compiles, the second
only runs. Prints a Markdown table: run on demand, by `python
tests/benchmarks/notebook.py`.
"""

import os
import platform
import time
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import eqdistill as eqd


warnings.simplefilter("ignore", DeprecationWarning)
from jaxopt import GradientDescent, objective  # noqa: E402


STEPS = 50


def notebook(train: eqd.Dataset, start: eqd.DistilledSet):
    """The notebook's cells, but for its loading of the data."""
    images_train = train.floating().reshape(-1, 28 * 28)
    labels_train = train.labels
    params = jnp.ones((28 * 28, 10))
    l2reg = 1e-1
    gd = GradientDescent(objective.l2_multiclass_logreg, tol=1e-3, maxiter=500)
    distilled_labels = jnp.arange(10)

    def outer_loss(img):
        inner_sol = gd.run(params, l2reg, (img, distilled_labels)).params
        return objective.l2_multiclass_logreg(
            inner_sol, 0, (images_train, labels_train)
        )

    gd_outer = GradientDescent(fun=outer_loss, tol=1e-3, maxiter=STEPS)

    def run():
        images = gd_outer.run(start.images.reshape(10, -1)).params
        return images.reshape(10, 28, 28)

    return run


def ours(train: eqd.Dataset, start: eqd.DistilledSet):
    classifier = eqd.LogisticRegression(784, 10)
    optimiser = optax.lbfgs(learning_rate=1.0, linesearch=None)

    def run():
        result = eqd.distill(start, classifier, train, optimiser=optimiser, steps=STEPS)
        return result.distilled.images

    return run


def timed(run):
    begin = time.perf_counter()
    images = jax.block_until_ready(run())
    return images, time.perf_counter() - begin


def main() -> None:
    train, test = eqd.datasets.load("mnist")
    classifier = eqd.LogisticRegression(784, 10)
    start = eqd.DistilledSet.from_noise(train, l2=0.1, key=jr.key(0))
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, {jax.devices()[0].platform}\n"
    )
    print("| program | outer loss | test accuracy | with compile | run only |")
    print("|---|---|---|---|---|")
    seconds = {}
    for name, make in (("the notebook", notebook), ("eqdistill", ours)):
        run = make(train, start)
        images, with_compile = timed(run)
        images, run_only = timed(run)
        times = [with_compile, run_only]
        distilled = eqx.tree_at(lambda d: d.images, start, images)
        loss = eqd.evaluate(distilled, classifier, train).loss
        accuracy = eqd.evaluate(distilled, classifier, test).accuracy
        seconds[name] = times
        print(
            f"| {name} | {loss:.4f} | {accuracy:.2%} | {times[0]:.1f} s "
            f"| {times[1]:.1f} s |"
        )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"| ratio | | | {ratios[0]:.1f} | {ratios[1]:.1f} |")


if __name__ == "__main__":
    main()
