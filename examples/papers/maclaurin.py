"""Reproduces Maclaurin et al., Gradient-based hyperparameter optimization through
reversible learning, 2015, on MNIST:

- Ten images for logistic regression, learned from blank ones (Section 3.3; the paper
  shows the images, but gives no accuracy). The training run is reversed exactly.
- A schedule of step sizes for each layer of a 784-50-50-50-10 network (Section 3.1),
  compared with the best constant step size, by the training loss of networks and
  batches that were not used to learn it.

Scaled to two cores: the outer loss of the schedules uses a batch of 1,000 images.

Prints the results, and plots the images and the schedules.
"""

import argparse
import functools as ft
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import maker, real_data, run
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import eqdistill as eqd
from eqdistill import adjoints, nn


network = ft.partial(nn.MLP, widths=(50, 50, 50), activation=jnp.tanh)
MOMENTUM = 0.9


def main(
    dataset: str,
    images_steps: int,
    gradient_steps: int,
    schedule_steps: int,
    batch: int,
    num_networks: int,
    seed: int,
    output: Path,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if images_steps > 0:
        learn_images(dataset, images_steps, seed, output)
    if schedule_steps > 0:
        learn_schedules(
            dataset, gradient_steps, schedule_steps, batch, num_networks, seed, output
        )


def learn_images(dataset: str, steps: int, seed: int, output: Path) -> None:
    train, test = eqd.datasets.load(dataset)
    blank = jnp.zeros((train.num_classes, *train.shape))
    start = eqd.DistilledSet(blank, jnp.arange(train.num_classes), l2=1e-3)
    model = eqd.linear.LogisticRegression(math.prod(train.shape), train.num_classes)
    inner = adjoints.ReversibleSolver(0.05, momentum=0.9, steps=100)
    began = time.perf_counter()
    result = eqd.distill(
        start,
        eqd.Bilevel(model, inner),
        train,
        optimiser=optax.adam(optax.cosine_decay_schedule(0.05, steps)),
        steps=steps,
        callbacks=[eqd.ProgressBar()],
    )
    found = eqd.evaluate(result.distilled, model, test, inner=inner)
    seconds = time.perf_counter() - began
    print(f"ten images from blank, {steps} outer steps, {seconds:.0f} s")
    print(f"test accuracy             {100 * found.accuracy:.1f}%")
    eqd.plot.images(result.distilled).savefig(output / "maclaurin_images.png")


def by_layer(learning_rate: jax.Array) -> optax.GradientTransformation:
    """Momentum with a step size for each layer, or for each layer and step."""

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        rates = learning_rate[:, state] if learning_rate.ndim == 2 else learning_rate
        # Each layer has a matrix and a vector.
        leaves = [-rates[i // 2] * x for i, x in enumerate(leaves)]
        return jax.tree.unflatten(structure, leaves), state + 1

    scale = optax.GradientTransformation(lambda params: jnp.array(0), update)
    return optax.chain(optax.trace(MOMENTUM), scale)


def learn_schedules(
    dataset: str,
    gradient_steps: int,
    steps: int,
    batch: int,
    num_networks: int,
    seed: int,
    output: Path,
) -> None:
    train, _, _ = real_data(dataset, None)
    # The inner problem uses all training images, in batches.
    everything = eqd.DistilledSet(train.images, train.labels, l2=1e-8)
    layers = len(network.keywords["widths"]) + 1
    models = eqd.Fresh(maker(network, train))

    def solver(rates: np.ndarray | jax.Array) -> eqd.UnrolledSolver:
        of_make = {"learning_rate": rates}
        return eqd.UnrolledSolver(by_layer, of_make, gradient_steps, batch_size=batch)

    def training_loss(rates) -> np.ndarray:
        """The losses of networks and batches that were not used to learn the rates."""
        found = eqd.evaluate(
            everything,
            models,
            train,
            inner=solver(rates),
            num_models=num_networks,
            key=jr.key(seed + 1),
        )
        return found.metrics["loss"][0]

    constants = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2)
    of_constants = {}
    for rate in constants:
        of_constants[rate] = training_loss(np.full((layers, gradient_steps), rate))
        print(
            f"constant {rate:<6g}           {to_text(of_constants[rate])}", flush=True
        )
    best = min(constants, key=lambda rate: of_constants[rate].mean())
    began = time.perf_counter()
    result = eqd.distill(
        everything,
        eqd.Bilevel(models, solver(np.full((layers, gradient_steps), best))),
        eqd.Batches(train, min(1000, len(train))),
        optimiser=optax.chain(
            adjoints.clip_by_running_norm(),
            optax.adam(optax.cosine_decay_schedule(0.05, steps)),
        ),
        learn=lambda start: (),
        learn_objective=lambda o: o.inner.log_hyperparameters,
        steps=steps,
        callbacks=[eqd.ProgressBar()],
        key=jr.key(seed),
    )
    rates = learned_rates(result)
    learned = training_loss(rates)
    print(f"schedules, {steps} outer steps, {time.perf_counter() - began:.0f} s")
    print(f"learned                   {to_text(learned)}")
    more = of_constants[best] - learned
    error = np.std(more, ddof=1) / np.sqrt(len(more)) if len(more) > 1 else 0.0
    print(f"below the best constant   {more.mean():.4f} +- {error:.4f}, paired")
    draw(rates, best).savefig(output / "maclaurin_schedules.png")
    print(
        f"files {output / 'maclaurin_images.png'}, {output / 'maclaurin_schedules.png'}"
    )


def learned_rates(result) -> np.ndarray:
    return np.exp(result.objective.inner.log_hyperparameters["learning_rate"])


def to_text(losses: np.ndarray) -> str:
    std = f" +- {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
    return f"training loss {losses.mean():.4f}{std}"


def draw(rates: np.ndarray, constant: float) -> Figure:
    """One panel for each layer: the lines cross too often to share one."""
    layers = len(rates)
    figure = Figure(figsize=(6.5, 1.1 * layers + 0.6), dpi=150, layout="constrained")
    axes = np.ravel(figure.subplots(layers, 1, sharex=True, sharey=True, squeeze=False))
    for i, (axis, own) in enumerate(zip(axes, rates, strict=True)):
        axis.axhline(
            constant, color="0.5", linestyle="--", linewidth=1, label="best constant"
        )
        axis.plot(own, color="black", linewidth=1.2, label="learned")
        axis.set(yscale="log", ylabel=f"layer {i + 1}")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step of the training")
    figure.supylabel("step size", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper right", frameon=False, fontsize=8, ncols=2
    )
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument(
        "--images-steps", type=int, default=300, help="outer steps for the images"
    )
    parser.add_argument(
        "--gradient-steps",
        type=int,
        default=100,
        help="training steps of a network",
    )
    parser.add_argument(
        "--schedule-steps", type=int, default=300, help="outer steps for the schedules"
    )
    parser.add_argument("--batch", type=int, default=250, help="images per step")
    parser.add_argument("--num-networks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
