"""Times convolutional networks with the layers of Equinox and of `eqdistill.nn`.

XLA's convolutions are slow on a CPU if their derivative is in a loop or a branch, or if
their image has one channel or is smaller than the kernel. Its average pooling is slow
too. The network has three blocks of a convolution, a ReLU and pooling, with 16, 32 and
64 channels, on images of 28 x 28. Also timed are steps of L-BFGS in the loop of
`ArgminSolver` and called one by one, and the steps of a pool and their parts.

Prints Markdown tables of medians, and writes `networks.json`. Run it with `python
tests/benchmarks/networks.py`.
"""

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
from _timing import machine, parser, print_table, write

import eqdistill as eqd


def conv_net(key: jax.Array) -> eqx.nn.Sequential:
    keys = jr.split(key, 4)
    layers = [eqx.nn.Lambda(lambda image: image[None])]
    for key, before, width in zip(keys[:3], (1, 16, 32), (16, 32, 64), strict=True):
        convolution = eqx.nn.Conv2d(before, width, 3, padding=1, key=key)
        layers += [convolution, eqx.nn.Lambda(jax.nn.relu), eqx.nn.AvgPool2d(2, 2)]
    head = eqx.nn.Linear(9 * 64, 10, key=keys[3])
    return eqx.nn.Sequential([*layers, eqx.nn.Lambda(jnp.ravel), head])


def cases(
    network: eqx.nn.Sequential, wide: Callable, real: eqd.Dataset
) -> dict[str, tuple]:
    """Names, and a compiled function, its arguments, and its number of steps."""
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images, labels = real.floating()[:10], jnp.arange(10)

    def forward(params, images):
        return jax.vmap(eqx.combine(params, static))(images)

    def loss(params, images):
        return eqd.CrossEntropy()(forward(params, images), labels)

    def step(params, images):
        gradient = jax.grad(loss)(params, images)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)

    def train(params, images, length):
        body = lambda params, _: (step(params, images), None)
        return jax.lax.scan(body, params, length=length)[0]

    def switch(index, params, images):
        branches = [lambda p: step(p, images), lambda p: step(p, 2 * images)]
        return jax.lax.switch(index, branches, params)

    through = jax.grad(lambda images: loss(train(params, images, 10), images))
    both = jax.vmap(step, (0, None))
    two = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params)
    many = real.floating()[:256]
    convolve = eqx.filter_jit(lambda wide, images: jax.vmap(wide)(images))
    wide_args = wide, jnp.ones((10, 512, 2, 2))
    scan = jax.jit(lambda p, x: train(p, x, 20))
    return {
        "a gradient step of ten images": (jax.jit(step), (params, images), 1),
        "the same in `scan`": (scan, (params, images), 20),
        "the same in `switch`": (jax.jit(switch), (0, params, images), 1),
        "the same of two networks": (jax.jit(both), (two, images), 1),
        "the same, differentiated": (jax.jit(through), (images,), 10),
        "the forward pass of 256": (jax.jit(forward), (params, many), 1),
        "512 channels of 2 x 2 pixels, by 3 x 3": (convolve, wide_args, 1),
    }


def cpu_milliseconds(cases: list[tuple], repeats: int) -> list[float]:
    """CPU time of one step of each case, in turn. Not wall time, because only some
    cases use both cores."""
    for run, args, _ in cases:
        jax.block_until_ready(run(*args))
    times = []
    for _ in range(repeats):
        times.append([])
        for run, args, steps in cases:
            begin = time.process_time()
            jax.block_until_ready(run(*args))
            times[-1].append(1e3 * (time.process_time() - begin) / steps)
    return np.median(times, axis=0).tolist()


def convolutions(real: eqd.Dataset, repeats: int) -> dict[str, list[float]]:
    wide = eqx.nn.Conv2d(512, 512, 3, padding=1, key=jr.key(1))
    library = conv_net(jr.key(0)), wide
    slow, fast = cases(*library, real), cases(*eqd.nn.fast_convolutions(library), real)
    rows = {k: cpu_milliseconds([slow[k], fast[k]], repeats) for k in slow}
    print(f"CPU-milliseconds, medians of {repeats} runs:")
    table = [[k, f"{x:.1f}", f"{y:.1f}", f"{x / y:.1f}"] for k, (x, y) in rows.items()]
    print_table(["", "`equinox.nn`", "`eqdistill.nn`", "ratio"], table)
    return rows


def argmin(real: eqd.Dataset, repeats: int) -> dict[str, float]:
    """CPU-milliseconds of thirty steps of L-BFGS, in a loop and one by one."""
    steps = 30
    distilled = eqd.DistilledSet(real.floating()[:10], jnp.arange(10), l2=1e-3)
    network = eqd.nn.fast_convolutions(conv_net(jr.key(0)))
    minimiser = eqd.adjoints.LBFGS(rtol=0.0, atol=0.0)
    inner = eqd.ArgminSolver(minimiser, max_steps=steps)
    params, static = eqx.partition(network, eqd.nn.parameters(network))
    tags = frozenset()

    def loss(params, distilled):
        return eqd.inner_loss(distilled, eqx.combine(params, static)), None

    @jax.jit
    def step(params, state):
        params, state, _ = minimiser.step(loss, params, distilled, {}, state, tags)
        return params, state

    init = jax.jit(lambda p: minimiser.init(loss, p, distilled, {}, None, None, tags))

    def one_by_one():
        found, state = params, init(params)
        for _ in range(steps):
            found, state = step(found, state)
        return jax.block_until_ready(found)

    def in_a_loop():
        fitted = eqd.fit(distilled, network, inner, throw=False)
        assert int(fitted.stats["steps"]) == steps
        return jax.block_until_ready(fitted.gradient_norm)

    timed = [(one_by_one, (), 1), (in_a_loop, (), 1)]
    first, second = cpu_milliseconds(timed, repeats)
    print(
        f"The fit of this network to ten images, {steps} steps of L-BFGS, takes "
        f"{second:.0f} ms of `ArgminSolver`, {second / first:.2f} times the "
        f"{first:.0f} ms of the same steps called one by one.\n"
    )
    return {"one by one": first, "ArgminSolver": second}


def pool(
    real: eqd.Dataset, batch: int, norm: Callable | None, repeats: int
) -> dict[str, float]:
    """CPU-milliseconds of an outer step with a pool, of its parts, and of the FLOPs of
    the real images' forward pass in one large product."""
    start = eqd.DistilledSet(real.images[:10], real.labels[:10], l2=1e-3)
    start = start.with_targets(10)
    images, labels = start.images, start.labels
    settings = {"widths": (16, 32, 64), "norm": norm, "size": 32}
    make = ft.partial(eqd.nn.ConvNet, (28, 28), 10, **settings)
    args = {"optimiser": optax.adam(0.01), "learn": lambda start: start}
    problem = eqd.Problem(start, eqd.Bilevel(eqd.Pool(make)), **args)
    update = jax.jit(lambda state, data: problem.step(state, data), donate_argnums=0)
    state, data = problem.init(key=jr.key(0)), eqd.Batches(real, batch)

    def step():
        nonlocal state
        state, metrics = update(state, data)
        return metrics

    network = make(key=jr.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    chunk = 128
    optimiser = optax.adam(1e-3)

    @jax.jit
    def forward(params, x):
        features = eqx.combine(params, static).layers[:-1]
        return jax.lax.map(features, x, batch_size=chunk)

    @jax.jit
    def train(params, state):
        loss = lambda p: start.loss(jax.vmap(eqx.combine(p, static))(images), labels)
        updates, state = optimiser.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    @jax.jit
    @jax.grad
    def fit_and_adjoint(images, params):
        distilled = eqx.tree_at(lambda d: d.images, start, images)
        model = eqd.linear.last_layer(eqx.combine(params, static))
        solver = eqd.linear.RelativeRidge()
        fitted, _ = solver(distilled, model, None, key=jr.key(0))
        return jnp.sum(fitted.model.head.weight)

    side = 2048
    square = jnp.ones((side, side))
    costs = forward.lower(params, real.images[:chunk]).compile().cost_analysis()
    assert costs is not None
    share = batch / chunk * costs["flops"] / (2 * side**3)
    args = params, real.images[:batch]
    timed = {
        "an outer step": (step, (), 1),
        "the forward pass of the real images": (forward, args, 1),
        "the fit and its derivative": (fit_and_adjoint, (images, params), 1),
        "the step of the pool": (train, (params, optimiser.init(params)), 1),
        "": (jax.jit(jnp.matmul), (square, square), 1),
    }
    found = cpu_milliseconds(list(timed.values()), repeats)
    rows = dict(zip(timed, found, strict=True))
    limit = share * rows.pop("")
    rows["the FLOPs of that pass in one product"] = limit
    rows["the step over the product"] = rows["an outer step"] / limit
    return rows


def pools(real: eqd.Dataset, repeats: int) -> dict[str, dict[str, float]]:
    """Times several pools, and prints a table."""
    real = real.map(eqd.datasets.Standardisation.fit(real))
    columns = {
        "128 real images": pool(real, 128, None, repeats),
        "1,024 real images": pool(real, 1024, None, repeats),
        "instance norm, 128": pool(real, 128, eqd.nn.instance_norm, repeats),
    }
    print("A pool of one architecture, padded to 32 x 32:")
    names = columns["128 real images"]
    table = [[k, *(f"{c[k]:.1f}" for c in columns.values())] for k in names]
    print_table(["", *columns], table)
    return columns


def main(repeats: int, output: Path) -> None:
    real, _ = eqd.datasets.load("mnist")
    results: dict[str, object] = {"machine": machine()}
    for measure in (convolutions, argmin, pools):
        results[measure.__name__] = measure(real, repeats)
    write(results, output / "networks.json")


if __name__ == "__main__":
    main(**vars(parser(__doc__, repeats=9).parse_args()))
