"""Times runs on other devices than one CPU, and measures their memory.

- `steps`: a linear step, a pool step, and the gradient of a ConvNet on a full batch, on
  the first device of the default backend and on the CPU.
- `memory`: the bytes that the compiler reports for a hypergradient through a ConvNet on
  10,000 images of 3 x 32 x 32, spread over all devices, and the times that the devices
  communicate in it. Then the bytes of three runs, and those of the rule in
  `docs/how-to/scale-up.md`.
- `stream`: batches of a file that is written first (`--gigabytes`), read with nothing
  else done, and in a run. The peak memory is that of the whole process.
- `seeds`: eight seeds, spread over all devices, and one by one.

Prints Markdown tables of medians, and writes `devices.json`. Run it with `python
tests/benchmarks/devices.py`. On a CPU, set `JAX_NUM_CPU_DEVICES=8` and `NPROC=16`.
"""

import functools
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
from _timing import in_turn, machine, parser, print_table, seconds, write
from jax.sharding import NamedSharding, PartitionSpec as P

import eqdistill as eqd


ADAM = optax.adam(0.02)


def images(n: int, shape=(3, 32, 32)) -> eqd.Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, *shape), np.uint8)
    return eqd.Dataset(pixels, np.arange(n) % 10, 10)


def convnet(shape=(3, 32, 32)):
    return functools.partial(eqd.nn.ConvNet, shape, 10)


def linear_problem(n=60_000):
    train = images(n, (28, 28))
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 784, key=jr.key(0))
    objective = eqd.Bilevel(eqd.linear.LogisticRegression(784, 10))
    return start, objective, eqd.FullBatch(train)


def pool_problem(n=20_000):
    train = images(n)
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0)).with_targets(10)
    return start, eqd.Bilevel(eqd.Pool(convnet())), eqd.Batches(train, 1024)


def fixed_problem(n=10_000, sharding=None, chunk_bytes=2**24):
    train = images(n)
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=jr.key(0)).with_targets(10)
    training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 1)
    objective = eqd.Bilevel(convnet()(key=jr.key(0)), training)
    data = eqd.FullBatch(train, sharding=sharding, chunk_bytes=chunk_bytes)
    return start, objective, data


def compiled_step(start, objective, data):
    problem = eqd.Problem(start, objective, optimiser=ADAM)
    state = problem.init(key=jr.key(0))
    if data.sharding is not None:
        state = jax.device_put(state, NamedSharding(data.sharding.mesh, P()))
    step = jax.jit(lambda state, data: problem.step(state, data))
    return step.lower(state, data).compile(), state


def steps(repeats: int) -> dict[str, dict[str, float]]:
    found = {}
    problems = {
        "a linear step, 60,000 x 784": linear_problem,
        "a pool step, 1,024 x 3 x 32 x 32": pool_problem,
        "the gradient of a ConvNet, 10,000 x 3 x 32 x 32": fixed_problem,
    }
    kinds = {jax.default_backend(): jax.devices()[0], "cpu": jax.devices("cpu")[0]}
    for name, make in problems.items():
        found[name] = {}
        for kind, device in kinds.items():
            with jax.default_device(device):
                start, objective, data = make()
                program, state = compiled_step(start, objective, data)
                run = lambda program=program, state=state, data=data: program(
                    state, data
                )[1]
                jax.block_until_ready(run())
                times = [seconds(run) for _ in range(repeats)]
            found[name][kind] = float(np.median(times))
    rows = [
        [name, *(f"{1e3 * t:.1f}" for t in times.values())]
        for name, times in found.items()
    ]
    print_table(["milliseconds", *kinds], rows)
    return found


def reported(program) -> Any:
    return program.memory_analysis()


def memory(repeats: int) -> list:
    del repeats
    sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), P("data"))
    rows = []
    for chunk_bytes in (2**24, 2**26):
        for spread in (None, sharding):
            problem = fixed_problem(sharding=spread, chunk_bytes=chunk_bytes)
            program, _ = compiled_step(*problem)
            temporary = reported(program).temp_size_in_bytes
            found = re.findall(r" all-reduce(?:-start)?\(", program.as_text())
            devices = 1 if spread is None else jax.device_count()
            mib = [chunk_bytes / 2**20, f"{temporary / 2**20:.1f}"]
            rows.append([devices, *mib, len(found)])
    print_table(
        ["devices", "`chunk_bytes`, MiB", "temporary, MiB", "all-reduces"], rows
    )
    cases = {
        "linear, 60,000 x 784": linear_problem(),
        "pool, 20,000 x 3 x 32 x 32": pool_problem(),
        "one network, 10,000 x 3 x 32 x 32": fixed_problem(),
    }
    rules = []
    for name, problem in cases.items():
        program, state = compiled_step(*problem)
        analysis = reported(program)
        peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        peak += analysis.output_size_in_bytes
        wanted = predicted(problem, state)
        row = [name, f"{peak / 2**20:.0f}", f"{wanted / 2**20:.0f}"]
        rules.append([*row, f"{wanted / peak:.2f}"])
    print_table(["run", "compiler, MiB", "rule, MiB", "ratio"], rules)
    return [rows, rules]


def num_bytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


def predicted(problem, state) -> Any:
    start, objective, data = problem
    total = num_bytes(data) + 2**24 + (4 + 2) * num_bytes(state.learned)
    if isinstance(data, eqd.Batches):
        total += data.size * np.prod(data.shape)
    if not isinstance(start.loss, eqd.SquaredError):
        return total  # A linear model.
    network = convnet()(key=jr.key(0))
    if isinstance(objective.models, eqd.Pool):
        total += 3 * objective.models.size * num_bytes(network)
    # The activations of a training step.
    loss = lambda pair: eqd.inner_loss(*pair)
    arrays, static = eqx.partition((start, network), eqx.is_inexact_array)
    of_arrays = lambda arrays: loss(eqx.combine(arrays, static))
    gradient = jax.jit(jax.grad(of_arrays)).lower(arrays).compile()
    return total + reported(gradient).temp_size_in_bytes


class Rows:
    """Batches of 1,024 images of a file."""

    def __init__(self, path: str):
        self.file = os.open(path, os.O_RDONLY)
        self.row = 3 * 32 * 32
        self.num = os.fstat(self.file).st_size // (1024 * self.row)

    def __getitem__(self, step):
        first = step % self.num * 1024 * self.row
        found = os.pread(self.file, 1024 * self.row, first)
        # What has been read need not stay in the system's cache.
        os.posix_fadvise(self.file, first, len(found), os.POSIX_FADV_DONTNEED)
        pixels = np.frombuffer(found, np.uint8).reshape(-1, 3, 32, 32)
        return pixels, np.arange(1024) % 10


def stream(repeats: int, path: Path, gigabytes: float) -> dict[str, float]:
    del repeats
    rng = np.random.default_rng(0)
    block = rng.integers(0, 256, 2**26, np.uint8)
    with open(path, "wb") as file:
        for _ in range(max(1, round(gigabytes * 1e9 / 2**26))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rows = Rows(str(path))
    reading = seconds(lambda: [rows[i] and None for i in range(rows.num)])
    train = images(2000)
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1e-3, key=jr.key(0))
    model = eqd.linear.LogisticRegression(3072, 10)
    source = eqd.datasets.Stream(rows, 10)
    run = lambda steps: eqd.distill(start, model, source, steps=steps)
    run(2)
    running = seconds(lambda: run(rows.num).distilled)
    size = rows.num * 1024 * rows.row / 1e6
    print_table(
        ["", "seconds", "MB/s"],
        [
            ["reading alone", f"{reading:.1f}", f"{size / reading:.0f}"],
            ["distilling", f"{running:.1f}", f"{size / running:.0f}"],
        ],
    )
    status = Path("/proc/self/status").read_text()
    print(next(line for line in status.splitlines() if line.startswith("VmHWM")) + "\n")
    return {"reading": reading, "running": running, "megabytes": size}


def seeds(repeats: int) -> dict[str, float]:
    start, objective, data = linear_problem(10_000)
    problem = eqd.Problem(start, objective, optimiser=ADAM)
    keys = jr.split(jr.key(0), 8)
    mesh = jax.make_mesh((jax.device_count(),), ("seeds",))
    axis = P("seeds")
    states = jax.vmap(lambda key: problem.init(key=key))(keys)
    alone = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(8)]
    states = jax.device_put(states, NamedSharding(mesh, axis))
    one = jax.jit(lambda state, data: problem.step(state, data))
    many = jax.jit(
        jax.shard_map(
            jax.vmap(problem.step, in_axes=(0, None)),
            mesh=mesh,
            in_specs=(axis, P()),
            out_specs=axis,
        )
    )
    everywhere = jax.device_put(data, NamedSharding(mesh, P()))
    times = in_turn(
        {
            "together": lambda: many(states, everywhere),
            "one by one": lambda: [one(state, data) for state in alone],
        },
        repeats,
    )
    found = {name: float(np.median(x)) for name, x in times.items()}
    rows = [[name, f"{1e3 * t:.0f}"] for name, t in found.items()]
    print_table(["a step of eight seeds", "ms"], rows)
    return found


def main(repeats: int, output: Path, parts: list[str], gigabytes: float) -> None:
    results: dict[str, object] = dict(machine()) | {"devices": jax.device_count()}
    with tempfile.TemporaryDirectory() as folder:
        programs = {
            "steps": steps,
            "memory": memory,
            "seeds": seeds,
            "stream": functools.partial(
                stream, path=Path(folder) / "images.bin", gigabytes=gigabytes
            ),
        }
        for part in parts:
            results[part] = programs[part](repeats)
    write(results, output / "devices.json")


if __name__ == "__main__":
    arguments = parser(__doc__, repeats=5)
    every = ["steps", "memory", "seeds", "stream"]
    arguments.add_argument("--parts", nargs="+", choices=every, default=every)
    arguments.add_argument("--gigabytes", type=float, default=8.0)
    main(**vars(arguments.parse_args()))
