"""The experiments of Wang et al., Dataset distillation, 2018: images and step sizes of
a short training run of LeNet on MNIST, which are learned through the run.

- `--start known`: ten images for one known initialisation. The paper reaches 93.8%.
- `--start random`: a hundred images for initialisations that are drawn anew in each
  outer step. The paper reaches 79.5 +- 8.1%, over 200 networks.
- `--start adapted`: a hundred images for networks that were trained on scikit-learn's
  digits, made 28 x 28; the paper takes USPS, which cannot be had here.

The training run takes ten images a step, one of each class, and a learned step size
for each step. The steps are those of gradient descent, as in the paper, but with
momentum: without, steps must be so large that the run becomes chaotic and its
derivative overflows. With `--adam` they are Adam's, which is better for initial
parameters that are drawn anew, and worse for known ones. With `--baseline-steps 200`
the same run of random real images, class means and k-means, whose step sizes are
learned too, is compared on the same networks.

Scaled to two cores: one initialisation in an outer step, where the paper averages over
several, and a real batch of 256.

Prints the test accuracy after the last step, over networks that were not seen in the
distillation; draws the images, and saves an artifact.
"""

import argparse
import functools as ft
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from architectures import adam, error_of_mean, real_data, run

import eqdistill as eqd
from eqdistill import nn, recipes


STARTS = ("known", "random", "adapted")
MOMENTUM = 0.9
# Networks that were trained on other digits: some to distil with, some to test on.
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
    make = unseen = nn.LeNet
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
    if start == "known":
        model = nn.LeNet(train.shape, train.num_classes, key=jr.key(seed))
        inner, num_networks = training, 1
    else:
        model = None
        inner = eqd.RandomInitialisation(make, training, num_classes=train.num_classes)
    data = eqd.Batches(train, batch)

    def distil(real: eqd.DistilledSet, steps: int, *, all_of_it: bool):
        nothing = jax.tree.map(lambda _: False, real)
        learn = eqx.tree_at(lambda d: d.images, nothing, all_of_it)
        rate = optax.cosine_decay_schedule(learning_rate, steps)
        result = eqd.distill(
            real,
            model,
            data,
            inner=inner,
            optimiser=eqd.averaged(
                optax.chain(
                    eqd.clip_by_running_norm(),
                    # Step sizes that grow fast make a run chaotic.
                    adam(rate, slower=60.0 if all_of_it else 3.0),
                ),
                decay=0.99,
            ),
            learn=(learn, True),
            steps=steps,
            callbacks=[eqd.ProgressBar()],
            key=jr.key(seed),
        )
        # Each step has another network, or other real images.
        return eqd.average_of(result)

    def evaluate(result: eqd.Distillation):
        own = result.inner
        if isinstance(own, eqd.RandomInitialisation):
            own = own.inner
        assert isinstance(own, eqd.UnrolledSolver)
        rates = jnp.exp(own.log_hyperparameters["learning_rate"])
        recipe = by_rates(learning_rates=rates)
        found = recipes.evaluate(
            result.distilled,
            recipe,
            test,
            num_networks=num_networks,
            key=jr.key(seed + 1),
        )
        return recipe, found

    real = eqd.DistilledSet.from_real(train, n, l2=1e-8, key=jr.key(seed))
    began = time.perf_counter()
    result = distil(real, steps, all_of_it=True)
    print(f"outer steps       {steps}, {time.perf_counter() - began:.0f} s")
    recipe, found = evaluate(result)
    print(f"{on} accuracy, {num_networks} networks, by {gradient_steps} steps:")
    print(f"distilled         {to_text(found.accuracies[0])}")
    if start == "adapted":
        untrained = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 1e-12}, 1)
        before = [
            float(
                eqd.evaluate(
                    real,
                    unseen(train.shape, train.num_classes, key=jr.key(i)),
                    test,
                    untrained,
                ).accuracy
            )
            for i in range(num_networks)
        ]
        print(f"before            {to_text(np.array(before))}")
    if baseline_steps > 0:
        sets = eqd.DistilledSet
        for name, choose in (
            ("random real", sets.from_real),
            ("class means", sets.from_class_means),
            ("k-means", sets.from_kmeans),
        ):
            own = choose(train, n, l2=1e-8, key=jr.key(seed))
            _, of_own = evaluate(distil(own, baseline_steps, all_of_it=False))
            more = found.accuracies[0] - of_own.accuracies[0]
            error = error_of_mean(more)
            print(
                f"{name:17s} {to_text(of_own.accuracies[0])}; distilled is "
                f"{100 * more.mean():.1f} +- {100 * error:.1f} points above"
            )
    files = [output / f"wang_{start}.{end}" for end in ("png", "safetensors")]
    eqd.plot.images(result.distilled).savefig(files[0])
    eqd.save(
        files[1],
        result,
        recipe,
        found if on == "test" else None,
        preprocessing=standardisation,
        dataset=dataset,
        seed=seed,
    )
    print(f"files             {', '.join(map(str, files))}")


def to_text(accuracies: np.ndarray) -> str:
    deviation = (
        f" +- {100 * np.std(accuracies, ddof=1):.1f}" if len(accuracies) > 1 else ""
    )
    return f"{100 * accuracies.mean():.1f}{deviation}%"


def trained_networks(shape: tuple[int, ...], seed: int):
    """Makes a network that was trained on scikit-learn's digits: one of several, which
    the key chooses."""
    digits, _ = eqd.datasets.load("digits")
    small = digits.floating()
    large = jax.image.resize(small, (len(digits), *shape), "linear")
    large = eqd.Dataset(large, digits.labels, digits.num_classes)
    large = large.map(eqd.Standardisation.fit(large))
    everything = eqd.DistilledSet(large.images, large.labels, l2=1e-4)
    training = recipes.supervised(nn.LeNet, updates=300).inner
    fit = lambda key: (
        eqd.fit(
            everything, nn.LeNet(shape, digits.num_classes, key=key), training, key=key
        ).model
    )
    networks = [fit(key) for key in jr.split(jr.key(seed), NUM_TRAINED)]
    is_array = eqx.is_array
    arrays = [eqx.filter(network, is_array) for network in networks]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    rest = eqx.filter(networks[0], is_array, inverse=True)

    def make(shape: tuple[int, ...], num_classes: int, *, key: jax.Array):
        index = jr.randint(key, (), 0, NUM_TRAINED)
        return eqx.combine(jax.tree.map(lambda x: x[index], stacked), rest)

    return make


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", default="known", choices=STARTS)
    parser.add_argument("--images", type=int, default=1, help="images a class")
    parser.add_argument(
        "--gradient-steps", type=int, default=40, help="steps of the training run"
    )
    parser.add_argument(
        "--adam", action="store_true", dest="by_adam", help="train by Adam"
    )
    parser.add_argument("--steps", type=int, default=3200, help="outer steps")
    parser.add_argument("--batch", type=int, default=256, help="real images a step")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=0.06,
        help="of all that is learned, at first",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        help="a fraction of the training images to evaluate on, in place of the test "
        "images",
    )
    parser.add_argument("--num-networks", type=int, default=100)
    parser.add_argument(
        "--baseline-steps",
        type=int,
        default=0,
        help="outer steps for the step sizes of the baselines; 0 leaves these out",
    )
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
