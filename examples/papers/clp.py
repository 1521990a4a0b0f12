"""The ablation of CLP-DD (Peng et al., *Closed-Form Linear-Probe Dataset Distillation
for Pre-trained Vision Models*, 2026) on small networks: which outer loss should score a
linear probe that is fitted in closed form to the distilled images?

The backbone is a convolutional network that is trained here on another dataset. The
outer loss is the squared error, or the cross-entropy with a learned temperature. The
images are learned as pixels or as an `eqdistill.Pyramid`, and the probe is fitted to
them or to augmented copies of them, as in Linear Gradient Matching. Prints the accuracy
of probes that are fitted in the same way, on the backbone that the images were
distilled for, and the mean over three backbones of another architecture. With copies,
each accuracy is the mean over five draws.
"""

import argparse
import itertools
import time
from pathlib import Path

import jax.random as jr
import numpy as np
import optax
from _common import adam, DATASETS, real_data, run
from probe import accuracy_of_all, BACKBONES, probe, UNSEEN

import eqdistill as eqd
from eqdistill import augment


LOSSES = {
    "squared error": eqd.SquaredError(),
    "cross-entropy": eqd.CrossEntropy(0.2),
}
AUGMENTATION = augment.Affine(shift=2, rotation=15, scale=1.2)


def main(
    dataset: str,
    data_dir: Path | None,
    pretraining: str,
    pretraining_steps: int,
    num_unseen: int,
    images: int,
    copies: int,
    steps: int,
    batch: int,
    learning_rate: float,
    held_out: float,
    seed: int,
    output: Path,
) -> None:
    source, _, _ = real_data(pretraining, data_dir)
    train, test, _ = real_data(dataset, data_dir, held_out=held_out)

    def make(network, number):
        return probe(
            "backbone",
            network,
            source,
            train,
            pretraining_steps,
            directory=output / "features",  # Where the next run finds them.
            key=jr.key(number),
        )

    home = make(BACKBONES["16-32-64"], 0)
    unseen = [make(UNSEEN, 100 + i) for i in range(num_unseen)]
    n = images * train.num_classes
    real = eqd.DistilledSet.from_real(train, n, l2=1e-3, key=jr.key(seed))
    real = real.with_targets(train.num_classes)
    data = eqd.Batches(train, batch, cached=[home.features.module])
    whole = [accuracy_of_all(model, train, test) for model in (home, *unseen)]
    on = "held-out" if held_out > 0 else "test"
    print(f"{on} accuracy; outer loss, images, fit to, home, unseen")
    report("all real images", whole)
    score = lambda distilled, fit, num: [
        eqd.evaluate(distilled, model, test, inner=fit, num_models=num).accuracy
        for model in (home, *unseen)
    ]
    report("same number of real images", score(real, eqd.AutoSolver(), 1))
    starts = {"pixels": real, "pyramid": eqd.Pyramid.from_distilled(real)}
    fits: dict[str, eqd.AbstractInnerSolver] = {
        "images": eqd.AutoSolver(),
        "copies": augment.AugmentedFit(AUGMENTATION, copies),
    }
    for loss, start, fit in itertools.product(LOSSES, starts, fits):
        began = time.process_time()
        result = eqd.distill(
            starts[start],
            eqd.Bilevel(home, fits[fit], LOSSES[loss]),
            data,
            optimiser=adam(optax.cosine_decay_schedule(learning_rate, steps)),
            learn=lambda start: start,
            learn_objective=lambda o: getattr(o.loss, "log_temperature", ()),
            steps=steps,
            key=jr.key(seed),
        )
        seconds = f"{time.process_time() - began:.0f} CPU-s"
        accuracies = score(result.distilled, fits[fit], 5 if fit == "copies" else 1)
        report(f"{loss}, {start}, {fit}", accuracies, seconds)


def report(name: str, accuracies: list[float], note: str = "") -> None:
    home, *unseen = accuracies
    std = np.std(unseen, ddof=1) if len(unseen) > 1 else 0.0
    row = f"{name:<34} {home:.2%}  {np.mean(unseen):.2%} ± {std:.2%}  {note}"
    print(row, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help=DATASETS)
    parser.add_argument(
        "--pretraining",
        default="fashion_mnist",
        help="the dataset that the backbones are trained on",
    )
    parser.add_argument(
        "--data-dir", type=Path, help="the folder with the files of both datasets"
    )
    parser.add_argument("--pretraining-steps", type=int, default=500)
    parser.add_argument("--num-unseen", type=int, default=3)
    parser.add_argument("--images", type=int, default=1, help="images per class")
    parser.add_argument("--copies", type=int, default=2, help="copies of each image")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=1000, help="real images per step")
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        help="a fraction of the training images to evaluate on, instead of the test "
        "images",
    )
    parser.add_argument("--seed", type=int, default=0)
    run(main, parser)
