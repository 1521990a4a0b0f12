"""Runs on MNIST that are killed at a random moment and resume from their checkpoints.
The images must be bit for bit those of a run that was not killed."""

import argparse
import functools
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax

import eqdistill as eqd
from eqdistill.augment import Affine
from eqdistill.datasets import Standardisation


STEPS = 60
EVERY = 5


def _linear(train):
    train, held_out = train.split(0.1, key=jr.key(2))
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 784, key=jr.key(0))
    stopping = eqd.EarlyStopping(held_out, every=3, patience=STEPS)
    return start, eqd.linear.LogisticRegression(784, 10), train, (stopping,)


def _pool(train):
    train = train.map(Standardisation.fit(train))
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0)).with_targets(10)
    make = functools.partial(eqd.nn.ConvNet, (28, 28), 10, widths=(8, 16))
    augmentation = Affine(shift=1, rotation=10)
    data = eqd.Batches(train, 100, balanced=True, augmentation=augmentation)
    return start, eqd.Pool(make, size=4, max_age=8), data, ()


def _unrolled(train):
    start = eqd.DistilledSet.from_real(train, 20, l2=1e-3, key=jr.key(0))
    training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 5, batch_size=10)
    make = functools.partial(eqd.nn.MLP, (28, 28), 10)
    return start, eqd.Bilevel(eqd.Fresh(make), training), eqd.Batches(train, 100), ()


class _Rows:
    """Batches of MNIST, one after another."""

    def __init__(self, train):
        self.images, self.labels = np.asarray(train.images), np.asarray(train.labels)

    def __getitem__(self, step):
        rows = slice(1000 * step, 1000 * step + 1000)
        return self.images[rows], self.labels[rows]


def _stream(train):
    start, model, _, _ = _linear(train)
    return start, model, eqd.datasets.Stream(_Rows(train), 10), ()


KINDS = {"linear": _linear, "pool": _pool, "unrolled": _unrolled, "stream": _stream}


def distil(kind: str, folder: str | None, output: str) -> None:
    train, _ = eqd.datasets.load("mnist")
    start, objective, data, callbacks = KINDS[kind](train)
    if folder is not None:
        callbacks += (eqd.Checkpoints(folder, every=EVERY),)
    schedule = optax.adam(optax.cosine_decay_schedule(0.02, STEPS))
    args = {"optimiser": eqd.averaged(schedule, 0.95), "steps": STEPS, "key": jr.key(1)}
    args["learn"] = lambda s: (s.images, s.log_l2)
    result = eqd.distill(start, objective, data, callbacks=callbacks, **args)
    trees = (result.start, result.average().start, result.history)
    np.savez(output, *jax.tree.leaves(eqx.filter(trees, eqx.is_array_like)))


def command(kind: str, *paths: str) -> list[str]:
    return [sys.executable, "-m", "tests.killed_runs", "--kind", kind, *paths]


def kill(process: subprocess.Popen, folder: Path, rng: random.Random) -> list[str]:
    """Kills a process at a random moment, and returns the names in its folder. The
    moment is after a random checkpoint, within the time of some steps or of another
    checkpoint."""
    last = folder / str(rng.randrange(EVERY, STEPS - EVERY, EVERY))
    while not last.exists():
        time.sleep(0.001)
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended before {last}.")
    time.sleep(rng.uniform(0, 0.15))
    process.kill()  # SIGKILL.
    process.wait()
    return sorted(entry.name for entry in folder.iterdir())


def same(path: Path, other: Path) -> bool:
    with np.load(path) as a, np.load(other) as b:
        return a.files == b.files and all(
            a[name].tobytes() == b[name].tobytes() for name in a.files
        )


def compare(runs: int) -> bool:
    """Whether all killed runs end with the bits of the others."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        for i in range(runs):
            kind = list(KINDS)[i % len(KINDS)]
            whole, output = root / f"{kind}.npz", root / f"{i}.npz"
            if not whole.exists():
                subprocess.run(command(kind, "--output", str(whole)), check=True)
            folder = root / str(i)
            paths = ("--output", str(output), "--folder", str(folder))
            found = kill(subprocess.Popen(command(kind, *paths)), folder, rng)
            assert not output.exists()
            subprocess.run(command(kind, *paths), check=True)
            if not same(output, whole):
                print(f"Run {i}, {kind}, killed with {found}, has other bits.")
                return False
    return True


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--folder", help="of the checkpoints")
    parser.add_argument("--output")
    distil(**vars(parser.parse_args()))


if __name__ == "__main__":
    _main()
