"""Distils MNIST into ten images for a linear probe on a frozen backbone.

The backbone is a convolutional network trained here on Fashion-MNIST: it stands in for
your own pre-trained network. Its features of the real images are computed once. Images,
targets and the ridge are learned. Prints the test accuracy of a probe fitted to the
distilled images, and of one fitted to the same number of real images.
`papers/probe.py` takes several backbones at once.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.random as jr
import optax

import eqdistill as eqd


def main(
    dataset: str, pretraining: str, images_per_class: int, steps: int, output: Path
) -> None:
    source, _ = eqd.datasets.load(pretraining)
    train, test = eqd.datasets.load(dataset)
    c = train.num_classes
    standardisation = eqd.datasets.Standardisation.fit(train)
    train, test = train.map(standardisation), test.map(standardisation)
    source = source.map(eqd.datasets.Standardisation.fit(source))

    network = partial(eqd.nn.ConvNet, source.shape, source.num_classes, norm=None)
    recipe = eqd.recipes.supervised(partial(network, widths=(16, 32, 64)), updates=500)
    real = eqd.DistilledSet(source.images, source.labels, l2=1.0)
    trained = eqd.evaluate(real, recipe, source, num_models=1).fitted.model
    last = eqd.linear.last_layer(trained)
    backbone = eqd.Cached(last.features, "backbone")
    head = eqd.linear.LogisticRegression(last.head.weight.shape[1], c).head
    probe = eqd.linear.LinearClassifier(backbone, head)

    n = images_per_class * c
    start = eqd.DistilledSet.from_real(train, n, l2=1e-3, key=jr.key(0)).with_targets(c)
    result = eqd.distill(
        start,
        probe,
        eqd.Batches(train, min(1000, len(train)), cached=[backbone]),
        optimiser=optax.adam(optax.cosine_decay_schedule(0.03, steps)),
        learn=lambda start: start,
        steps=steps,
        key=jr.key(0),
        callbacks=[eqd.ProgressBar()],
    )
    evaluation = eqd.evaluate(result.distilled, probe, test)
    print(f"test accuracy   {eqd.evaluate(start, probe, test)} with real images")
    print(f"                {evaluation} with distilled images")
    output.mkdir(parents=True, exist_ok=True)
    images, file = output / "probe.png", output / "probe.safetensors"
    eqd.plot.images(result.distilled).savefig(images)
    eqd.save(file, result, evaluation, preprocessing=standardisation, dataset=dataset)
    print(f"files           {images}, {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--pretraining", default="fashion_mnist")
    parser.add_argument("--images-per-class", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="the folder to write to"
    )
    args = parser.parse_args()
    # The next run loads what this one compiles.
    jax.config.update("jax_compilation_cache_dir", str(args.output / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(**vars(args))
