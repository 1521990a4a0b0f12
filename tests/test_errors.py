"""Each wrong argument of each public name is refused in one line, which names it."""

import functools as ft
import inspect
import pathlib
import pickle
import re
import traceback
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import jaxtyped

import eqdistill as eqd
from eqdistill._typechecking import typechecked


IMAGES = np.arange(108, dtype=np.float32).reshape(12, 3, 3)
LABELS = np.arange(12) % 3
KEY = jr.key(0)
KEYS = [0, np.zeros(3), "key", jnp.zeros((2, 2), jnp.uint32), None]
DATA = eqd.Dataset(IMAGES, LABELS)
OTHER_DATA = eqd.Dataset(IMAGES[:, :2], LABELS)
MANY = eqd.Dataset(IMAGES, LABELS, 7)
DISTILLED = eqd.DistilledSet(IMAGES[:3], LABELS[:3], l2=0.1)
SQUARED = eqd.DistilledSet(IMAGES[:3], LABELS[:3], l2=0.1, loss=eqd.SquaredError())
CLASSIFIER = eqd.LogisticRegression(9, 3)
ADAM = optax.adam(0.1)
SHAPED = {"shape": (3, 3), "num_classes": 3, "key": KEY}
SHAPES = [3, "33", (3,), (0, 3), (3.0, 3), (1, 1, 3, 3), (40, 40)]
NOT_POSITIVE = [0, -1, 2.5, "1", True, None]
NOT_NUMBERS = ["1", None, True, np.ones(2), float("nan")]
NO_DATA = [None, IMAGES, DISTILLED, eqd.Dataset]
NO_SOLVER = [None, ADAM, "adam", eqd.SpanSolver]


class Plain(eqx.Module):
    """A network that is not linear in its parameters."""

    weight: jax.Array = eqx.field(default_factory=lambda: jnp.ones((3, 9)))

    def __call__(self, image):
        return jnp.tanh(self.weight @ image.reshape(-1))


def network(shape, num_classes, *, key):
    del shape, num_classes, key
    return Plain()


WIDE = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 2, batch_size=4)
DRAWING = eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.1}, 2, batch_size=2)
RECIPE = eqd.recipes.zero_start()
HISTORY = eqd.History(*np.zeros((3, 2), np.float32))
FOLDER = pathlib.Path(__file__).parent


def fields(cls, **good):
    """A module that is what its fields are: each of them of a wrong type."""
    return cls, good, {name: [object(), "wrong"] for name in good}


PROBLEM = ft.partial(eqd.Problem, DISTILLED, CLASSIFIER, DATA, optimiser=ADAM)
SCALAR, FLAG, COUNT = jnp.zeros(()), jnp.array(True), jnp.array(0)
FITTED = eqd.Fitted(CLASSIFIER, FLAG, SCALAR)
STATE = {"learned": None, "fixed": None, "last_good": None, "optimiser_state": None}
STATE |= {"inner_state": None, "key": None, "step": COUNT, "status": COUNT}
FIT = {"distilled": DISTILLED, "model": CLASSIFIER}
NO_CLASSIFIER = [None, "network", IMAGES, eqd.LogisticRegression(8, 3), Plain]
NO_START = [None, IMAGES, "start", eqd.DistilledSet]
FROM = {"train": DATA, "l2": 0.1, "key": KEY}
BAD_FROM = {"train": NO_DATA, "n": [0, 1.5, "3"], "l2": [0, "a"], "key": KEYS}
OUTER = {"start": DISTILLED, "model": CLASSIFIER, "train": DATA}
BAD_OUTER = {
    "optimiser": ["adam", optax.adam, None],
    "learn": [3, (1, 0), (True,) * 3, "images", (False, True)],
    "tolerance": ["0", -1, None, True],
    "inner": NO_SOLVER,
    "model": NO_CLASSIFIER,
    "train": [*NO_DATA, OTHER_DATA],
}
NETWORK = (SHAPED, {"shape": SHAPES, "num_classes": NOT_POSITIVE, "key": KEYS})
ARTIFACT = inspect.signature(eqd.Artifact).parameters
NORMS = {"norm": ["instance_norm", 3], "activation": ["relu", 3]}
WEIGHT = {"weight": [2, -1, "1"]}
UPDATES = {"network": ["ConvNet", 3, None], "updates": [0, 1, 10**6, 2.5, "9", True]}
AUGMENT = {"augment": [1, "yes", None]}


def with_norm(make):
    good, bad = NETWORK
    return make, good, bad | NORMS


# What is called, with which good arguments, and what is wrong in their place. A name
# may be followed by a remark.
CASES = {
    "Affine": (
        eqd.Affine,
        {},
        {x: [-1, *NOT_NUMBERS] for x in ("shift", "rotation", "scale")},
    ),
    "ArgminSolver": (
        eqd.ArgminSolver,
        {},
        {
            "solver": [ADAM, None],
            "adjoint": ["implicit", None],
            "max_steps": NOT_POSITIVE,
            "tolerance": [-1, *NOT_NUMBERS],
        },
    ),
    "Artifact": (
        ft.partial(eqd.Artifact, **dict.fromkeys(ARTIFACT)),
        {},
        {"distilled": [1, None]},
    ),
    "AutoSolver": (
        lambda key: eqd.fit(**FIT, inner=eqd.AutoSolver(), key=key),
        {},
        {"key": KEYS[:-1]},
    ),
    "BalancedBatches": (
        eqd.BalancedBatches,
        {"dataset": DATA, "per_class": 2},
        {
            "dataset": NO_DATA,
            "per_class": [*NOT_POSITIVE, 5],
            "augmentation": ["flip", eqd.Flip],
        },
    ),
    "Batches": (
        eqd.Batches,
        {"dataset": DATA, "size": 2},
        {
            "dataset": NO_DATA,
            "size": [*NOT_POSITIVE, 13],
            "augmentation": ["flip", eqd.Flip],
        },
    ),
    "Batches.loss": (
        lambda key: eqx.filter_jit(eqd.outer_loss)(
            DISTILLED, CLASSIFIER, eqd.Batches(DATA, 2), key=key
        ),
        {},
        {"key": KEYS},
    ),
    "Best": fields(
        eqd.Best,
        distilled=DISTILLED,
        step=1,
        steps=(1,),
        losses=np.zeros(1, np.float32),
        data=eqd.FullBatch(DATA),
    ),
    "Checkpoints": (
        eqd.Checkpoints,
        {"directory": "x"},
        {"directory": [None, 3], "every": NOT_POSITIVE, "keep": NOT_POSITIVE},
    ),
    "ColourJitter": (
        eqd.ColourJitter,
        {},
        {x: [-1, *NOT_NUMBERS] for x in ("brightness", "saturation", "contrast")},
    ),
    "Compose": (
        lambda augmentations: eqd.Compose(*augmentations),
        {},
        {"augmentations": [[eqd.Flip(), "flip"], [eqd.Flip]]},
    ),
    "Crop": (eqd.Crop, {}, {"padding": [-1, 1.5, None, True]}),
    "CrossEntropy": (
        lambda labels: eqd.DistilledSet(IMAGES, labels, l2=1, loss=eqd.CrossEntropy()),
        {},
        {"labels": [np.full((12, 4), 0.25)]},
    ),
    "Cutout": (eqd.Cutout, {}, {"size": [-1, 1.5, None, True]}),
    "DampedCG": (
        eqd.DampedCG,
        {},
        {
            "rtol": [-1, "1", True],
            "accept": [-1, *NOT_NUMBERS],
            "max_residual": [-1, *NOT_NUMBERS],
            "max_steps": NOT_POSITIVE,
        },
    ),
    "Dataset": (
        eqd.Dataset,
        {"images": IMAGES, "labels": LABELS},
        {
            "images": [
                *(None, "images", 3, IMAGES[:0], IMAGES + np.nan, IMAGES.astype(int)),
                *([[1.0], [1.0, 2.0]], [["a", "b"]] * 12, {"a": IMAGES}),
            ],
            "labels": [None, "labels", 3, LABELS[:3], LABELS - 1, LABELS + 0.5, [0, 1]],
            "num_classes": [1, "3", 2.0, True, 2**40],
            "class_names": ["abc", ("a", "b"), (1, 2, 3), 3, {"a": 1}],
        },
    ),
    "Dataset.split": (
        DATA.split,
        {"fraction": 0.5, "key": KEY},
        {"fraction": [0, 1, 2.0, *NOT_NUMBERS], "key": KEYS},
    ),
    "Dataset.map": (DATA.map, {}, {"fn": [None, "sqrt", 3]}),
    "DistillState": (
        eqd.DistillState,
        STATE,
        {"key": [0, "key"], "step": [0, "a"], "status": [0, None]},
    ),
    "Distillation": (
        eqd.Distillation,
        {
            "start": DISTILLED,
            "converged": True,
            "learned": (),
            "state": eqd.DistillState(**STATE),
            "inner": eqd.SpanSolver(),
            "history": HISTORY,
            "callbacks": (),
            "distilled": DISTILLED,
        },
        {
            "distilled": [None, IMAGES],
            "inner": [None, "a"],
            "history": [None, [1.0]],
            "converged": [1, None],
            "learned": ["a", (1,)],
            "state": [None, 1],
        },
    ),
    "DistillationError": (
        eqd.DistillationError,
        {"message": "a"},
        {"distillation": [None, DISTILLED]},
    ),
    "DistilledSet": (
        eqd.DistilledSet,
        {"images": IMAGES, "labels": LABELS, "l2": 0.1},
        {
            "images": [
                *(None, "images", 3.0, IMAGES[:0], IMAGES + np.inf, [["a"]] * 12),
                *(IMAGES.astype(np.uint8), [[1.0], [1.0, 2.0]]),
            ],
            "labels": [
                None,
                "labels",
                LABELS[:3],
                LABELS - 1,
                LABELS + 0.5,
                ["a"] * 12,
            ],
            "l2": [0, -1.0, "0.1", np.ones(3), None, np.nan, 1j],
            "loss": [None, "cross_entropy", eqd.CrossEntropy],
        },
    ),
    "DistilledSet.from_noise": (
        eqd.DistilledSet.from_noise,
        FROM | {"scale": 1.0},
        BAD_FROM | {"scale": [0, "1", None, np.inf]},
    ),
    "DistilledSet.from_real": (
        eqd.DistilledSet.from_real,
        FROM,
        BAD_FROM | {"n": [0, 1.5, 100]},
    ),
    "DistilledSet.from_class_means": (
        eqd.DistilledSet.from_class_means,
        FROM,
        BAD_FROM,
    ),
    "DistilledSet.from_kmeans": (
        eqd.DistilledSet.from_kmeans,
        FROM,
        {"train": NO_DATA, "n": [0, 1.5, "3"], "key": KEYS},
    ),
    "DistilledSet.from_herding": (eqd.DistilledSet.from_herding, FROM, BAD_FROM),
    "EarlyStopping": (
        eqd.EarlyStopping,
        {"data": DATA},
        {"data": NO_DATA, "every": NOT_POSITIVE, "patience": NOT_POSITIVE},
    ),
    "Evaluation": (
        eqd.Evaluation,
        {"loss": SCALAR, "accuracy": SCALAR, "fitted": FITTED},
        {"loss": [1.0, None], "accuracy": [1.0], "fitted": [None, CLASSIFIER]},
    ),
    "Fitted": (
        eqd.Fitted,
        {"model": CLASSIFIER, "converged": FLAG, "gradient_norm": SCALAR},
        {"converged": [True, 1], "gradient_norm": [1.0, "a"], "stats": [None, [1]]},
    ),
    "Flip": (eqd.Flip, {}, {"probability": [-0.1, 2, *NOT_NUMBERS]}),
    "Frequencies": (
        eqd.Frequencies,
        {"coefficients": DISTILLED, "shape": (4, 4)},
        {"coefficients": NO_START, "shape": [3, "4", (2, 2), (4.0, 4), ()]},
    ),
    "Frequencies.from_distilled": (
        eqd.Frequencies.from_distilled,
        {"distilled": DISTILLED, "size": 2},
        {"distilled": NO_START, "size": [0, 4, 1.5, "2", None]},
    ),
    "FullBatch": (eqd.FullBatch, {}, {"dataset": NO_DATA}),
    "GradientWindow": (
        eqd.GradientWindow,
        {"size": 2},
        {"size": NOT_POSITIVE, "power": NOT_NUMBERS},
    ),
    "History": fields(
        eqd.History,
        loss=np.zeros(2, np.float32),
        gradient_norm=np.zeros(2, np.float32),
        inner_residual=np.zeros(2, np.float32),
    ),
    "HypergradientError": fields(
        eqd.HypergradientError, norm=1.0, error=1.0, bound=1.0, inner_residual=1.0
    ),
    "LastSteps": (eqd.LastSteps, {}, {"size": NOT_POSITIVE}),
    "LinearClassifier": (
        eqd.LinearClassifier,
        {"features": jnp.ravel, "head": CLASSIFIER.head},
        {"features": [None, "pixels", 3], "head": [None, jnp.ravel, np.ones((3, 9))]},
    ),
    "LinearClassifier.__call__": (CLASSIFIER, {}, {"image": [None, IMAGES[0]]}),
    "Linearised": (eqd.Linearised, {"tangent": None}, {"network": [None, Plain()]}),
    "LinearisedSolver": (
        lambda model: eqd.fit(SQUARED, model, eqd.LinearisedSolver()),
        {},
        {"model": NO_CLASSIFIER},
    ),
    "Log": (eqd.Log, {}, {"write": [None, "print", 3], "every": NOT_POSITIVE}),
    "LogisticRegression": (
        eqd.LogisticRegression,
        {"in_features": 9, "num_classes": 3},
        {
            "in_features": NOT_POSITIVE,
            "num_classes": NOT_POSITIVE,
            "use_intercept": [1, "yes", None],
            "dtype": ["float33", int, 3],
        },
    ),
    "Metrics": fields(
        eqd.Metrics, loss=SCALAR, gradient_norm=SCALAR, inner_residual=SCALAR
    ),
    "NeumannSeries": (
        eqd.NeumannSeries,
        {"terms": 2},
        {"terms": NOT_POSITIVE, "step_size": [0, -1, "1", True, np.inf]},
    ),
    "OneOf": (
        lambda augmentations=(eqd.Flip(),), per_batch=False: eqd.OneOf(
            *augmentations, per_batch=per_batch
        ),
        {},
        {"augmentations": [[], ["flip"], [eqd.Flip]], "per_batch": [1, "yes", None]},
    ),
    "Outcome": (eqd.Outcome, {"state": None}, {"fitted": [None, CLASSIFIER]}),
    "Packed": (
        eqd.Packed,
        {"small": DISTILLED, "shape": (6, 6)},
        {"small": NO_START, "shape": [3, "6", (4, 4), (6.0, 6), ()]},
    ),
    "Packed.from_distilled": (
        eqd.Packed.from_distilled,
        {"distilled": DISTILLED},
        {"distilled": NO_START, "factor": [0, 2, 1.5, "3", None]},
    ),
    "Pool": (
        lambda networks=(network,), **kwargs: eqd.Pool(*networks, **kwargs),
        {"num_classes": 3},
        {
            "networks": [(), [network, "MLP"], [3]],
            "num_classes": NOT_POSITIVE,
            "inner": NO_SOLVER,
            "size": NOT_POSITIVE,
            "max_age": NOT_POSITIVE,
            "optimiser": ["adam", optax.adam, None],
            "augmentation": ["flip", eqd.Flip],
        },
    ),
    "Pool, used": (
        lambda networks=(network,), key=KEY, model=None: eqd.fit(
            SQUARED, model, eqd.Pool(*networks, num_classes=3), key=key
        ),
        {},
        {"networks": [(network,)], "key": KEYS, "model": [CLASSIFIER, Plain()]},
    ),
    "PoolState": (
        eqd.PoolState,
        {"weights": (jnp.ones((2, 2)),), "training": (), "ages": ()},
        {"weights": [None, (1,)], "ages": [None, (1,), (jnp.zeros(3),)]},
    ),
    "Problem": (
        eqd.Problem,
        {
            "start": DISTILLED,
            "model": CLASSIFIER,
            "data": DATA,
            "optimiser": ADAM,
        },
        {"start": NO_START, "data": NO_DATA}
        | {name: bad for name, bad in BAD_OUTER.items() if name != "train"},
    ),
    "Problem.init": (
        eqd.Problem(DISTILLED, CLASSIFIER, DATA, optimiser=ADAM).init,
        {},
        {"key": KEYS[:-1]},
    ),
    "ProgressBar": (eqd.ProgressBar, {}, {"every": NOT_POSITIVE}),
    "RandomFeatures": (
        eqd.RandomFeatures,
        {"network": network, "num_classes": 3},
        {
            "network": [None, "MLP", 3],
            "num_classes": NOT_POSITIVE,
            "num_networks": NOT_POSITIVE,
            "inner": NO_SOLVER,
        },
    ),
    "RandomFeatures, used": (
        lambda network=network, key=KEY: eqd.fit(
            SQUARED, None, eqd.RandomFeatures(network, num_classes=3), key=key
        ),
        {},
        {"network": [network], "key": KEYS},
    ),
    "RandomInitialisation": (
        eqd.RandomInitialisation,
        {"network": network, "inner": DRAWING, "num_classes": 3},
        {
            "network": [None, "MLP", 3],
            "num_classes": NOT_POSITIVE,
            "inner": NO_SOLVER,
        },
    ),
    "RandomInitialisation, used": (
        lambda network=network, key=KEY, model=None: eqd.fit(
            DISTILLED,
            model,
            eqd.RandomInitialisation(network, DRAWING, num_classes=4),
            key=key,
        ),
        {},
        {"network": [network], "key": KEYS, "model": [CLASSIFIER]},
    ),
    "RandomWindow": (eqd.RandomWindow, {}, {"size": NOT_POSITIVE}),
    "RandomWindow.start": (
        eqd.RandomWindow(2).start,
        {"steps": 3, "norms": lambda: jnp.ones(3)},
        {"key": KEYS},
    ),
    "GradientWindow.start": (
        eqd.GradientWindow(2).start,
        {"steps": 3, "norms": lambda: jnp.ones(3)},
        {"key": KEYS},
    ),
    "RecursiveCheckpointAdjoint": (
        eqd.RecursiveCheckpointAdjoint,
        {},
        {"checkpoints": NOT_POSITIVE[:-1]},
    ),
    "RelativeRidge": (eqd.RelativeRidge, {}, {"inner": NO_SOLVER}),
    "RelativeRidge, used": (
        lambda model: eqd.fit(SQUARED, model, eqd.RelativeRidge()),
        {},
        {"model": [Plain(), *NO_CLASSIFIER]},
    ),
    "ReversibleSolver": (
        eqd.ReversibleSolver,
        {"learning_rate": 0.1, "steps": 2},
        {
            "learning_rate": [0, -1.0, "1", None, np.ones(3), [1.0, np.nan], {"a": 1}],
            "momentum": [0, 1, *NOT_NUMBERS],
            "steps": NOT_POSITIVE,
            "adjoint": ["direct", eqd.DirectAdjoint],
        },
    ),
    "RidgeSolver": (
        lambda distilled=SQUARED, model=CLASSIFIER: eqd.fit(
            distilled, model, eqd.RidgeSolver()
        ),
        {},
        {"distilled": [*NO_START, DISTILLED], "model": [*NO_CLASSIFIER, Plain()]},
    ),
    "SpanSolver": (
        eqd.SpanSolver,
        {},
        {"rtol": [-1, "1"], "atol": [-1, "1"], "max_steps": NOT_POSITIVE},
    ),
    "SpanSolver, used": (
        lambda distilled=DISTILLED, model=CLASSIFIER: eqd.fit(
            distilled, model, eqd.SpanSolver()
        ),
        {},
        {"distilled": [*NO_START, SQUARED], "model": [*NO_CLASSIFIER, Plain()]},
    ),
    "SquaredError": (
        eqd.SquaredError,
        {},
        {"temperature": [0, -1, "1", None, np.ones(2), np.nan, 1j]},
    ),
    "Standardisation": (
        eqd.Standardisation,
        {"mean": jnp.ones((1, 1)), "deviation": jnp.ones((1, 1))},
        {"mean": [None, 1.0], "deviation": [None, 1.0, jnp.ones((2, 1))]},
    ),
    "Standardisation.fit": (
        eqd.Standardisation.fit,
        {},
        {"train": [*NO_DATA, eqd.Dataset(np.ones((3, 2, 2)), LABELS[:3])]},
    ),
    "UnrolledSolver": (
        eqd.UnrolledSolver,
        {"make": optax.sgd, "hyperparameters": {"learning_rate": 0.1}, "steps": 2},
        {
            "make": [None, "adam", ADAM],
            "hyperparameters": [
                *(None, [0.1], 0.1, {"learning_rate": 0}, {"learning_rate": "a"}),
                *({"learning_rate": None}, {"learning_rate": [0.1, -1]}, {1: 0.1}),
            ],
            "steps": NOT_POSITIVE,
            "batch_size": NOT_POSITIVE[:-1],
            "shuffle": [1, "yes", None],
            "augmentation": ["flip", eqd.Flip],
            "window": [eqd.LastSteps(3), 2, "last", eqd.LastSteps],
            "adjoint": ["direct", eqd.DirectAdjoint, None],
        },
    ),
    "UnrolledSolver, used": (
        lambda batch_size=2, key=KEY, model=CLASSIFIER: (
            eqd.fit(
                DISTILLED,
                model,
                eqx.tree_at(lambda s: s.steps, DRAWING, 2, is_leaf=lambda x: x is None)
                if batch_size == 2
                else WIDE,
                key=key,
            )
            if False
            else eqd.fit(
                DISTILLED, model, WIDE if batch_size == 4 else DRAWING, key=key
            )
        ),
        {},
        {"batch_size": [4], "key": KEYS, "model": NO_CLASSIFIER},
    ),
    "WarmLBFGS": (
        eqd.WarmLBFGS,
        {},
        {
            "rtol": [-1, "1"],
            "atol": [-1, "1"],
            "norm": [None, "two"],
            "warm_up": [-1, 1.5, None, True],
            "learning_rate": [0, -1, *NOT_NUMBERS],
        },
    ),
    "ZCA": (
        eqd.ZCA,
        {"mean": jnp.ones((1, 2)), "whitening": jnp.eye(2), "regularisation": 0.1},
        {
            "mean": [None, 1.0],
            "whitening": [None, np.eye(2), jnp.ones((2, 3))],
            "regularisation": ["1", None, True],
        },
    ),
    "ZCA.fit": (
        eqd.ZCA.fit,
        {"train": DATA},
        {"train": NO_DATA, "regularisation": [0, -1, *NOT_NUMBERS]},
    ),
    "augment": (
        eqd.augment,
        {"augmentation": eqd.Flip(), "images": jnp.asarray(IMAGES), "key": KEY},
        {
            "augmentation": [None, "flip", eqd.Flip],
            "images": [None, IMAGES, jnp.ones(3, int), IMAGES.tolist()],
            "key": KEYS,
            "siamese": [1, "yes", None],
        },
    ),
    **{
        f"{type(a).__name__}.__call__": (
            a,
            {"image": jnp.asarray(IMAGES[0]), "key": KEY},
            {"key": KEYS, "image": [None, IMAGES[0], jnp.ones(3)]},
        )
        for a in (
            *(eqd.Affine(), eqd.ColourJitter(), eqd.Compose(eqd.Flip()), eqd.Crop(1)),
            *(eqd.Cutout(1), eqd.Flip(), eqd.OneOf(eqd.Flip())),
        )
    },
    "average_of": (eqd.average_of, {}, {"result": [None, DISTILLED]}),
    "averaged": (
        eqd.averaged,
        {"optimiser": ADAM, "decay": 0.5},
        {"optimiser": [None, "adam", optax.adam], "decay": [0, 1, 2, *NOT_NUMBERS]},
    ),
    "clip_by_running_norm": (
        eqd.clip_by_running_norm,
        {},
        {"factor": [0, -1, *NOT_NUMBERS], "decay": [1, -1, *NOT_NUMBERS]},
    ),
    "cross_entropy": (
        eqd.cross_entropy,
        {"logits": jnp.zeros((2, 3)), "labels": jnp.array([0, 1])},
        {
            "logits": [None, jnp.zeros(3), jnp.zeros((2, 3), int), np.zeros((2, 3))],
            "labels": [
                *(None, jnp.zeros(3, int), jnp.zeros((2, 4)), jnp.array([0, 3])),
                *([0, 1], jnp.array([True, False])),
            ],
        },
    ),
    "distill": (
        eqd.distill,
        OUTER,
        BAD_OUTER
        | {
            "start": NO_START,
            "steps": NOT_POSITIVE,
            "callbacks": [3, "log", [print], [eqd.Log]],
            "key": KEYS[:-1],
            "state": [3, "state", DISTILLED],
        },
    ),
    "distill, with a pool": (
        ft.partial(eqd.distill, inner=eqd.Pool(network, num_classes=3)),
        {"start": SQUARED, "model": None, "train": DATA, "key": KEY},
        {"key": KEYS, "model": [CLASSIFIER], "start": NO_START, "train": NO_DATA},
    ),
    "distill, of an unrolled run": (
        ft.partial(eqd.distill, inner=DRAWING),
        OUTER | {"key": KEY},
        {"key": KEYS, "start": NO_START, "train": [*NO_DATA, OTHER_DATA]},
    ),
    "distill_each": (
        eqd.distill_each,
        {"starts": [DISTILLED], "model": CLASSIFIER, "train": DATA},
        BAD_OUTER
        | {
            "starts": [[], 3, None, [DISTILLED, SQUARED]],
            "steps": NOT_POSITIVE,
            "key": KEYS[:-1],
        },
    ),
    "distill_exactly": (
        eqd.distill_exactly,
        {"start": DISTILLED, "model": CLASSIFIER},
        {
            "start": [None, IMAGES, SQUARED],
            "model": [None, Plain(), "network"],
            "l2": ["1", True],
        },
    ),
    "evaluate": (
        eqd.evaluate,
        FIT | {"test": DATA},
        {
            "distilled": NO_START,
            "model": [*NO_CLASSIFIER, eqd.LogisticRegression(9, 2)],
            "test": [*NO_DATA, OTHER_DATA, eqd.FullBatch(DATA)],
            "inner": NO_SOLVER,
            "key": KEYS[:-1],
        },
    ),
    "export": (
        eqd.export,
        {"folder": "x", "distilled": DISTILLED},
        {
            "folder": [None, 3],
            "distilled": [None, IMAGES],
            "class_names": [3, ["a"], [1, 2, 3], ["a/b", "c", "d"], ["a", "a", "b"]],
        },
    ),
    "fit": (
        eqd.fit,
        FIT,
        {
            "distilled": NO_START,
            "model": NO_CLASSIFIER,
            "inner": NO_SOLVER,
            "key": KEYS[:-1],
            "throw": [1, "yes", None],
        },
    ),
    "hypergradient_error": (
        eqd.hypergradient_error,
        {"start": DISTILLED, "model": CLASSIFIER, "data": DATA},
        {
            "start": NO_START,
            "model": NO_CLASSIFIER,
            "data": [*NO_DATA, OTHER_DATA, eqd.FullBatch(DATA)],
            "inner": NO_SOLVER,
            "reference": NO_SOLVER[1:],
            "key": KEYS[:-1],
        },
    ),
    "inner_loss": (
        eqd.inner_loss,
        FIT,
        {
            "distilled": NO_START,
            "model": [None, "network", Plain],
            "key": KEYS[:-1],
        },
    ),
    "last_layer": (
        eqd.last_layer,
        {"network": eqd.nn.MLP((3, 3), 3, widths=(), key=KEY)},
        {"network": [None, "MLP", Plain()], "where": [None, "head", lambda x: x]},
    ),
    "load": (eqd.load, {}, {"path": [None, 3, "no such file", ["a"]]}),
    "outer_loss": (
        eqd.outer_loss,
        {"start": DISTILLED, "model": CLASSIFIER, "data": DATA},
        {
            "start": NO_START,
            "model": NO_CLASSIFIER,
            "data": [*NO_DATA, OTHER_DATA],
            "inner": NO_SOLVER,
            "step": ["0", 1.5, None],
            "key": KEYS[:-1],
        },
    ),
    "save": (
        eqd.save,
        {
            "path": FOLDER / "x.safetensors",
            "result": DISTILLED,
            "model": CLASSIFIER,
        },
        {
            "path": [None, 3, "x.npz", "no such folder/x.safetensors"],
            "result": [None, IMAGES, "result"],
            "model": NO_CLASSIFIER,
            "evaluation": [0.9, "90%"],
            "inner": NO_SOLVER,
            "preprocessing": [jnp.sqrt, "zca"],
            "dataset": [3, DATA],
            "seed": ["0", 1.5, True],
        },
    ),
    "whitened": (
        eqd.whitened,
        {"optimiser": ADAM, "train": DATA},
        {
            "optimiser": [None, "adam", optax.adam],
            "train": NO_DATA,
            "damping": [0, -1, *NOT_NUMBERS],
            "scale": [0, -1, *NOT_NUMBERS],
        },
    ),
    "nn.AlexNet": with_norm(eqd.nn.AlexNet),
    "nn.ResNet18": with_norm(eqd.nn.ResNet18),
    "nn.VGG11": with_norm(eqd.nn.VGG11),
    "nn.LeNet": (eqd.nn.LeNet, *NETWORK),
    "nn.MLP": (
        eqd.nn.MLP,
        SHAPED,
        {
            "shape": [3, "33", (0, 3), (3.0, 3)],
            "num_classes": NOT_POSITIVE,
            "widths": [3, "3", [0], [2.5], [None]],
            "activation": ["relu", 3],
            "key": KEYS,
        },
    ),
    "nn.ConvNet": (
        eqd.nn.ConvNet,
        SHAPED | {"widths": (2,)},
        {
            "shape": SHAPES[:-1],
            "num_classes": NOT_POSITIVE,
            "widths": [3, "3", [0], [2.5], (2, 2, 2)],
            "norm_last": [1, "yes", None],
            "pool": ["max", None],
            "size": [2, 0, "32", 3.5],
            "key": KEYS,
        }
        | NORMS,
    ),
    "nn.Conv2d": (
        eqd.nn.Conv2d,
        {"in_channels": 1, "out_channels": 1, "kernel_size": 3, "key": KEY},
        {
            "in_channels": NOT_POSITIVE,
            "out_channels": NOT_POSITIVE,
            "kernel_size": [0, "3", None, 2.5, (3, 3, 3)],
            "stride": [0, "1", None, 1.5, (1, 1, 1)],
            "padding": [None, 1.5, "SAMEISH", (1, 1, 1)],
            "dilation": [0, "1", None, (1, 1, 1)],
            "groups": [0, 2, "1", None],
            "use_bias": [1, "yes", None],
            "padding_mode": [None, 0, "ZERO"],
            "key": KEYS,
        },
    ),
    "nn.Conv2d.__call__": (
        eqd.nn.Conv2d(1, 1, 3, key=KEY),
        {},
        {"image": [None, IMAGES[0], jnp.ones((3, 3)), jnp.ones((1, 2, 2))]},
    ),
    "nn.Conv2d.of": (eqd.nn.Conv2d.of, {}, {"convolution": [None, 3, Plain()]}),
    "nn.Network": (
        eqd.nn.Network,
        {"layers": eqx.nn.Sequential([]), "architecture": "a", "settings": ()},
        {"layers": [None, []], "architecture": [None, 3], "settings": [None, {}]},
    ),
    "nn.Network.__call__": (
        eqd.nn.MLP((3, 3), 3, widths=(), key=KEY),
        {},
        {"image": [None, IMAGES[0], jnp.ones((2, 3))]},
    ),
    "nn.group_norm": (eqd.nn.group_norm, {}, {"channels": [*NOT_POSITIVE, 3]}),
    "nn.instance_norm": (eqd.nn.instance_norm, {}, {"channels": NOT_POSITIVE}),
    "nn.initialise": (
        eqd.nn.initialise,
        {
            "network": eqd.nn.MLP((3, 3), 3, widths=(), key=KEY),
            "initialiser": eqd.nn.he,
            "key": KEY,
        },
        {
            "network": [None, Plain()],
            "initialiser": [None, "he"],
            "key": KEYS,
        },
    ),
    "nn.zero_head": (eqd.nn.zero_head, {}, {"network": [None, Plain()]}),
    "recipes.Evaluations": (
        eqd.recipes.Evaluations,
        {"accuracies": np.ones((1, 2))},
        {"accuracies": [None, [0.9], np.ones(2)], "key": [0, "key"]},
    ),
    "recipes.Recipe": (
        eqd.recipes.Recipe,
        {
            "name": "a",
            "settings": (),
            "network": network,
            "initialise": network,
            "prepare": network,
            "inner": DRAWING,
        },
        {
            "name": [None, 3],
            "settings": [None, {}],
            "network": [None, "MLP"],
            "initialise": [None, "he"],
            "prepare": [None, "a"],
            "inner": NO_SOLVER,
        },
    ),
    "recipes.Recipe.make": (RECIPE.make, SHAPED, {"key": KEYS, "num_classes": ["3"]}),
    "recipes.augmentation_robust_score": (
        eqd.recipes.augmentation_robust_score,
        {"improvement_with": 0.1, "improvement_without": 0.1},
        {"improvement_with": [2, "a"], "improvement_without": [-2, None]} | WEIGHT,
    ),
    "recipes.label_robust_score": (
        eqd.recipes.label_robust_score,
        {"hard_label_recovery": 0.1, "improvement_over_random": 0.1},
        {"hard_label_recovery": [2, "a"], "improvement_over_random": [2, None]}
        | WEIGHT,
    ),
    "recipes.dc": (eqd.recipes.dc, {}, UPDATES | AUGMENT),
    "recipes.frepo": (eqd.recipes.frepo, {}, UPDATES | AUGMENT),
    "recipes.zero_start": (eqd.recipes.zero_start, {}, UPDATES),
    "recipes.feature_regression": (eqd.recipes.feature_regression, {}, UPDATES),
    "recipes.supervised": (
        eqd.recipes.supervised,
        {},
        UPDATES | {"batch_size": NOT_POSITIVE},
    ),
    "recipes.learned_rates": (
        eqd.recipes.learned_rates,
        {"learning_rates": [0.1, 0.2], "batch_size": 2},
        {
            "network": ["LeNet", None],
            "learning_rates": [0.1, "a", [], [0.1, -1], ["a"], None, np.ones((2, 2))],
            "batch_size": NOT_POSITIVE,
            "momentum": [1, -1, *NOT_NUMBERS],
            "adam": ["sgd", 1.5],
            "seed": ["0", 1.5, True],
        },
    ),
    "recipes.evaluate": (
        eqd.recipes.evaluate,
        {"distilled": DISTILLED, "recipe": RECIPE, "test": DATA, "key": KEY},
        {
            "distilled": [None, [], [IMAGES], IMAGES],
            "recipe": [None, "dc", eqd.recipes.dc],
            "test": NO_DATA,
            "num_networks": NOT_POSITIVE,
            "key": KEYS,
        },
    ),
    "datasets.load": (
        eqd.datasets.load,
        {"name": "mnist"},
        {"name": ["emnist", 3, None], "data_dir": [3, "no such folder"]},
    ),
    "datasets.from_folder": (
        eqd.datasets.from_folder,
        {"path": FOLDER},
        {
            "path": ["no such folder", None, 3, __file__],
            "size": [0, "28", (0, 28), (28,), (28.0, 28)],
        },
    ),
    "plot.images": (
        eqd.plot.images,
        {"distilled": DISTILLED},
        {
            "distilled": [*NO_START, eqd.DistilledSet(np.ones((1, 3)), [0], l2=1)],
            "columns": NOT_POSITIVE[:-1],
            "ax": [3, "axes", [None]],
        },
    ),
    "plot.history": (
        eqd.plot.history,
        {"history": HISTORY},
        {"history": [None, [1.0]], "ax": [3, "axes", [1, 2], [None]]},
    ),
}

# These take no arguments, or any at all; or they are for others to derive from.
NOTHING_TO_REFUSE = {
    *(name for name in dir(eqd) if name.startswith("Abstract")),
    *("DirectAdjoint", "ForwardAdjoint", "Frozen", "HasPenalised", "parameters"),
    "nn.quick_convolutions",
    # Equinox's pools and JAX's initialisers.
    *("nn.average_pool", "nn.max_pool", "nn.he", "nn.lecun"),
}
FLAT = [
    pytest.param(call, good, argument, bad, id=f"{name}-{argument}-{i}")
    for name, (call, good, table) in CASES.items()
    for argument, values in table.items()
    for i, bad in enumerate(values)
]


@pytest.mark.parametrize(("call", "good", "argument", "bad"), FLAT)
def test_refusal(call, good, argument, bad):
    with pytest.raises((TypeError, ValueError, OSError)) as info:
        call(**good | {argument: bad})
    line, *_ = str(info.value).splitlines()
    assert f"`{argument}" in line
    assert len(line) <= 300
    assert "must" in line
    # No values of arrays.
    assert not re.search(r"rray\(|\s\[\[|\d\.\d*,? +\d", line)
    if argument == "key":
        assert "jax.random.key(0)" in line or bad is None
    assert str(info.value) == line


def test_every_public_name_is_here():
    public = {
        f"{prefix}{name}"
        for prefix, module in {
            "": eqd,
            "nn.": eqd.nn,
            "recipes.": eqd.recipes,
        }.items()
        for name, x in vars(module).items()
        if name[0] != "_" and callable(x) and not isinstance(x, types.ModuleType)
    }
    public |= {"datasets.load", "datasets.from_folder", "plot.images", "plot.history"}
    public -= {"install_import_hook"}
    named = {name.split(",")[0] for name in CASES}
    assert public - named - NOTHING_TO_REFUSE == set()
    assert public >= NOTHING_TO_REFUSE
    assert len(FLAT) >= 200


def test_one_line_and_no_pages():
    images = [[[0.0] * 28] * 28] * 6000
    with pytest.raises(TypeError) as info:
        eqd.augment(eqd.Flip(), images, key=KEY)
    assert str(info.value) == (
        "`images` of `augment` must be `Float[Array, 'n *shape']`; got a list of "
        "length 6000 of list."
    )
    text = "".join(traceback.format_exception(info.value))
    assert "During handling" not in text
    assert "direct cause" not in text
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


def test_shapes_that_do_not_fit():
    match = r"`labels` of .* got a JAX array of float32 .*\(4, 2\), where `logits` has"
    with pytest.raises(TypeError, match=match):
        eqd.cross_entropy(jnp.zeros((3, 2)), jnp.zeros((4, 2)))


def test_results_are_checked():
    @jaxtyped(typechecker=typechecked)
    def counts(x: int) -> int:
        return str(x)  # pyright: ignore[reportReturnType]

    with pytest.raises(TypeError, match="must return an integer; got a str"):
        counts(3)


def test_one_wrong_item_of_many():
    # Beartype looks at one of them only.
    for _ in range(10):
        with pytest.raises(TypeError, match="`widths`"):
            eqd.nn.MLP(**SHAPED, widths=[1, 1, 1, 1, 1, 2.5])
        with pytest.raises(TypeError, match="`callbacks`"):
            eqd.distill(**OUTER, callbacks=[eqd.Log(), eqd.Log(), print])
        with pytest.raises(TypeError, match="`networks`"):
            eqd.Pool(network, network, network, "MLP", num_classes=3)


def test_lists():
    dataset = eqd.Dataset(IMAGES.tolist(), LABELS.tolist(), class_names=["a", "b", "c"])
    np.testing.assert_array_equal(dataset.images, IMAGES)
    assert dataset.class_names == ("a", "b", "c")
    assert hash(dataset.class_names)
    distilled = eqd.DistilledSet(IMAGES.tolist(), tuple(LABELS.tolist()), l2=1)
    np.testing.assert_array_equal(distilled.images, IMAGES)
    assert distilled.images.dtype == jnp.float32
    assert distilled.labels.dtype == jnp.int32
    traced = jax.jit(lambda x: eqd.DistilledSet([x, 2 * x], [0, 1], l2=0.1).images)
    np.testing.assert_array_equal(traced(IMAGES[0])[1], 2 * IMAGES[0])
    solver = eqd.UnrolledSolver(optax.sgd, {"learning_rate": [0.1, 0.2]}, 2)
    assert solver.log_hyperparameters["learning_rate"].shape == (2,)
    assert eqd.ReversibleSolver([0.1, 0.2], steps=2).log_learning_rate.shape == (2,)
    rates = [
        eqd.recipes.learned_rates(learning_rates=x([0.25, 0.5]), batch_size=2)
        for x in (list, tuple, np.array, jnp.array)
    ]
    assert {recipe.settings for recipe in rates} == {rates[0].settings}
    assert eqd.Packed(DISTILLED, [6, 6]).shape == (6, 6)
    assert eqd.Frequencies(DISTILLED, [6, 6]).shape == (6, 6)


# Modules with numbers: what they are given, and which of them they keep.
THREE, ONE, HALF = np.int64(3), np.int32(1), np.float32(0.5)
NUMBERS = [
    (eqd.SpanSolver(rtol=1, max_steps=THREE), ("rtol", "max_steps")),
    (eqd.ArgminSolver(max_steps=THREE, tolerance=HALF), ("max_steps", "tolerance")),
    (eqd.DampedCG(accept=1, max_steps=THREE), ("accept", "max_steps")),
    (eqd.WarmLBFGS(warm_up=THREE, learning_rate=1), ("warm_up", "learning_rate")),
    (eqd.Pool(network, num_classes=THREE, size=THREE), ("num_classes", "size")),
    (eqd.RandomFeatures(network, num_classes=THREE), ("num_classes",)),
    (eqd.RandomInitialisation(network, DRAWING, num_classes=THREE), ("num_classes",)),
    (eqd.UnrolledSolver(optax.sgd, {}, THREE, batch_size=ONE), ("steps", "batch_size")),
    (eqd.ReversibleSolver(1, momentum=HALF, steps=THREE), ("steps",)),
    (eqd.LastSteps(THREE), ("size",)),
    (eqd.GradientWindow(THREE, HALF), ("size", "power")),
    (eqd.NeumannSeries(THREE, step_size=HALF), ("terms", "step_size")),
    (eqd.RecursiveCheckpointAdjoint(THREE), ("checkpoints",)),
    (eqd.Affine(shift=THREE, scale=THREE), ("shift", "scale")),
    (eqd.Flip(ONE), ("probability",)),
    (eqd.Crop(THREE), ("padding",)),
    (eqd.Batches(DATA, THREE), ("size",)),
    (eqd.Dataset(IMAGES, LABELS, THREE), ("num_classes",)),
    (eqd.Log(every=THREE), ("every",)),
    (eqd.EarlyStopping(DATA, every=THREE, patience=ONE), ("every", "patience")),
    (PROBLEM(tolerance=1), ("tolerance",)),
]


@pytest.mark.parametrize(("module", "names"), NUMBERS)
def test_numbers_of_numpy(module, names):
    """Compiled programs would take NumPy's for arrays."""
    assert {type(getattr(module, name)) for name in names} <= {int, float}


def test_numbers_of_numpy_in_functions():
    for make in (eqd.nn.MLP, eqd.nn.ConvNet):
        made = make((THREE, THREE), THREE, widths=[np.int32(2)], key=KEY)
        wanted = make((3, 3), 3, widths=(2,), key=KEY)
        assert repr(made.settings) == repr(wanted.settings)
        assert eqx.tree_equal(made, wanted)
    made = eqd.nn.Conv2d(*[np.int64(1)] * 2, THREE, [THREE, 1], THREE, key=KEY)
    assert eqx.tree_equal(made, eqd.nn.Conv2d(1, 1, 3, (3, 1), 3, key=KEY))
    made = eqd.LogisticRegression(np.int64(9), THREE)
    assert eqx.tree_equal(made, CLASSIFIER)
    found = eqd.distill(**OUTER, steps=np.int64(1), tolerance=np.float32(1e9))
    assert found.converged
