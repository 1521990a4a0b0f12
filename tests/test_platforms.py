"""Steps are compiled for accelerators, as far as a machine without one can."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import eqdistill as eqd
from eqdistill import adjoints, linear
from eqdistill._checks import array_difference

from .conftest import ADAM, subset


LINEAR = linear.LogisticRegression(64, 10)
MLP = functools.partial(eqd.nn.MLP, (8, 8), 10, widths=(8,))
CONVNET = functools.partial(eqd.nn.ConvNet, (8, 8), 10, widths=(4, 4))
SMOOTH = MLP(activation=jnp.tanh, key=jr.key(0))
SGD = functools.partial(optax.sgd, momentum=0.9)
RATE = {"learning_rate": 0.1}
HARD = {
    "span": eqd.Bilevel(LINEAR),
    "argmin": eqd.Bilevel(SMOOTH),
    "unrolled": eqd.Bilevel(eqd.Fresh(CONVNET), eqd.UnrolledSolver(SGD, RATE, 3)),
    "checkpointed": eqd.Bilevel(
        SMOOTH,
        eqd.UnrolledSolver(
            SGD, RATE, 9, adjoint=adjoints.RecursiveCheckpointAdjoint(3)
        ),
    ),
    "reversible": eqd.Bilevel(
        SMOOTH, adjoints.ReversibleSolver(learning_rate=0.1, momentum=0.9, steps=3)
    ),
}
TARGETS = {
    "ridge": eqd.Bilevel(LINEAR, linear.RidgeSolver()),
    "pool": eqd.Bilevel(eqd.Pool(CONVNET, MLP)),
    "features": eqd.Bilevel(eqd.RandomFeatures(CONVNET)),
    "linearised": eqd.Bilevel(eqd.Pool(MLP), linear.LinearisedSolver()),
}
ALL = HARD | TARGETS | {"in turn": eqd.InTurn(HARD["span"], HARD["unrolled"])}
# Neither `argmin` nor `checkpointed`: the loops of Optimistix and Equinox do not pass.
CHECKED = ["span", "unrolled", "reversible", "pool", "linearised", "in turn"]

pytestmark = pytest.mark.slow


def problem_of(digits, kind):
    train = subset(digits[0], 60)
    start = eqd.DistilledSet.from_real(train, l2=0.1, key=jr.key(0))
    start = start.with_targets(10) if kind in TARGETS else start
    problem = eqd.Problem(start, ALL[kind], optimiser=ADAM)
    return problem, problem.init(key=jr.key(0)), train


@pytest.mark.parametrize("kind", ALL)
def test_steps_lower_for_every_platform(digits, kind, monkeypatch):
    if kind == "argmin":  # As by `EQX_ON_ERROR=nan`: see `docs/how-to/scale-up.md`.
        monkeypatch.setattr("equinox._errors.EQX_ON_ERROR", "nan")
    problem, state, train = problem_of(digits, kind)
    step = jax.jit(lambda state, data: problem.step(state, data))
    traced = step.trace(state, eqd.Batches(train, 20))
    assert traced.lower(lowering_platforms=("cuda", "rocm", "tpu")).as_text()


@pytest.mark.parametrize("kind", CHECKED)
def test_seeds_pass_the_checks_of_shard_map(digits, kind):
    problem, state, train = problem_of(digits, kind)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    data = eqd.FullBatch(train, chunk_bytes=1)
    step = jax.shard_map(
        jax.vmap(problem.step, in_axes=(0, None)),
        mesh=jax.make_mesh((1,), ("seeds",), (AxisType.Auto,)),
        in_specs=(P("seeds"), P()),
        out_specs=P("seeds"),
    )
    new_states, _ = jax.eval_shape(step, states, data)
    assert array_difference(states, new_states) is None
