"""Files that were spoilt at random are loaded or refused: by name, in little time, and
in little memory."""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd
from eqdistill import linear, nn, recipes
from eqdistill.datasets import Standardisation, ZCA

from .conftest import evaluation


VALUES = [
    *(None, True, 0, -1, 3, 255, 700, 10**6, 2**31 - 1, 2**31, 2**53, 2**63, 2**64),
    *(0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"), "", "x" * 1000, "Packed"),
    *([], {}, [1], [2**20, 2**20], [[]] * 100, {"class": "ZCA"}, {"a": {"a": {}}}),
    *(2, 5, 8, 9, 64, 1024, 4096, 1.0, 1e-3, 5.0, [1, 1], [8, 8], [64, 64], [4096, 4]),
    *("SpanSolver", "ArgminSolver", "LogisticRegression", "Recipe", "F64", "I64"),
    *("ConvNet", "dc", "relu", {"class": "RidgeSolver"}, {"tensor": "artifact.start"}),
    *("adam", "eps_root", {"eps_root": 0.5}, {"learning_rate": 0.1}, "R2", -1e10),
]


def good_artifacts(folder):
    """The bytes of one file of each kind."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, 4, 4)).astype(np.float32)
    labels = np.arange(6) % 3
    hard = eqd.DistilledSet(images, labels, l2=0.1, class_names=["a", "b", "c"])
    soft = eqd.DistilledSet(images, rng.normal(size=(6, 3)).astype(np.float32), l2=0.1)
    packed = eqd.Packed(hard, (8, 8))
    pixels = rng.integers(256, size=(40, 8, 8), dtype=np.uint8)
    real = eqd.Dataset(pixels, np.arange(40) % 2)
    model = linear.LogisticRegression(16, 3)
    make = functools.partial(nn.ConvNet, (4, 4), 3, widths=(4,))
    rates = recipes.learned_rates(make, learning_rates=[0.1, 0.2], batch_size=2)
    fresh = recipes.Recipe(eqd.Fresh(make), eqd.ArgminSolver())
    adam = functools.partial(optax.adam, eps_root=1e-8)
    unrolled = eqd.UnrolledSolver(adam, {"learning_rate": [0.1, 0.2]}, 2)
    fixed = recipes.Recipe(make(key=jr.key(0)), unrolled)
    # No file can rebuild a window.
    own = eqd.UnrolledSolver(
        adam, {"learning_rate": 0.1}, 2, window=eqd.adjoints.LastSteps(1)
    )
    own = dataclasses.replace(fixed, inner=own)
    for i, (start, recipe, kwargs) in enumerate(
        [
            (hard, None, {"dataset": "mnist", "seed": 7}),
            (soft, recipes.Recipe(model, linear.SpanSolver(1e-3, 0.0, 9)), {}),
            (hard.with_targets(3), fresh, {}),
            (hard, recipes.dc(make, updates=7), {}),
            (hard, rates, {}),
            (hard, fixed, {}),
            (hard, own, {"source": "class Network: ..."}),
            (packed, None, {"preprocessing": Standardisation.fit(real)}),
            (packed, None, {"preprocessing": ZCA.fit(real)}),
        ]
    ):
        path = folder / f"{i}.safetensors"
        eqd.save(path, start, None if recipe is None else evaluation(recipe), **kwargs)
        yield path.read_bytes()


def spoil_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place = rng.integers(len(data))
        match rng.integers(4):
            case 0:
                data[place] = rng.integers(256)
            case 1:
                data[place] ^= 1 << rng.integers(8)
            case 2:
                del data[place : place + rng.integers(1, 9)]
            case 3:
                data[place:place] = rng.bytes(rng.integers(1, 9))
        if not data:
            break
    return bytes(data[: rng.integers(len(data) + 1)] if rng.random() < 0.2 else data)


def spoil_json(data, rng):
    """Puts other values into the JSON of an artifact."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = {k: json.loads(x) for k, x in header.pop("__metadata__").items()}
    for _ in range(rng.integers(1, 3)):
        node = header if rng.random() < 0.2 else metadata
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = keys[rng.integers(len(keys))]
            if not isinstance(node[key], dict | list) or not node[key]:
                break
            if rng.random() < 0.1:
                break
            node = node[key]
        # Most often of the same type, which gets further.
        alike = [x for x in VALUES if type(x) is type(node[key])]
        values = alike if alike and rng.random() < 0.7 else VALUES
        node[key] = json.loads(json.dumps(values[rng.integers(len(values))]))
    header["__metadata__"] = {k: json.dumps(x) for k, x in metadata.items()}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def memory(name):
    """In bytes, as Linux counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how memory is measured")
def test_spoilt_files(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "bad.safetensors"
    good = list(good_artifacts(tmp_path))
    for data in good:  # Compiling is no part of the measurement.
        path.write_bytes(data)
        eqd.load(path)
    refused = 0
    for i in range(600):
        spoil = (spoil_bytes, spoil_json)[i % 2]
        path.write_bytes(spoil(good[i // 2 % len(good)], rng))
        Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
        before, start = memory("VmRSS"), time.perf_counter()
        try:
            eqd.load(path)
        except ValueError as e:
            refused += 1
            assert str(path) in str(e)  # noqa: PT017
            assert len(str(e)) < 1000  # noqa: PT017
        assert time.perf_counter() - start < 10
        assert memory("VmHWM") - before < 50 * 2**20
    assert refused > 300
