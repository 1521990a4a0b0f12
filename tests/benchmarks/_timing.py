"""Functions that the benchmarks share."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


_Name = TypeVar("_Name")


def in_turn(
    runs: Mapping[_Name, Callable[[], object]], repeats: int
) -> dict[_Name, np.ndarray]:
    """Seconds of each repeat of each run, after a first one that compiles. The runs
    alternate, because the speed of a machine may change within a minute."""
    for run in runs.values():
        jax.block_until_ready(run())
    times = [[seconds(run) for run in runs.values()] for _ in range(repeats)]
    return dict(zip(runs, np.array(times).T, strict=True))


def machine() -> dict[str, object]:
    found = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
    }
    print(", ".join(f"{k}: {v}" for k, v in found.items()) + "\n")
    return found


def print_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table in Markdown."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def write(results: object, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2))


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    result.add_argument("--repeats", type=int, default=repeats)
    result.add_argument(
        "--output", type=Path, default=Path("output"), help="a folder for the results"
    )
    return result
