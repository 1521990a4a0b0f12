"""Real data on eight devices. `.ci/run` runs this file with eight simulated ones, by
`JAX_NUM_CPU_DEVICES=8` and `NPROC=16`; elsewhere it is skipped."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import eqdistill as eqd

from .conftest import ADAM, assert_same_bits, subset
from .test_data import scalar, tree
from .two_processes import problems, run_processes


if jax.device_count() < 8:
    pytest.skip("needs JAX_NUM_CPU_DEVICES=8", allow_module_level=True)

KEY = jr.key(0)
KINDS = (AxisType.Auto, AxisType.Explicit)
MESHES = [jax.make_mesh((8,), ("data",), (kind,)) for kind in KINDS]
SHARDING = NamedSharding(MESHES[0], P("data"))


def collectives(text: str) -> dict[str, list[str]]:
    """The computations of an HLO program in which devices communicate."""
    found, name = {}, ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.split()[0]
        kinds = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
        if match := re.search(kinds + r"(-start)?\(", line):
            found.setdefault(name, []).append(match[1])
    return found


def numbers(n):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 2, 3), np.uint8)
    return eqd.Dataset(images, rng.permutation(np.arange(n) % 3), 3)


def weighted(data):
    weights = np.arange(1, 1 + len(data))
    return eqd.Dataset(data.images, data.labels, 3, weights=weights)


class Rows:
    """A source of two batches."""

    def __getitem__(self, step):
        train, rows = numbers(38), slice(19 * step, 19 * step + 19)
        return np.asarray(train.images[rows]), np.asarray(train.labels[rows])


OPTIONS = {
    "accumulated": lambda data, **kw: eqd.datasets.Accumulated(Rows(), 2, 3, **kw)(0),
    "all": eqd.FullBatch,
    "batches": lambda data, **kw: eqd.Batches(data, 13, **kw),
    "balanced": lambda data, **kw: eqd.Batches(
        data, 12, balanced=True, augmentation=eqd.augment.Flip(), **kw
    ),
    "weighted": lambda data, **kw: eqd.Batches(weighted(data), 12, balanced=True, **kw),
}


@pytest.mark.parametrize(
    ("kind", "fn", "chunk_bytes"),
    [
        ("all", scalar, 1),
        ("all", tree, 2**27),
        ("batches", scalar, 2**27),
        ("batches", tree, 1),
        ("balanced", scalar, 1),
        ("weighted", scalar, 1),
        ("accumulated", scalar, 1),
    ],
)
def test_mean_and_gradient_are_those_of_one_device(fn, kind, chunk_bytes):
    model = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)

    @jax.jit
    def value_and_grad(model, data):
        def total(model):
            mean = data.mean(fn, model, jnp.array(5), key=KEY)
            return sum(jnp.sum(x) for x in jax.tree.leaves(mean))

        return jax.value_and_grad(total)(model)

    found = []
    for sharding in (None, SHARDING):
        data = OPTIONS[kind](numbers(37), chunk_bytes=chunk_bytes, sharding=sharding)
        found.append(value_and_grad(model, data))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)
    if fn is scalar:
        text = value_and_grad.lower(model, data).compile().as_text()
        # Once in the whole program, and never in a loop.
        ((_, kinds),) = collectives(text).items()
        assert kinds.count("all-reduce") == 1
        if kind in ("all", "accumulated"):
            assert kinds == ["all-reduce"]


class Raises(eqx.nn.MLP):
    """A network that may raise an error."""

    def __call__(self, x, *, key=None):
        return eqx.error_if(super().__call__(x.ravel()), jnp.isnan(x).any(), "NaN")


def test_errors_from_within_a_program_are_refused():
    start, _, make_data = problems()["unrolled"]
    training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 1)
    objective = eqd.Bilevel(Raises(64, 10, 4, 1, key=KEY), training)
    with pytest.raises(ValueError, match="EQX_ON_ERROR=nan"):
        eqd.distill(start, objective, make_data(SHARDING), steps=2)


@functools.cache
def fifty_steps(kind, sharding=None):
    """The losses, and the collectives of a step."""
    start, objective, make_data = problems()[kind]
    problem = eqd.Problem(start, objective, optimiser=optax.adam(0.02))
    state = problem.init(key=KEY)
    if sharding is not None:
        state = jax.device_put(state, NamedSharding(sharding.mesh, P()))
    data = make_data(sharding)
    step = jax.jit(lambda state, data: problem.step(state, data))
    step = step.lower(state, data).compile()
    losses = []
    for _ in range(50):
        state, metrics = step(state, data)
        losses.append(jax.device_get(metrics["loss"]))
    return np.array(losses), collectives(step.as_text())


@pytest.mark.parametrize("kind", ["linear", "pool", "unrolled"])
def test_fifty_steps_are_those_of_one_device(kind):
    found, communication = fifty_steps(kind, SHARDING)
    np.testing.assert_allclose(found, fifty_steps(kind)[0], rtol=1e-5, atol=0)
    # Once for the loss and its gradient, and not in a loop.
    ((_, kinds),) = communication.items()
    assert kinds.count("all-reduce") == 1


def test_an_explicit_mesh_of_all_operations_is_refused():
    spread = jax.device_put(np.zeros((8, 2, 2), np.float32), SHARDING)
    with jax.set_mesh(MESHES[1]), pytest.raises(ValueError, match="automatic axes"):
        eqd.Dataset(spread, np.zeros(8, int))


def test_arrays_that_are_spread_already_stay_so():
    whole, test = (subset(x, 320) for x in eqd.datasets.load("digits"))
    # By `jax.make_mesh`, whose axes are explicit.
    rows = NamedSharding(MESHES[1], P("data"))
    spread = lambda x: eqd.Dataset(
        jax.device_put(x.images, rows), jax.device_put(x.labels, rows), 10
    )
    data = spread(whole)
    standardisation = eqd.datasets.Standardisation.fit(data)
    mapped = data.map(standardisation)
    train, held_out = mapped.split(0.2, key=KEY)
    for part in (data, mapped, train, held_out):
        assert part.images.sharding == part.labels.sharding == SHARDING
    assert (len(train), len(held_out)) == (256, 64)
    start = eqd.DistilledSet.from_real(train, l2=0.1, key=KEY)
    assert start.images.sharding == NamedSharding(SHARDING.mesh, P())
    model = eqd.linear.LogisticRegression(64, 10)
    result = eqd.distill(start, model, train, steps=5)
    found = eqd.evaluate(result.distilled, model, spread(test).map(standardisation))

    standardisation = eqd.datasets.Standardisation.fit(whole)
    train, _ = whole.map(standardisation).split(0.2, key=KEY)
    start = eqd.DistilledSet.from_real(train, l2=0.1, key=KEY)
    alone = eqd.distill(start, model, train, steps=5)
    np.testing.assert_allclose(result.history.loss, alone.history.loss, rtol=1e-5)
    wanted = eqd.evaluate(alone.distilled, model, test.map(standardisation))
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-5)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)
    np.testing.assert_allclose(found.per_class, wanted.per_class, atol=1e-6)


def test_only_the_first_axis_may_be_spread():
    train = numbers(16)
    for spec in (P(), P(None, "data")):
        with pytest.raises(ValueError, match="`sharding` must spread the first axis"):
            eqd.FullBatch(train, sharding=NamedSharding(MESHES[0], spec))


def test_a_failure_is_an_error_and_not_a_hang():
    start, objective, make_data = problems()["linear"]
    args = {"optimiser": optax.sgd(1e30), "steps": 20}
    with pytest.raises(eqd.DistillationError, match=r"not finite|not converge"):
        eqd.distill(start, objective, make_data(SHARDING), **args)


def test_checkpoints_do_not_depend_on_the_number_of_devices(tmp_path):
    start, objective, make_data = problems()["linear"]

    def run(sharding, steps, folder):
        checkpoints = eqd.Checkpoints(tmp_path / folder, every=5)
        data = make_data(sharding)
        callbacks = [checkpoints]
        return eqd.distill(start, objective, data, steps=steps, callbacks=callbacks)

    for i, (first, then) in enumerate([(SHARDING, None), (None, SHARDING)]):
        run(first, 10, str(i))
        resumed = run(then, 20, str(i))
        whole = run(then, 20, f"whole {i}")
        np.testing.assert_allclose(resumed.history.loss, whole.history.loss, rtol=1e-5)
    run(SHARDING, 10, "same")
    resumed, whole = (run(SHARDING, 20, folder) for folder in ("same", "whole 1"))
    assert_same_bits(resumed.distilled, whole.distilled)


# A pool draws its fresh networks by an `rbg` key, whose numbers `vmap` changes.
@pytest.mark.parametrize(("kind", "num_same"), [("linear", 5), ("pool", 1)])
def test_seeds_over_devices(kind, num_same):
    start, objective, make_data = problems()[kind]
    noise = 0.1 * jr.normal(KEY, (8, *start.images.shape))
    images = (start.images + noise).at[3].set(jnp.nan)
    problem, data = eqd.Problem(start, objective, optimiser=ADAM), make_data(None)
    build = lambda images: eqx.tree_at(lambda s: s.images, start, images)
    keys = jr.split(KEY, 8)
    alone = [problem.init(build(x), key=k) for x, k in zip(images, keys, strict=True)]
    seeds = P("data")
    states = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    states = jax.device_put(states, NamedSharding(MESHES[0], seeds))
    step = jax.shard_map(
        jax.vmap(problem.step, in_axes=(0, None)),
        mesh=MESHES[0],
        in_specs=(seeds, P()),
        out_specs=seeds,
    )
    step = jax.jit(step).lower(states, data).compile()
    assert not collectives(step.as_text())
    losses = []
    for _ in range(5):
        states, metrics = step(states, data)
        losses.append(jax.device_get(metrics["loss"]))
    failures = [
        problem.failure(jax.tree.map(lambda x, i=i: x[i], states)) for i in range(8)
    ]
    assert [i for i, failure in enumerate(failures) if failure] == [3]
    np.testing.assert_array_equal(states.step, [5, 5, 5, 0, 5, 5, 5, 5])
    one = jax.jit(lambda state, data: problem.step(state, data))
    for i in (0, 7):
        for loss in losses[:num_same]:
            alone[i], metrics = one(alone[i], data)
            np.testing.assert_allclose(loss[i], metrics["loss"], rtol=1e-4)


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    found = run_processes(tmp_path)
    for kind in problems():
        for losses in found:
            wanted, _ = fifty_steps(kind)
            np.testing.assert_allclose(losses[kind], wanted, rtol=1e-5)
