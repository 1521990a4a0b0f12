"""Times the first outer step from the start of the process.

A new process imports the package, loads MNIST, and takes one outer step on all of it:
first with an empty compilation cache of JAX, and then with the cache that this leaves.

Prints a Markdown table of medians for each part, and writes `startup.json`. Run it with
`python tests/benchmarks/startup.py`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _timing import machine, parser, print_table, write


PROGRAM = """
import json, time
marks = [("import", time.time())]

import jax.random as jr
import optax
import eqdistill as eqd

marks.append(("data", time.time()))
train, _ = eqd.datasets.load("mnist")
marks.append(("start", time.time()))
model = eqd.linear.LogisticRegression(28 * 28, 10)
start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 784, key=jr.key(0))
marks.append(("first step", time.time()))
optimiser = optax.lbfgs(learning_rate=1.0, linesearch=None)
eqd.distill(start, model, train, optimiser=optimiser, steps=1)
marks.append(("", time.time()))
print(json.dumps(marks))
"""


def run(cache: str) -> dict[str, float]:
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    begin = time.time()
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    marks = json.loads(process.stdout)
    names = ["interpreter", *(name for name, _ in marks[:-1])]
    lengths = np.diff([begin, *(at for _, at in marks)])
    return {**dict(zip(names, lengths.tolist(), strict=True)), "all": lengths.sum()}


def main(repeats: int, output: Path) -> None:
    results: dict[str, object] = {"machine": machine()}
    cold, warm = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(run(cache))
            warm.append(run(cache))
    rows = []
    for name, runs in (("empty", cold), ("warm", warm)):
        medians = {k: float(np.median([r[k] for r in runs])) for k in runs[0]}
        rows.append([name, *(f"{v:.2f} s" for v in medians.values())])
        results[name] = medians
    print_table(["cache", *cold[0]], rows)
    write(results, output / "startup.json")


if __name__ == "__main__":
    main(**vars(parser(__doc__, repeats=3).parse_args()))
