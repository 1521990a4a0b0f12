"""Every public argument refuses a wrong value in one line, which names the argument."""

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

import eqdistill as eqd
from eqdistill._classifier import Frozen
from eqdistill._outer._distillation import History


IMAGES = np.arange(108, dtype=np.float32).reshape(12, 3, 3)
LABELS = np.arange(12) % 3
KEY = jr.key(0)
ADAM = optax.adam(0.1)
DATA = eqd.Dataset(IMAGES, LABELS)
OTHER_DATA = eqd.Dataset(IMAGES[:, :2], LABELS)
HARD = eqd.DistilledSet(IMAGES[:3], LABELS[:3], l2=0.1)
TARGETS = HARD.with_targets(3)
LEVELS = eqd.Pyramid.from_distilled(HARD).levels
MODEL = eqd.linear.LogisticRegression(9, 3)
WRONG_MODEL = eqd.linear.LogisticRegression(8, 3)
OBJECTIVE = eqd.Bilevel(MODEL)
PROBLEM = eqd.Problem(HARD, OBJECTIVE, optimiser=ADAM)
STATE = PROBLEM.init(key=KEY)
OTHER_STATE = eqx.tree_at(lambda s: s.learned, STATE, None)
HISTORY = History(*np.zeros((2, 2), np.float32), {})
FOLDER = pathlib.Path(__file__).parent
SCALAR, FLAG, COUNT = jnp.zeros(()), jnp.array(True), jnp.array(0)
MAKE = ft.partial(eqd.nn.MLP, (3, 3), 3, widths=())
NETWORK = MAKE(key=KEY)


class Plain(eqx.Module):
    """A network that is not linear in its parameters."""

    weight: jax.Array = eqx.field(default_factory=lambda: jnp.ones((3, 9)))

    def __call__(self, image):
        return jnp.tanh(self.weight @ image.reshape(-1))


# What is called, with which good arguments, and which values are wrong although their
# types are right. All other arguments are given an `object`, unless they are in `free`,
# because any type suits them.
CASES: list[tuple] = []


def case(fn, good=None, free="", **wrong):
    CASES.append((fn, good or {}, free.split(), wrong))


def used(inner):
    """Fits a model with an inner solver."""
    return lambda distilled, model: eqd.fit(distilled, model, inner)


shaped = {"shape": (3, 3), "num_classes": 3, "key": KEY}
from_train = {"train": DATA, "l2": 0.1, "key": KEY}
image = {"image": jnp.asarray(IMAGES[0]), "key": KEY}
problem = {"start": HARD, "objective": OBJECTIVE, "optimiser": ADAM}
bad_problem = {"learn": lambda s: s.x, "learn_objective": lambda o: o.x}
fit = {"distilled": HARD, "model": MODEL}
nets = (eqd.nn.AlexNet, eqd.nn.LeNet, eqd.nn.MLP, eqd.nn.ResNet18, eqd.nn.VGG11)

# fmt: off
case(eqd.Dataset, {"images": IMAGES, "labels": LABELS}, images=IMAGES[:0],
     labels=LABELS - 1, num_classes=1, class_names=("a", "b"))
case(DATA.split, {"fraction": 0.5, "key": KEY}, fraction=1, key=jr.split(KEY))
case(DATA.map, {"fn": lambda x: x}, chunk_bytes=0)
case(eqd.DistilledSet, {"images": IMAGES, "labels": LABELS, "l2": 0.1},
     images=IMAGES + np.nan, labels=LABELS + 0.5, l2=0, loss=eqd.CrossEntropy,
     class_names=["a", "b"])
case(HARD.with_targets, {"num_classes": 3}, num_classes=2)
case(eqd.DistilledSet.from_noise, from_train | {"scale": 1.0}, n=0, l2=0, scale=0)
case(eqd.DistilledSet.from_real, from_train, n=0, l2=0)
case(eqd.DistilledSet.from_class_means, from_train, n=0, l2=0)
case(eqd.DistilledSet.from_kmeans, from_train, n=0, l2=0)
case(eqd.DistilledSet.from_herding, from_train, n=0, l2=0)
case(eqd.Packed, {"small": HARD, "shape": (6, 6)}, shape=(4, 4))
case(eqd.Packed.from_distilled, {"distilled": HARD}, factor=2)
case(eqd.Pyramid, {"levels": LEVELS, "shape": (3, 3)}, levels=HARD, shape=(9,))
case(eqd.Pyramid.from_distilled, {"distilled": HARD}, num_levels=0)
case(eqd.BinaryCrossEntropy)
case(eqd.CrossEntropy, temperature=0)

source = {"source": [(IMAGES, LABELS)], "num_classes": 3}
case(eqd.datasets.Stream, source, num_classes=0, ahead=-1, chunk_bytes=0)
case(eqd.datasets.Accumulated, source | {"num_batches": 1}, num_batches=0,
     num_classes=0, chunk_bytes=0)

case(eqd.fit, fit, model=WRONG_MODEL, inner=eqd.linear.SpanSolver, key=jr.PRNGKey(0))
case(eqd.inner_loss, fit, model=Plain)
case(eqd.Fitted, {"model": MODEL, "converged": FLAG, "gradient_norm": SCALAR}, "model",
     converged=True)
case(eqd.ArgminSolver, max_steps=0, tolerance=-1)
case(eqd.UnrolledSolver, {"make": optax.sgd, "hyperparameters": {"learning_rate": 0.1},
     "steps": 2}, make=ADAM, hyperparameters={"learning_rate": 0}, steps=0,
     batch_size=0, window=eqd.adjoints.LastSteps(3))
case(eqd.Fresh, {"make": MAKE}, make=NETWORK)
case(eqd.Pool, {"makes": (MAKE,)}, makes=(MAKE, eqd.nn.MLP), weights=[1.0, -1.0],
     size=0, max_age=0)
case(eqd.RandomFeatures, {"make": MAKE}, make=eqd.nn.MLP, num_networks=0)

case(eqd.Bilevel, {"model": MODEL}, "model")
case(eqd.InTurn, {"objectives": (OBJECTIVE,)}, objectives=(), order=[1])
case(eqd.Rounds, {"objective": OBJECTIVE, "steps": 2, "examples": 2}, steps=0,
     examples=0)
case(eqd.Outcome, {"state": None, "failure": COUNT, "metrics": {}}, "state", failure=0)
case(eqd.Cached, {"features": jnp.ravel, "name": "a"})
case(eqd.FullBatch, {"dataset": DATA}, cached=2 * [eqd.Cached(jnp.ravel, "a")],
     chunk_bytes=0)
case(eqd.Batches, {"dataset": DATA, "size": 2}, size=13, chunk_bytes=0,
     augmentation=eqd.augment.Flip, cached=2 * [eqd.Cached(jnp.ravel, "a")])
case(eqd.Problem, problem, **bad_problem)
case(PROBLEM.init, {"key": KEY}, key=jr.PRNGKey(0))
case(PROBLEM.step, {"state": STATE, "data": eqd.FullBatch(DATA)},
     data=eqd.FullBatch(OTHER_DATA))
case(eqd.distill, problem | {"data": DATA}, "objective", **bad_problem, steps=0,
     data=OTHER_DATA, callbacks=[eqd.ProgressBar], state=OTHER_STATE)
case(eqd.averaged, {"optimiser": ADAM, "decay": 0.5}, decay=1)
case(eqd.DistillationError, {"message": "a", "distillation": None})
case(eqd.EarlyStopping, {"data": DATA}, every=0, patience=0)
case(eqd.ProgressBar, every=0)
case(eqd.evaluate, {"distilled": HARD, "recipe": MODEL, "test": DATA}, distilled=[],
     recipe=eqd.recipes.dc, test=OTHER_DATA, num_models=0)

case(eqd.Checkpoints, {"directory": "x"}, every=0, keep=0)
case(eqd.export, {"folder": "x", "distilled": HARD},
     distilled=eqd.DistilledSet(IMAGES[:2], [0, 1], l2=1, class_names=["a/b", "c"]))
case(eqd.load, {"path": "x"}, path="no such file")
case(eqd.save, {"path": FOLDER / "x.safetensors", "result": HARD}, path="x.npz")

case(eqd.linear.LinearClassifier, {"features": jnp.ravel, "head": MODEL.head})
case(MODEL, {"image": image["image"]}, image=jnp.ones((2, 2)))
case(eqd.linear.LogisticRegression, {"in_features": 9, "num_classes": 3}, in_features=0,
     num_classes=0, dtype=int)
case(eqd.linear.last_layer, {"network": NETWORK}, network=Plain(), where=lambda x: x)
case(eqd.linear.SpanSolver, rtol=-1, atol=-1, max_steps=0)
case(used(eqd.linear.SpanSolver()), fit, distilled=TARGETS, model=Plain())
case(used(eqd.linear.RidgeSolver()), fit | {"distilled": TARGETS}, distilled=HARD,
     model=Plain())
case(eqd.linear.RelativeRidge)
case(used(eqd.linear.RelativeRidge()), fit | {"distilled": TARGETS}, model=Plain())
case(used(eqd.linear.LinearisedSolver()), fit | {"distilled": TARGETS}, distilled=HARD)
case(eqd.linear.Linearised, {"network": Frozen(MODEL), "tangent": []})
case(eqd.linear.distill_exactly, {"start": HARD, "model": MODEL}, start=TARGETS,
     model=Plain(), l2=True)
case(eqd.linear.hypergradient_error, {"start": HARD, "model": MODEL, "data": DATA},
     model=WRONG_MODEL)
case(eqd.linear.HypergradientError,
     dict.fromkeys(["norm", "error", "bound", "inner_residual"], 1.0))
case(eqd.linear.whitened, {"optimiser": ADAM, "train": DATA}, damping=0, scale=0)

case(eqd.adjoints.DampedCG, rtol=-1, accept=-1, max_residual=-1, max_steps=0)
case(eqd.adjoints.NeumannSeries, {"terms": 2}, terms=0, step_size=0)
case(eqd.adjoints.ReversibleSolver, {"learning_rate": 0.1, "steps": 2}, momentum=1,
     learning_rate=[1.0, np.nan], steps=0)
case(eqd.adjoints.RecursiveCheckpointAdjoint, checkpoints=0)
case(eqd.adjoints.LBFGS, rtol=-1, atol=-1)
case(eqd.adjoints.GradientWindow, {"size": 2}, size=0, power=np.nan)
case(eqd.adjoints.LastSteps, {"size": 2}, size=0)
case(eqd.adjoints.RandomWindow, {"size": 2}, size=0)
case(eqd.adjoints.clip_by_running_norm, factor=0, decay=1)

case(eqd.augment.augment, {"augmentation": eqd.augment.Flip(), "key": KEY,
     "images": jnp.asarray(IMAGES)}, images=IMAGES, key=jr.PRNGKey(0))
case(eqd.augment.Affine, shift=-1, rotation=-1, scale=-1)
case(eqd.augment.ColourJitter, brightness=-1, saturation=-1, contrast=-1)
case(eqd.augment.Compose, augmentations=(eqd.augment.Flip,))
case(eqd.augment.OneOf, {"augmentations": (eqd.augment.Flip(),)}, augmentations=())
case(eqd.augment.Crop, {"padding": 1}, padding=-1)
case(eqd.augment.Cutout, {"size": 1}, size=-1)
case(eqd.augment.Flip, probability=2)
case(eqd.augment.AugmentedFit, {"augmentation": eqd.augment.Flip(), "copies": 2},
     copies=0)
for a in (eqd.augment.Affine(), eqd.augment.ColourJitter(), eqd.augment.Cutout(1),
          eqd.augment.Crop(1), eqd.augment.Compose(eqd.augment.Flip()),
          eqd.augment.Flip(), eqd.augment.OneOf(eqd.augment.Flip())):
    case(a, image, image=jnp.ones(3))

case(eqd.datasets.load, {"name": "mnist"}, name="emnist", data_dir="no such folder")
case(eqd.datasets.from_folder, {"path": FOLDER}, path="no such folder", size=(0, 28),
     class_names=["x"])
case(eqd.datasets.Standardisation, dict.fromkeys(["mean", "deviation"],
     jnp.ones((1, 1))), mean=np.ones(3), deviation=jnp.ones((2, 1)))
case(eqd.datasets.Standardisation.fit, {"train": DATA},
     train=eqd.Dataset(np.ones((3, 2, 2)), LABELS[:3]))
case(eqd.datasets.ZCA, {"mean": jnp.ones((1, 2)), "whitening": jnp.eye(2),
     "regularisation": 0.1}, whitening=jnp.ones((2, 3)), regularisation=True)
case(eqd.datasets.ZCA.fit, {"train": DATA}, regularisation=0)

for net in nets:
    case(net, shaped, shape=(0, 3), num_classes=0)
case(eqd.nn.MLP, shaped, widths=[0])
case(eqd.nn.ConvNet, shaped | {"widths": (2,)}, shape=(1, 1, 3, 3), num_classes=0,
     widths=(2, 2, 2), size=2)
case(eqd.nn.Conv2d, {"in_channels": 1, "out_channels": 1, "kernel_size": 3, "key": KEY},
     "dtype", in_channels=0, out_channels=0, kernel_size=(3, 3, 3), stride=0, groups=2,
     padding="SAMEISH", dilation=0, padding_mode="ZERO")
case(eqd.nn.Conv2d(1, 1, 3, key=KEY), {"image": jnp.ones((1, 3, 3))},
     image=jnp.ones((1, 2, 2)))
case(eqd.nn.Conv2d.of, {}, convolution=Plain())
case(eqd.nn.Backbone, {"network": MODEL, "shape": (3, 3, 3)}, shape=(3, 3), mean=[0.5],
     deviation=[0, 1, 1])
case(eqd.nn.Backbone(MODEL, (3, 3, 3)), {}, image=jnp.ones((2, 3, 3)))
case(eqd.nn.Network, {"layers": eqx.nn.Sequential([]), "architecture": "a",
     "settings": ()})
case(NETWORK, {"image": image["image"]}, image=jnp.ones((2, 3)))
case(eqd.nn.group_norm, channels=3)
case(eqd.nn.instance_norm, channels=0)
case(eqd.nn.initialise, {"network": NETWORK, "initialiser": eqd.nn.he, "key": KEY})
case(eqd.nn.zero_head, {"network": NETWORK}, network=Plain())

case(eqd.recipes.Recipe, {"models": MODEL}, "models")
for recipe in (eqd.recipes.dc, eqd.recipes.frepo, eqd.recipes.zero_start,
               eqd.recipes.feature_regression):
    case(recipe, {"make": MAKE}, make=NETWORK, updates=0)
case(eqd.recipes.supervised, {"make": MAKE}, make=NETWORK, updates=1, batch_size=0)
case(eqd.recipes.learned_rates, {"make": MAKE, "learning_rates": [0.1, 0.2],
     "batch_size": 2}, learning_rates=[0.1, -1], batch_size=0, momentum=1)
case(eqd.recipes.augmentation_robust_score, {"improvement_with": 0.1,
     "improvement_without": 0.1}, improvement_with=2, improvement_without=-2, weight=2)
case(eqd.recipes.label_robust_score, {"hard_label_recovery": 0.1,
     "improvement_over_random": 0.1}, hard_label_recovery=2, improvement_over_random=2,
     weight=-1)
case(eqd.plot.images, {"distilled": HARD}, columns=0, ax=[None],
     distilled=eqd.DistilledSet(np.ones((1, 3)), [0], l2=1))
case(eqd.plot.history, {"history": HISTORY}, ax=[1, 2])
# fmt: on

# These take no arguments, or any; or users derive from them.
NOTHING_TO_REFUSE = {
    *("AutoSolver", "SquaredError", "RidgeSolver", "LinearisedSolver", "DirectAdjoint"),
    *("Frozen", "HasPenalised", "parameters", "fast_convolutions", "cite"),
    # Equinox's pools and JAX's initialisers.
    *("average_pool", "max_pool", "he", "lecun"),
}
MODULES = (eqd, eqd.adjoints, eqd.augment, eqd.linear, eqd.nn, eqd.recipes)


def name_of(fn):
    return getattr(fn, "__qualname__", type(fn).__qualname__).replace(".<locals>", "")


def flatten():
    for fn, good, free, wrong in CASES:
        for argument, parameter in inspect.signature(fn).parameters.items():
            is_many = parameter.kind is parameter.VAR_POSITIONAL
            bad = wrong.get(argument, (object(),) if is_many else object())
            if argument not in free:
                name = f"{name_of(fn)}-{argument}"
                yield pytest.param(fn, good | {argument: bad}, argument, id=name)


@pytest.mark.parametrize(("fn", "arguments", "argument"), [*flatten()])
def test_refusal(fn, arguments, argument):
    parameters = inspect.signature(fn).parameters
    bound = inspect.BoundArguments(inspect.signature(fn), {})
    bound.arguments = {x: arguments[x] for x in parameters if x in arguments}
    with pytest.raises((TypeError, ValueError, OSError)) as info:
        fn(*bound.args, **bound.kwargs)
    line = str(info.value)
    assert len(line.splitlines()) == 1
    assert len(line) <= 300
    assert f"`{argument}" in line
    assert "must" in line
    # No values of arrays.
    assert not re.search(r"rray\(|\s\[\[|\d\.\d*,? +\d", line)


def test_every_public_name_is_here():
    public = {
        name
        for module in MODULES
        for name, x in vars(module).items()
        if name[0] != "_" and callable(x) and not isinstance(x, types.ModuleType)
    }
    public -= {name for name in public if name.startswith("Abstract")}
    named = {name_of(fn) for fn, *_ in CASES}
    assert public - named - NOTHING_TO_REFUSE == set()
    assert public >= NOTHING_TO_REFUSE
    for fn, good, _, wrong in CASES:
        assert {*good, *wrong} <= {*inspect.signature(fn).parameters}


def test_one_line_and_no_pages():
    images = [[[0.0] * 28] * 28] * 6000
    with pytest.raises(TypeError) as info:
        eqd.augment.augment(eqd.augment.Flip(), images, key=KEY)
    assert str(info.value) == (
        "`images` of `augment` must be `Float[Array, 'n *shape']`; got a list of "
        "length 6000 (list)."
    )
    text = "".join(traceback.format_exception(info.value))
    assert "During handling" not in text
    assert "direct cause" not in text
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


def test_one_wrong_item_of_many():
    # Beartype looks at only one of them.
    for _ in range(10):
        with pytest.raises(TypeError, match="`widths`"):
            eqd.nn.MLP(**shaped, widths=[1, 1, 1, 1, 1, 2.5])
        with pytest.raises(TypeError, match="`makes`"):
            eqd.Pool(MAKE, MAKE, MAKE, "MLP")


def test_networks_and_functions_that_build_them():
    got = "got a Network .*missing a required argument: 'image'"
    with pytest.raises(TypeError, match=f"`make`.*partial.*ConvNet.*{got}"):
        eqd.Fresh(NETWORK)
    with pytest.raises(TypeError, match=r"`makes`.*`MLP` itself .*missing .*'shape'"):
        eqd.Pool(eqd.nn.MLP)
    match = r"`objective` must be.*Fresh"
    for model in (MAKE, eqd.nn.MLP, Plain, DATA):
        with pytest.raises((TypeError, ValueError), match=match):
            eqd.distill(HARD, model, DATA)


def test_unknown_keywords():
    match = "`distill` has no argument `optimizer`; did you mean `optimiser`"
    with pytest.raises(TypeError, match=match):
        eqd.distill(HARD, MODEL, DATA, optimizer=ADAM)
    with pytest.raises(TypeError, match=r"`Batches` has no .* you mean `size`"):
        eqd.Batches(DATA, batch_size=2)
    with pytest.raises(TypeError, match=r"from_noise` has no argument `s"):
        eqd.DistilledSet.from_noise(DATA, seed=2)


def test_unknown_keywords_of_all_public_names():
    is_function = lambda x: inspect.isroutine(x) and x.__name__ != "<lambda>"
    layers = eqd.nn.instance_norm, eqd.nn.group_norm
    for fn, *_ in CASES:
        if (is_function(fn) or inspect.isclass(fn)) and fn not in layers:
            with pytest.raises(TypeError, match=f"`{name_of(fn)}` has no argument `x`"):
                fn(x=1)


def test_lists():
    dataset = eqd.Dataset(IMAGES.tolist(), LABELS.tolist(), class_names=["a", "b", "c"])
    assert dataset.class_names == ("a", "b", "c")
    distilled = eqd.DistilledSet(IMAGES.tolist(), tuple(LABELS.tolist()), l2=1)
    for x in (dataset, distilled):
        np.testing.assert_array_equal(x.images, IMAGES)
    assert (distilled.images.dtype, distilled.labels.dtype) == (jnp.float32, jnp.int32)
    traced = jax.jit(lambda x: eqd.DistilledSet([x, 2 * x], [0, 1], l2=0.1).images)
    np.testing.assert_array_equal(traced(IMAGES[0])[1], 2 * IMAGES[0])
    solver = eqd.UnrolledSolver(optax.sgd, {"learning_rate": [0.1, 0.2]}, 2)
    assert solver.log_hyperparameters["learning_rate"].shape == (2,)
    recipe = lambda rates: eqd.recipes.learned_rates(
        MAKE, learning_rates=rates, batch_size=2
    )
    rates = [recipe(x([0.25, 0.5])) for x in (list, tuple, np.array, jnp.array)]
    assert {recipe.settings for recipe in rates} == {rates[0].settings}
    assert eqd.Packed(HARD, [6, 6]).shape == (6, 6)


# Modules with numbers: their arguments, and the names of some that they keep.
THREE, ONE, HALF = np.int64(3), np.int32(1), np.float32(0.5)
NUMBERS = [
    (eqd.ArgminSolver(max_steps=THREE, tolerance=HALF), ("max_steps", "tolerance")),
    (eqd.adjoints.DampedCG(accept=1, max_steps=THREE), ("accept", "max_steps")),
    (eqd.UnrolledSolver(optax.sgd, {}, THREE, batch_size=ONE), ("steps", "batch_size")),
    (eqd.adjoints.ReversibleSolver(1, momentum=HALF, steps=THREE), ("steps",)),
    (eqd.augment.Affine(shift=THREE, scale=THREE), ("shift", "scale")),
    (eqd.Batches(DATA, THREE), ("size",)),
    (eqd.EarlyStopping(DATA, every=THREE, patience=ONE), ("every", "patience")),
]


def test_numbers_of_numpy():
    """Compiled programs would treat NumPy's numbers as arrays."""
    for module, names in NUMBERS:
        assert {type(getattr(module, name)) for name in names} <= {int, float}
    built = eqd.nn.MLP((THREE, THREE), THREE, widths=[np.int32(2)], key=KEY)
    wanted = eqd.nn.MLP((3, 3), 3, widths=(2,), key=KEY)
    assert repr(built.settings) == repr(wanted.settings)
    built = eqd.nn.Conv2d(*[np.int64(1)] * 2, THREE, [THREE, 1], THREE, key=KEY)
    assert eqx.tree_equal(built, eqd.nn.Conv2d(1, 1, 3, (3, 1), 3, key=KEY))
    assert eqx.tree_equal(eqd.linear.LogisticRegression(np.int64(9), THREE), MODEL)
    eqd.distill(**problem, data=DATA, steps=np.int64(1))
