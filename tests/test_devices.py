"""Real data on eight devices. `.ci/run` runs this file with eight simulated ones, by
`JAX_NUM_CPU_DEVICES=8`; elsewhere it is skipped."""

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


class Rows:
    """A source of two batches."""

    def __getitem__(self, step):
        train, rows = numbers(38), slice(19 * step, 19 * step + 19)
        return np.asarray(train.images[rows]), np.asarray(train.labels[rows])


OPTIONS = {
    "accumulated": lambda data, **kw: eqd.datasets.Accumulated(Rows(), 2, 3, **kw)(0),
    "all": lambda data, **kw: eqd.FullBatch(data, **kw),
    "batches": lambda data, **kw: eqd.Batches(data, 13, **kw),
    "balanced": lambda data, **kw: eqd.Batches(
        data, 12, balanced=True, augmentation=eqd.augment.Flip(), **kw
    ),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("fn", [scalar, tree])
@pytest.mark.parametrize("chunk_bytes", [1, 2**27])
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

    def __call__(self, x):
        return eqx.error_if(super().__call__(x.ravel()), jnp.isnan(x).any(), "NaN")


def test_errors_from_within_a_program_are_refused():
    start, _, make_data = problems()["unrolled"]
    training = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 1)
    objective = eqd.Bilevel(Raises(64, 10, 4, 1, key=KEY), training)
    with pytest.raises(ValueError, match="EQX_ON_ERROR=nan"):
        eqd.distill(start, objective, make_data(SHARDING), steps=2)


@functools.cache
def fifty_steps(kind, sharding=None):
    start, objective, make_data = problems()[kind]
    return eqd.distill(start, objective, make_data(sharding), key=KEY)


@pytest.mark.parametrize("kind", ["linear", "pool", "unrolled"])
def test_fifty_steps_are_those_of_one_device(kind):
    together = fifty_steps(kind, SHARDING)
    wanted = fifty_steps(kind).history.loss
    np.testing.assert_allclose(together.history.loss, wanted, rtol=1e-5, atol=0)
    assert together.distilled.images.sharding == NamedSharding(SHARDING.mesh, P())


@pytest.mark.parametrize("kind", ["linear", "pool", "unrolled"])
def test_a_step_communicates_once_for_the_loss_and_its_gradient(kind):
    start, objective, make_data = problems()[kind]
    problem = eqd.Problem(start, objective, optimiser=ADAM)
    everywhere = NamedSharding(SHARDING.mesh, P())
    state = jax.device_put(problem.init(key=KEY), everywhere)
    step = jax.jit(lambda state, data: problem.step(state, data))
    text = step.lower(state, make_data(SHARDING)).compile().as_text()
    ((_, kinds),) = collectives(text).items()
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
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-5)
    np.testing.assert_allclose(found.accuracies, wanted.accuracies, atol=1e-6)


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


@pytest.mark.parametrize("kind", ["linear", "pool"])
def test_seeds_over_devices(kind):
    start, objective, make_data = problems()[kind]
    noise = 0.1 * jr.normal(KEY, (8, *start.images.shape))
    images = (start.images + noise).at[3].set(jnp.nan)
    problem = eqd.Problem(start, objective, optimiser=ADAM)
    build = lambda images: eqx.tree_at(lambda s: s.images, start, images)
    keys = jr.split(KEY, 8)
    init = lambda images, key: problem.init(build(images), key=key)
    seeds = P("data")
    states = jax.device_put(
        jax.vmap(init)(images, keys), NamedSharding(MESHES[0], seeds)
    )
    step = jax.jit(
        jax.shard_map(
            jax.vmap(problem.step, in_axes=(0, None)),
            mesh=MESHES[0],
            in_specs=(seeds, P()),
            out_specs=seeds,
        )
    )
    data = make_data(None)
    assert not collectives(step.lower(states, data).compile().as_text())
    losses = []
    for _ in range(5):
        states, metrics = step(states, data)
        losses.append(metrics["loss"])
    for i in (0, 3, 7):
        state = jax.tree.map(lambda x, i=i: x[i], states)
        if i == 3:
            assert problem.failure(state)
            assert state.step == 0
            continue
        assert problem.failure(state) is None
        alone = eqd.distill(
            build(images[i]), objective, data, steps=5, optimiser=ADAM, key=keys[i]
        )
        found = [loss[i] for loss in losses]
        np.testing.assert_allclose(found, alone.history.loss, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    found = run_processes(tmp_path)
    for kind in problems():
        for losses in found:
            wanted = fifty_steps(kind).history.loss
            np.testing.assert_allclose(losses[kind], wanted, rtol=1e-5)
