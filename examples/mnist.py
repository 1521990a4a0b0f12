"""Distils MNIST into ten images: the experiment of JAXopt's notebook.

The inner problem is multiclass logistic regression on ten synthetic images, one per
class, with the ridge l2/2 ||W||^2. The outer loss is that of the fitted model on all
60,000 training images. Writes `distilled.png` and `loss.png`.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.random as jr
import optax

import eqdistill as eqd


def main(
    dataset: str, images_per_class: int, l2: float, steps: int, seed: int, output: Path
) -> None:
    start = time.perf_counter()
    train, test = eqd.datasets.load(dataset)
    num_pixels = train.images[0].size
    model = eqd.linear.LogisticRegression(num_pixels, train.num_classes)
    noise = eqd.DistilledSet.from_noise(
        train,
        images_per_class * train.num_classes,
        l2=l2,
        scale=1 / num_pixels,
        key=jr.key(seed),
    )
    result = eqd.distill(
        noise,
        model,
        train,
        # The outer loss is smooth, and each step uses all data: unit steps of L-BFGS
        # need no line search.
        optimiser=optax.lbfgs(learning_rate=1.0, linesearch=None),
        steps=steps,
        callbacks=[eqd.ProgressBar()],
    )
    on_train = eqd.evaluate(result.distilled, model, train)
    on_test = eqd.evaluate(result.distilled, model, test)
    seconds = time.perf_counter() - start

    output.mkdir(parents=True, exist_ok=True)
    eqd.plot.images(result.distilled).savefig(output / "distilled.png")
    eqd.plot.history(result.history).savefig(output / "loss.png")
    print(f"outer loss      {on_train.loss:.4f}")
    print(f"train accuracy  {on_train.accuracy:.2%}")
    print(f"test accuracy   {on_test.accuracy:.2%}")
    print(f"outer steps     {len(result.history)}")
    print(f"time            {seconds:.1f} s")
    print(f"images          {output / 'distilled.png'}, {output / 'loss.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--dataset", default="mnist", choices=["mnist", "fashion_mnist", "digits"]
    )
    parser.add_argument("--images-per-class", type=int, default=1)
    parser.add_argument("--l2", type=float, default=0.1, help="the ridge")
    parser.add_argument("--steps", type=int, default=50, help="outer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="the folder to write to"
    )
    args = parser.parse_args()
    # The next run loads what this one compiles.
    jax.config.update("jax_compilation_cache_dir", str(args.output / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(**vars(args))
