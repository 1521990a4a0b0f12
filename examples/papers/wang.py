"""Reproduces Wang et al., Dataset distillation, 2018: images and step sizes of a short
training run of LeNet on MNIST, learned by differentiating the run.

- `--start known`: ten images for one known initialisation. The paper reaches 93.8%.
- `--start random`: a hundred images for random initialisations, with new weights in
  each outer step. The paper reaches 79.5 +- 8.1%, over 200 networks.
- `--start adapted`: a hundred images for networks that were trained on scikit-learn's
  digits, resized to 28 x 28. The paper uses USPS.

Each training step uses ten images, one per class, and has its own learned step size.
The training is by gradient descent, as in the paper, but with momentum: without it, the
steps must be so large that the run becomes chaotic and its derivative overflows.
`--adam` trains with Adam, which is better for random initial weights, and worse for
known ones. `--baseline-steps 200` compares random real images, class means and k-means,
with learned step sizes too, on the same networks.

Scaled to two cores: one initialisation in an outer step, where the paper averages over
several, and a real batch of 256.

Prints the test accuracy after the last step, over networks that were not used in the
distillation; plots the images, and saves an artifact.
"""

import argparse
import functools as ft
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import adam, maker, real_data, run

import eqdistill as eqd
from eqdistill import adjoints, nn, recipes


STARTS = ("known", "random", "adapted")
MOMENTUM = 0.9
# The number of networks trained on other digits, to distil with and to test on.
NUM_TRAINED = 10


def main(
    start: str,
    images: int,
    gradient_steps: int,
    by_adam: bool,
    steps: int,
    batch: int,
    learning_rate: float,
    held_out: float,
    num_networks: int,
    baseline_steps: int,
    dataset: str,
    seed: int,
    output: Path,
) -> None:
    train, test, standardisation = real_data(dataset, None, held_out=held_out)
    on = "held-out" if held_out > 0 else "test"
    output.mkdir(parents=True, exist_ok=True)
    n = images * train.num_classes
    make = unseen = maker(nn.LeNet, train)
    if start == "adapted":
        make, unseen = (trained_networks(train.shape, x) for x in (seed, seed + 1))
    by_rates = ft.partial(
        recipes.learned_rates,
        unseen,
        batch_size=train.num_classes,
        momentum=MOMENTUM,
        adam=by_adam,
        seed=seed if start == "known" else None,
    )
    rate = 0.003 if by_adam else 0.015
    training = by_rates(learning_rates=[rate] * gradient_steps).inner
    models = eqd.Fresh(make)
    if start == "known":
        models, num_networks = make(key=jr.key(seed)), 1
    data = eqd.Batches(train, batch)

    def distil(real: eqd.DistilledSet, steps: int, *, images: bool):
        """Learns the step sizes, and the images if `images` is true."""
        rate = optax.cosine_decay_schedule(learning_rate, steps)
        # Step sizes that grow fast make a run chaotic.
        optimiser = adam(rate, slower=60.0 if images else 3.0)
        return eqd.distill(
            real,
            eqd.Bilevel(models, training),
            data,
            optimiser=eqd.averaged(
                optax.chain(adjoints.clip_by_running_norm(), optimiser), decay=0.99
            ),
            learn=lambda start: start.images if images else (),
            learn_objective=lambda o: o.inner.log_hyperparameters,
            steps=steps,
            callbacks=[eqd.ProgressBar()],
            key=jr.key(seed),
        ).average()

    def evaluate(result):
        log_rates = result.objective.inner.log_hyperparameters["learning_rate"]
        return eqd.evaluate(
            result.distilled,
            by_rates(learning_rates=jnp.exp(log_rates)),
            test,
            num_models=num_networks,
            key=jr.key(seed + 1),
        )

    real = eqd.DistilledSet.from_real(train, n, l2=1e-8, key=jr.key(seed))
    began = time.perf_counter()
    result = distil(real, steps, images=True)
    print(f"outer steps       {steps}, {time.perf_counter() - began:.0f} s")
    found = evaluate(result)
    print(f"{on} accuracy, {num_networks} networks, {gradient_steps} steps:")
    print(f"distilled         {to_text(found.scores[0])}")
    if start == "adapted":
        untrained = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 1e-12}, 1)
        before = eqd.evaluate(
            real, eqd.Fresh(unseen), test, inner=untrained, num_models=num_networks
        )
        print(f"before            {to_text(before.scores[0])}")
    if baseline_steps > 0:
        sets = eqd.DistilledSet
        for name, choose in (
            ("random real", sets.from_real),
            ("class means", sets.from_class_means),
            ("k-means", sets.from_kmeans),
        ):
            own = choose(train, n, l2=1e-8, key=jr.key(seed))
            of_own = evaluate(distil(own, baseline_steps, images=False)).scores[0]
            more = found.scores[0] - of_own
            error = np.std(more, ddof=1) / np.sqrt(len(more)) if len(more) > 1 else 0.0
            print(
                f"{name:17s} {to_text(of_own)}; distilled is "
                f"{100 * more.mean():.1f} +- {100 * error:.1f} points above"
            )
    files = [output / f"wang_{start}.{end}" for end in ("png", "safetensors")]
    eqd.plot.images(result.distilled).savefig(files[0])
    eqd.save(
        files[1],
        result,
        found if on == "test" else None,
        preprocessing=standardisation,
        dataset=dataset,
        seed=seed,
    )
    print(f"files             {', '.join(map(str, files))}")


def to_text(accuracies: np.ndarray) -> str:
    std = f" +- {100 * np.std(accuracies, ddof=1):.1f}" if len(accuracies) > 1 else ""
    return f"{100 * accuracies.mean():.1f}{std}%"


def trained_networks(shape: tuple[int, ...], seed: int) -> Callable:
    """A constructor of networks that were trained on scikit-learn's digits: `key`
    chooses one of several."""
    digits, _ = eqd.datasets.load("digits")
    large = jax.image.resize(digits.floating(), (len(digits), *shape), "linear")
    large = eqd.Dataset(large, digits.labels, digits.num_classes)
    large = large.map(eqd.datasets.Standardisation.fit(large))
    everything = eqd.DistilledSet(large.images, large.labels, l2=1e-4)
    make = maker(nn.LeNet, large)
    training = recipes.supervised(make, updates=300).inner
    networks = [
        eqd.fit(everything, make(key=key), training, key=key).model
        for key in jr.split(jr.key(seed), NUM_TRAINED)
    ]
    arrays = [eqx.filter(network, eqx.is_array) for network in networks]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    rest = eqx.filter(networks[0], eqx.is_array, inverse=True)

    def choose(*, key: jax.Array):
        index = jr.randint(key, (), 0, NUM_TRAINED)
        return eqx.combine(jax.tree.map(lambda x: x[index], stacked), rest)

    return choose


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", default="known", choices=STARTS)
    parser.add_argument("--images", type=int, default=1, help="images per class")
    parser.add_argument(
        "--gradient-steps", type=int, default=40, help="number of training steps"
    )
    parser.add_argument(
        "--adam", action="store_true", dest="by_adam", help="train with Adam"
    )
    parser.add_argument("--steps", type=int, default=3200, help="outer steps")
    parser.add_argument("--batch", type=int, default=256, help="real images per step")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=0.06,
        help="the initial learning rate of the images",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        help="a fraction of the training images to evaluate on, instead of the test "
        "images",
    )
    parser.add_argument("--num-networks", type=int, default=100)
    parser.add_argument(
        "--baseline-steps",
        type=int,
        default=0,
        help="outer steps for the step sizes of the baselines; 0 skips them",
    )
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
