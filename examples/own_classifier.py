"""Distils for a custom model: here a multilayer perceptron.

Any `equinox.Module` that maps one image to its logits works. Perceptrons with initial
weights other than those used for the distillation are then trained on the images.
Writes `own_classifier.png` and `own_classifier_loss.png`.
"""

import argparse
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import eqdistill as eqd


class Perceptron(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, train: eqd.Dataset, width: int, *, key: PRNGKeyArray):
        # A smooth activation: the implicit function theorem uses the Hessian.
        sizes = train.images[0].size, train.num_classes, width, 1
        self.mlp = eqx.nn.MLP(*sizes, activation=jax.nn.softplus, key=key)

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " c"]:
        return self.mlp(image.reshape(-1))


def main(
    dataset: str, images_per_class: int, width: int, steps: int, output: Path
) -> None:
    start = time.perf_counter()
    train, test = eqd.datasets.load(dataset)
    noise_key, batch_key, *weight_keys = jr.split(jr.key(0), 5)
    model, *others = (Perceptron(train, width, key=key) for key in weight_keys)
    n = images_per_class * train.num_classes
    distilled = eqd.DistilledSet.from_noise(train, n, l2=0.01, scale=0.3, key=noise_key)
    result = eqd.distill(
        distilled,
        model,
        eqd.Batches(train, min(5000, len(train))),
        optimiser=optax.adam(optax.cosine_decay_schedule(0.05, steps)),
        steps=steps,
        key=batch_key,
        callbacks=[eqd.ProgressBar()],
    )
    own = eqd.evaluate(result.distilled, model, test)
    print(f"test accuracy   {own.accuracy:.2%} from the weights used to distil")
    for other in others:
        evaluation = eqd.evaluate(result.distilled, other, test)
        print(f"                {evaluation.accuracy:.2%} from other initial weights")
    print(f"time            {time.perf_counter() - start:.1f} s")

    output.mkdir(parents=True, exist_ok=True)
    images, loss = output / "own_classifier.png", output / "own_classifier_loss.png"
    eqd.plot.images(result.distilled).savefig(images)
    eqd.plot.history(result.history).savefig(loss)
    print(f"images          {images}, {loss}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help="or fashion_mnist, digits")
    parser.add_argument("--images-per-class", type=int, default=1)
    parser.add_argument("--width", type=int, default=32, help="hidden units")
    parser.add_argument("--steps", type=int, default=60, help="outer steps")
    parser.add_argument("--output", type=Path, default=Path("output"), help="a folder")
    args = parser.parse_args()
    # The next run loads what this one compiles.
    jax.config.update("jax_compilation_cache_dir", str(args.output / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(**vars(args))
