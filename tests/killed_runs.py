"""Runs on MNIST that are killed at a random moment and go on from their checkpoints:
`python -m tests.killed_runs --runs 20`. The images must be bit for bit those of a run
that was left alone."""

import argparse
import functools
import os
import random
import signal
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


STEPS = 60
EVERY = 5


def _schedule():
    return optax.adam(optax.cosine_decay_schedule(0.02, STEPS))


def _linear(train):
    train, held_out = train.split(0.1, key=jr.key(2))
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 784, key=jr.key(0))
    stopping = eqd.EarlyStopping(held_out, every=3, patience=STEPS)
    args = {"learn": (True, False), "callbacks": (stopping,)}
    return start, eqd.LogisticRegression(784, 10), train, args


def _pool(train):
    train = train.map(eqd.Standardisation.fit(train))
    real = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0))
    targets = jax.nn.one_hot(real.labels, 10) - 0.1
    start = eqd.DistilledSet(real.images, targets, l2=1e-3, loss=eqd.SquaredError())
    network = functools.partial(eqd.nn.ConvNet, widths=(8, 16))
    augmentation = eqd.Affine(shift=1, rotation=10)
    args = {
        "inner": eqd.Pool(network, num_classes=10, size=4, max_age=8),
        "learn": (True, False),
        "optimiser": eqd.averaged(_schedule(), decay=0.95),
    }
    return start, None, eqd.BalancedBatches(train, 10, augmentation=augmentation), args


def _unrolled(train):
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0))
    inner = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, steps=30)
    args = {"inner": inner, "learn": (True, True)}
    return start, eqd.LogisticRegression(784, 10), eqd.Batches(train, 500), args


KINDS = {"linear": _linear, "pool": _pool, "unrolled": _unrolled}


def distil(kind: str, folder: str | None, output: str) -> None:
    train, _ = eqd.datasets.load("mnist")
    start, model, data, args = KINDS[kind](train)
    args = {"optimiser": _schedule(), "callbacks": ()} | args
    if folder is not None:
        args["callbacks"] += (eqd.Checkpoints(folder, every=EVERY),)
    result = eqd.distill(start, model, data, **args, steps=STEPS, key=jr.key(1))
    arrays = jax.tree.leaves((eqx.filter(result.start, eqx.is_array), result.history))
    np.savez(output, *arrays)


def command(kind: str, *paths: str) -> list[str]:
    return [sys.executable, "-m", "tests.killed_runs", "--kind", kind, *paths]


def kill(process: subprocess.Popen, folder: Path, rng: random.Random) -> list[str]:
    """Kills a process at a random moment, and returns what it has left: after a random
    checkpoint, within about the time of some steps or of another checkpoint."""
    last = folder / str(rng.randrange(EVERY, STEPS - EVERY, EVERY))
    while not last.exists():
        time.sleep(0.001)
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} has ended before {last}.")
    time.sleep(rng.uniform(0, 0.15))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return sorted(entry.name for entry in folder.iterdir())


def same(path: Path, other: Path) -> bool:
    with np.load(path) as a, np.load(other) as b:
        return a.files == b.files and all(
            a[name].tobytes() == b[name].tobytes() for name in a.files
        )


def compare(runs: int, seed: int, kinds: list[str]) -> bool:
    """Whether all runs that were killed end as the undisturbed ones do."""
    rng = random.Random(seed)
    all_same = True
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        for kind in kinds:
            output = root / f"{kind}.npz"
            subprocess.run(command(kind, "--output", str(output)), check=True)
        for i in range(runs):
            kind = kinds[i % len(kinds)]
            output = root / f"{i}.npz"
            folder = root / str(i)
            paths = ("--output", str(output), "--folder", str(folder))
            found = kill(subprocess.Popen(command(kind, *paths)), folder, rng)
            assert not output.exists()
            subprocess.run(command(kind, *paths), check=True)
            is_same = same(output, root / f"{kind}.npz")
            all_same = all_same and is_same
            what = "the same bits" if is_same else "OTHER BITS"
            print(f"run {i}, {kind}: killed with {found}; {what}", flush=True)
    return all_same


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--folder", help="of the checkpoints of a single run")
    parser.add_argument("--output", help="of a single run")
    args = parser.parse_args()
    if args.output is not None:
        distil(args.kind[0], args.folder, args.output)
        return 0
    return 0 if compare(args.runs, args.seed, args.kind or list(KINDS)) else 1


if __name__ == "__main__":
    sys.exit(_main())
