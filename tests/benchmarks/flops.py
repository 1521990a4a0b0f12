"""The FLOPs of an outer step on CIFAR-10, as XLA counts them: what a GPU would change.

The pool is that of `examples/papers/networks.py --pool wide --share 8 --batch 512`, of
64, 128 and 256 channels; and one of FRePo's own 128, 256 and 512. A step is the forward
pass of its share of the real images, the fit to the distilled images and its
derivative, and its share of the training of the network. Prints Markdown tables. The
last column is an estimate: the number of steps in an hour on a GPU that reaches
`--tflops` TFLOP/s.
"""

import argparse
import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _timing import print_table

import eqdistill as eqd


SHAPE, CLASSES, BATCH, SHARE = (3, 32, 32), 10, 512, 8
WIDTHS = {"wide": (64, 128, 256), "FRePo's": (128, 256, 512)}


def flops(fn, *args) -> float:
    costs = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert costs is not None
    return costs["flops"]


def of_step(widths: tuple[int, ...], images: int) -> tuple[float, float, float]:
    """Those of the forward pass, the fit with its derivative, and the training."""
    make = ft.partial(eqd.nn.ConvNet, SHAPE, CLASSES, widths=widths, norm=None)
    params, static = eqx.partition(make(key=jr.key(0)), eqx.is_inexact_array)
    n = images * CLASSES
    x = jr.normal(jr.key(1), (n, *SHAPE))
    y = jax.nn.one_hot(jnp.arange(n) % CLASSES, CLASSES)
    start = eqd.DistilledSet(x, y, l2=1e-3, loss=eqd.SquaredError())

    def forward(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    def fitted(x):
        distilled = eqx.tree_at(lambda d: d.images, start, x)
        model = eqd.linear.last_layer(eqx.combine(params, static))
        solver = eqd.linear.RelativeRidge()
        fit, _ = solver(distilled, model, None, key=jr.key(0))
        return jnp.sum(fit.model.head.weight)

    def loss(params):
        return start.loss(forward(params, x), y)

    return (
        BATCH / n * flops(forward, params, x) / SHARE,
        flops(jax.grad(fitted), x),
        flops(jax.grad(loss), params) / SHARE,
    )


def main(tflops: float) -> None:
    header = ["pool", "images per class", "real images", "fit", "training", "GFLOP"]
    rows = []
    for name, widths in WIDTHS.items():
        for images in (1, 10, 50):
            parts = of_step(widths, images)
            steps = 3600 * tflops * 1e12 / sum(parts)
            numbers = [f"{part / 1e9:.1f}" for part in (*parts, sum(parts))]
            rows.append([name, str(images), *numbers, f"{steps:,.0f}"])
    print_table([*header, f"steps in an hour at {tflops:g} TFLOP/s"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tflops", type=float, default=10)
    main(**vars(parser.parse_args()))
