"""Two processes with four simulated devices each, by `jax.distributed`."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

import eqdistill as eqd


@functools.cache
def problems():
    """A start, an objective and a function from a sharding to data: a linear model, a
    pool and an unrolled run."""
    train = eqd.datasets.load("digits")[0]
    train = eqd.Dataset(train.images[:601], train.labels[:601], 10)
    noise = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 64, key=jr.key(0))
    real = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0))
    model = eqd.linear.LogisticRegression(64, 10)
    make = functools.partial(eqd.nn.MLP, (8, 8), 10, widths=(16,))
    training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 5)
    full = lambda sharding: eqd.FullBatch(train, sharding=sharding)
    batches = lambda sharding: eqd.Batches(train, 99, sharding=sharding)
    pool = eqd.Bilevel(eqd.Pool(make, size=3, max_age=5))
    # A ridge at which rounding errors do not grow.
    strong = eqd.DistilledSet.from_real(train, l2=0.1, key=jr.key(0)).with_targets(10)
    return {
        "linear": (noise, eqd.Bilevel(model), full),
        "pool": (strong, pool, batches),
        "unrolled": (real, eqd.Bilevel(eqd.Fresh(make), training), batches),
    }


def run(port: str, index: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    losses = {}
    for kind, (start, objective, make_data) in problems().items():
        args = start, objective, make_data(sharding)
        checkpoints = [eqd.Checkpoints(f"{folder}/{kind}", every=20)]
        # The second run continues from a checkpoint of the first one.
        for steps in (20, 50):
            result = eqd.distill(
                *args, steps=steps, callbacks=checkpoints, key=jr.key(0)
            )
        losses[kind] = result.history.loss
    np.savez(f"{folder}/{index}.npz", **losses)


def run_processes(folder: Path) -> list:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.two_processes", port]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "NPROC": "8"}
    processes = [
        subprocess.Popen([*command, str(i), str(folder)], env=env) for i in range(2)
    ]
    for process in processes:
        assert process.wait(timeout=600) == 0
    return [np.load(folder / f"{i}.npz") for i in range(2)]


if __name__ == "__main__":
    run(*sys.argv[1:])
