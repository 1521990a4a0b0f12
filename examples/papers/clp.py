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
import functools as ft
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import optax

import eqdistill as eqd
from eqdistill import augment, datasets, nn


HOME = ft.partial(nn.ConvNet, widths=(16, 32, 64), norm=None, size=32)
UNSEEN = ft.partial(nn.ConvNet, widths=(32, 32, 32), size=32)
LOSSES = {
    "squared error": eqd.SquaredError(),
    "cross-entropy": eqd.CrossEntropy(0.2),
}
AUGMENTATION = augment.Affine(shift=2, rotation=15, scale=1.2)


def main(args: argparse.Namespace) -> None:
    (source, _), (train, test) = map(load, (args.pretraining, args.dataset))
    if args.held_out:
        train, test = train.split(args.held_out, key=jr.key(0))
    # The next run finds the features of the real images there.
    make = ft.partial(
        probe,
        source=source,
        steps=args.pretraining_steps,
        num_classes=train.num_classes,
        directory=args.output / "features",
    )
    home = make(HOME, key=jr.key(0))
    unseen = [make(UNSEEN, key=jr.key(100 + i)) for i in range(args.num_unseen)]
    n = args.images * train.num_classes
    real = eqd.DistilledSet.from_real(train, n, l2=1e-3, key=jr.key(args.seed))
    real = real.with_targets(train.num_classes)
    data = eqd.Batches(train, args.batch, cached=[home.features.module])
    whole = [accuracy_of_all(model, train, test) for model in (home, *unseen)]
    on = "held-out" if args.held_out else "test"
    print(f"{on} accuracy; outer loss, images, fit to, home, unseen")
    report("all real images", whole)
    score = lambda distilled, fit, num: [
        eqd.evaluate(distilled, model, test, inner=fit, num_models=num).accuracy
        for model in (home, *unseen)
    ]
    report("as many real images", score(real, eqd.AutoSolver(), 1))
    starts = {"pixels": real, "pyramid": eqd.Pyramid.from_distilled(real)}
    fits: dict[str, eqd.AbstractInnerSolver] = {
        "images": eqd.AutoSolver(),
        "copies": augment.AugmentedFit(AUGMENTATION, args.copies),
    }
    for loss, start, fit in itertools.product(LOSSES, starts, fits):
        began = time.process_time()
        result = eqd.distill(
            starts[start],
            eqd.Bilevel(home, fits[fit], LOSSES[loss]),
            data,
            optimiser=adam(args.learning_rate, args.steps),
            learn=lambda start: start,
            learn_objective=lambda o: getattr(o.loss, "log_temperature", ()),
            steps=args.steps,
            key=jr.key(args.seed),
        )
        seconds = f"{time.process_time() - began:.0f} CPU-s"
        accuracies = score(result.distilled, fits[fit], 5 if fit == "copies" else 1)
        report(f"{loss}, {start}, {fit}", accuracies, seconds)


def load(dataset: str) -> tuple[eqd.Dataset, eqd.Dataset]:
    """Standardised training and test images."""
    if Path(dataset).is_dir():
        train = datasets.from_folder(Path(dataset, "train"))
        names = train.class_names
        test = datasets.from_folder(Path(dataset, "test"), class_names=names)
    else:
        train, test = datasets.load(dataset)
    standardise = datasets.Standardisation.fit(train)
    return train.map(standardise), test.map(standardise)


def probe(
    network: Callable,
    *,
    source: eqd.Dataset,
    steps: int,
    num_classes: int,
    directory: Path,
    key: jax.Array,
) -> eqd.linear.LinearClassifier:
    """A linear head on the features of a network that is trained on `source`."""
    make = ft.partial(network, source.shape, source.num_classes)
    recipe = eqd.recipes.supervised(make, updates=steps)
    everything = eqd.DistilledSet(source.images, source.labels, l2=1.0)
    few = eqd.Dataset(source.images[:100], source.labels[:100], source.num_classes)
    trained = eqd.evaluate(everything, recipe, few, num_models=1, key=key)
    last = eqd.linear.last_layer(trained.fitted.model)
    head = eqd.linear.LogisticRegression(int(last.head.in_features), num_classes).head
    features = eqd.Cached(last.features.module, "backbone", directory)
    return eqd.linear.LinearClassifier(features, head)


def accuracy_of_all(
    model: eqd.linear.LinearClassifier, train: eqd.Dataset, test: eqd.Dataset
) -> float:
    """The accuracy of ridge regression on all real images, in double precision."""
    part = model.features.module
    train, test = (
        data.map(part.features, directory=part.directory) for data in (train, test)
    )
    features = np.asarray(train.images, np.float64)
    moments = features.T @ features
    ridge = 1e-6 * np.trace(moments) * np.eye(len(moments))
    targets = np.eye(train.num_classes)[np.asarray(train.labels)]
    weight = np.linalg.solve(moments + ridge, features.T @ targets)
    predicted = np.argmax(np.asarray(test.images) @ weight, axis=1)
    return float(np.mean(predicted == np.asarray(test.labels)))


def adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam, ten times slower for all arrays but the images."""
    rate = optax.cosine_decay_schedule(learning_rate, steps)
    slow = optax.adam(lambda step: rate(step) / 10)
    name = lambda path: jax.tree_util.keystr(path[-1:], simple=True)
    part = lambda path, _: "images" if name(path) == "images" else "other"
    label = lambda learned: jax.tree.map_with_path(part, learned)
    return optax.partition({"images": optax.adam(rate), "other": slow}, label)


def report(name: str, accuracies: list[float], note: str = "") -> None:
    home, *unseen = accuracies
    std = np.std(unseen, ddof=1) if len(unseen) > 1 else 0.0
    row = f"{name:<34} {home:.2%}  {np.mean(unseen):.2%} ± {std:.2%}  {note}"
    print(row, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help="to distil")
    parser.add_argument("--pretraining", default="fashion_mnist", help="of backbones")
    parser.add_argument("--pretraining-steps", type=int, default=500)
    parser.add_argument("--num-unseen", type=int, default=3)
    parser.add_argument("--images", type=int, default=1, help="per class")
    parser.add_argument("--copies", type=int, default=2, help="of each image")
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
    parser.add_argument("--output", type=Path, default=Path("output"), help="a folder")
    main(parser.parse_args())
