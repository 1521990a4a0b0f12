"""Real data on eight devices. `.ci/run` runs this file with eight simulated ones, by
`JAX_NUM_CPU_DEVICES=8`; elsewhere it is skipped."""

import contextlib
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

from .conftest import ADAM, assert_same_bits, small_noise, subset
from .test_data import scalar, tree
from .two_processes import problems, run_processes


if jax.device_count() < 8:
    pytest.skip("needs JAX_NUM_CPU_DEVICES=8", allow_module_level=True)

KEY = jr.key(0)
# `jax.make_mesh` makes explicit axes by default, older programs automatic ones.
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


def numbers(n, **kwargs):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 2, 3), np.uint8)
    return eqd.Dataset(images, rng.permutation(np.arange(n) % 3), 3)


OPTIONS = {
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
        if kind == "all":
            assert kinds == ["all-reduce"]


@pytest.mark.parametrize("kind", ["linear", "pool", "unrolled"])
def test_fifty_steps_are_those_of_one_device(kind):
    start, objective, make_data = problems()[kind]
    run = lambda sharding: eqd.distill(start, objective, make_data(sharding), key=KEY)
    alone, together = run(None), run(SHARDING)
    np.testing.assert_allclose(
        together.history.loss, alone.history.loss, rtol=1e-5, atol=0
    )
    images = together.distilled.images
    assert len(images.sharding.device_set) == 8
    assert images.sharding.is_fully_replicated


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


@pytest.mark.parametrize("mesh", MESHES)
def test_arrays_that_are_spread_already(mesh):
    whole, test = (subset(x, 320) for x in eqd.datasets.load("digits"))
    is_ambient = mesh is MESHES[0]
    with jax.set_mesh(mesh) if is_ambient else contextlib.nullcontext():
        spread = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
        build = lambda data: eqd.Dataset(spread(data.images), spread(data.labels), 10)
        data, sharded_test = build(whole), build(test)
        standardisation = eqd.datasets.Standardisation.fit(data)
        mapped = data.map(standardisation)
        train, held_out = mapped.split(0.2, key=KEY)
        for part in (data, mapped, train, held_out):
            assert part.sharding == SHARDING
            assert part.labels.sharding == SHARDING
        assert (len(train), len(held_out)) == (256, 64)
        start = eqd.DistilledSet.from_real(train, l2=0.1, key=KEY)
        assert start.images.sharding.is_fully_replicated
        assert len(start.images.sharding.device_set) == 8
        model = eqd.linear.LogisticRegression(64, 10)
        result = eqd.distill(start, model, train, steps=5)
        batched = eqd.distill(start, model, eqd.Batches(train, 50), steps=5)
        test_ = sharded_test.map(standardisation)
        found = eqd.evaluate(result.distilled, model, test_)

    wanted = eqd.datasets.Standardisation.fit(whole)
    alone = whole.map(wanted).split(0.2, key=KEY)[0]
    np.testing.assert_allclose(train.images, alone.images, rtol=1e-5, atol=1e-6)
    start = eqd.DistilledSet.from_real(alone, l2=0.1, key=KEY)
    one = eqd.distill(start, model, alone, steps=5)
    np.testing.assert_allclose(result.history.loss, one.history.loss, rtol=1e-5)
    one_batched = eqd.distill(start, model, eqd.Batches(alone, 50), steps=5)
    np.testing.assert_allclose(
        batched.history.loss, one_batched.history.loss, rtol=1e-5
    )
    evaluation = eqd.evaluate(one.distilled, model, test.map(wanted))
    np.testing.assert_allclose(found.losses, evaluation.losses, rtol=1e-5)
    np.testing.assert_allclose(found.accuracies, evaluation.accuracies, atol=1e-6)


def test_only_the_first_axis_may_be_spread():
    train = numbers(16)
    for spec in (P(), P(None, "data")):
        with pytest.raises(ValueError, match="`sharding` must spread the first axis"):
            eqd.FullBatch(train, sharding=NamedSharding(MESHES[0], spec))


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
    resumed = run(SHARDING, 20, "same")
    assert_same_bits(resumed.distilled, whole.distilled)


def solvers():
    linear = eqd.linear.LogisticRegression(64, 10)
    mlp = functools.partial(eqd.nn.MLP, (8, 8), 10, widths=(16,))
    smooth = eqd.nn.MLP((8, 8), 10, widths=(4,), activation=jnp.tanh, key=KEY)
    return {
        "span": eqd.Bilevel(linear),
        "ridge": eqd.Bilevel(linear, eqd.linear.RidgeSolver()),
        "pool": eqd.Bilevel(eqd.Pool(mlp, size=3, max_age=5)),
        "unrolled": eqd.Bilevel(
            eqd.Fresh(mlp), eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 5)
        ),
    }


@pytest.mark.parametrize("kind", ["span", "ridge", "pool", "unrolled"])
def test_seeds_over_devices(kind):
    train = subset(eqd.datasets.load("digits")[0], 300)
    objective = solvers()[kind]
    starts = [
        eqd.DistilledSet.from_real(train, l2=0.01, key=jr.key(i)) for i in range(8)
    ]
    if kind == "ridge":
        starts = [start.with_targets(10) for start in starts]
    nan = jnp.full_like(starts[3].images, jnp.nan)
    starts[3] = eqx.tree_at(lambda s: s.images, starts[3], nan)
    problem = eqd.Problem(starts[0], objective, optimiser=ADAM)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    init = lambda start, key: problem.init(start, key=key)
    states = eqx.filter_vmap(init)(stacked, jr.split(KEY, 8))
    seeds = NamedSharding(MESHES[0], P("data"))
    states = jax.device_put(states, seeds)
    data = eqd.FullBatch(train, chunk_bytes=2**16)
    step = jax.shard_map(
        jax.vmap(problem.step, in_axes=(0, None)),
        mesh=seeds.mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
    )
    step = jax.jit(step)
    for _ in range(5):
        states, metrics = step(states, data)
    assert not collectives(step.lower(states, data).compile().as_text())
    of_seed = lambda i: jax.tree.map(lambda x: x[i], states)
    for i in range(8):
        if i == 3:
            assert problem.failure(of_seed(i))
            assert of_seed(i).step == 0
            continue
        assert problem.failure(of_seed(i)) is None
        alone = eqd.distill(
            starts[i], objective, data, steps=5, optimiser=ADAM, key=jr.split(KEY, 8)[i]
        )
        np.testing.assert_allclose(
            metrics["loss"][i], alone.history.loss[-1], rtol=1e-4
        )


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    found = run_processes(tmp_path)
    for kind, (start, objective, make_data) in problems().items():
        alone = eqd.distill(start, objective, make_data(None), key=KEY)
        for losses in found:
            np.testing.assert_allclose(losses[kind], alone.history.loss, rtol=1e-5)
