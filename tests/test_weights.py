"""A weight of k is worth k copies of an example, and unions of sets."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import sklearn.metrics

import eqdistill as eqd
from eqdistill.linear import LogisticRegression, RelativeRidge, RidgeSolver, SpanSolver


RNG = np.random.default_rng(0)
COPIES = np.array([1, 3, 2, 1, 2])
IMAGES = RNG.normal(size=(5, 6)).astype(np.float32)
HARD = np.array([0, 1, 2, 1, 0])
SOFT = RNG.normal(size=(5, 3)).astype(np.float32)


def pair(labels, loss, l2=0.05, l2_of_copies=None):
    """A set with weights, and a set with copies."""
    make = functools.partial(eqd.DistilledSet, loss=loss)
    copy = lambda x: np.repeat(x, COPIES, axis=0)
    copied = make(copy(IMAGES), copy(labels), l2=l2_of_copies or l2)
    return make(IMAGES, labels, l2=l2, weights=COPIES), copied


def training(**options):
    return eqd.UnrolledSolver(optax.sgd, {"learning_rate": 0.3}, 4, **options)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
RELATIVE = RelativeRidge, eqd.linear.LinearisedSolver


@pytest.mark.parametrize(
    ("inner", "labels", "loss"),
    [
        (SpanSolver(), HARD, eqd.CrossEntropy()),
        (SpanSolver(), SOFT, eqd.CrossEntropy()),
        slow(eqd.ArgminSolver(), HARD, eqd.CrossEntropy()),
        (RidgeSolver(), SOFT, eqd.SquaredError()),
        (RelativeRidge(), SOFT, eqd.SquaredError()),
        slow(eqd.linear.LinearisedSolver(), SOFT, eqd.SquaredError()),
        (training(), abs(SOFT) % 1, eqd.BinaryCrossEntropy()),
    ],
)
def test_a_weight_is_a_number_of_copies(inner, labels, loss):
    """In the solution, and in its derivative."""
    # A relative ridge is per image, each counted once.
    factor = COPIES.sum() / len(COPIES) if isinstance(inner, RELATIVE) else 1
    weighted, copied = pair(labels, loss, 0.05, 0.05 * factor)
    model = LogisticRegression(6, 3, use_intercept=True)
    x = jnp.asarray(np.random.default_rng(1).normal(size=6), jnp.float32)

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def output(distilled):
        outputs = eqd.fit(distilled, model, inner, throw=False).model(x)
        if isinstance(loss, eqd.CrossEntropy):
            # The softmax leaves open what the intercepts have in common.
            outputs = outputs - jnp.mean(outputs)
        return outputs[0], outputs

    (_, wanted), gradient = output(copied)
    (_, found), by_weighted = output(weighted)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    summed = np.add.reduceat(gradient.images, np.cumsum(COPIES) - COPIES)
    largest = abs(summed).max()
    np.testing.assert_allclose(by_weighted.images, summed, atol=2e-3 * largest)


@pytest.mark.parametrize("inner", [SpanSolver(), eqd.ArgminSolver(tolerance=1e-12)])
def test_derivative_in_the_weights(inner):
    """Against finite differences, in float64."""
    with jax.enable_x64(True):
        distilled, _ = pair(SOFT.astype(float), eqd.CrossEntropy())
        distilled = jax.tree.map(lambda x: x.astype(float), distilled)
        model = LogisticRegression(6, 3, use_intercept=True, dtype=float)

        @jax.jit
        def value(log_weights):
            own = eqx.tree_at(lambda d: d.log_weights, distilled, log_weights)
            fitted = eqd.fit(own, model, inner, throw=False).model
            outputs = fitted(jnp.asarray(IMAGES[0]) + 1.0)
            return outputs[0] - jnp.mean(outputs)

        at, step = distilled.log_weights, 1e-4 * jnp.arange(1.0, 6)
        wanted = (value(at + step) - value(at - step)) / 2
        np.testing.assert_allclose(jax.grad(value)(at) @ step, wanted, rtol=1e-5)


def test_weights_in_batches_of_distilled_images():
    """An epoch of one image per step takes steps in proportion to the weights."""
    weighted, _ = pair(HARD, eqd.CrossEntropy(), 1e-3)
    model = LogisticRegression(6, 3)
    inner = eqd.UnrolledSolver(
        optax.sgd, {"learning_rate": 0.1}, 1, batch_size=1, shuffle=False
    )
    head = eqd.fit(weighted, model, inner).model.head
    plain = eqd.DistilledSet(IMAGES[:1], HARD[:1], l2=1e-3)
    wanted = eqd.fit(plain, model, inner).model.head
    weight = COPIES[0] / COPIES.mean()
    np.testing.assert_allclose(head.weight, weight * wanted.weight, rtol=1e-5)


@pytest.mark.slow
def test_weights_of_real_data(digits):
    train, test = digits
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 3, len(test))
    weighted = eqd.Dataset(test.images, test.labels, 10, weights=7 * weights)
    start = eqd.DistilledSet.from_real(train, l2=0.1, key=jr.key(0))
    model = LogisticRegression(64, 10)
    found = eqd.evaluate(start, model, weighted)
    outputs = jax.vmap(found.fitted.model)(test.floating())
    wrong = np.argmax(outputs, axis=1) != np.asarray(test.labels)
    options = {"sample_weight": weights}
    got = np.argmax(outputs, axis=1)
    for name, score in (
        ("accuracy", sklearn.metrics.accuracy_score),
        ("balanced accuracy", sklearn.metrics.balanced_accuracy_score),
    ):
        wanted = score(test.labels, got, **options)
        np.testing.assert_allclose(found.metrics[name], wanted, rtol=1e-5)
    wanted = sklearn.metrics.log_loss(test.labels, jax.nn.softmax(outputs), **options)
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-4)
    assert wrong.any()

    # The mean over an epoch of batches is the weighted mean.
    batches = eqd.Batches(weighted, len(test) // 4)
    mean = lambda data, i: data.mean(_label, jnp.ones(()), jnp.array(i), key=jr.key(0))
    np.testing.assert_allclose(
        np.mean([mean(batches, i) for i in range(4)], axis=0),
        mean(eqd.FullBatch(weighted), 0),
        atol=2e-2,
    )
    balanced = eqd.Batches(weighted, 10 * (len(test) // 10), balanced=True)
    np.testing.assert_allclose(mean(balanced, 0), np.full(10, 0.1), atol=1e-2)
    part, _ = weighted.split(0.25, key=jr.key(1))
    rows = [np.flatnonzero((test.images == x).all((1, 2)))[0] for x in part.images]
    assert part.weights is not None
    ratio = part.weights / weights[rows]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def _label(model, x, y):
    return jax.nn.one_hot(y, 10) * model


@pytest.mark.slow
def test_union_of_distilled_and_real_images(digits):
    """C10: seven distilled classes, and real images of three new ones."""
    train, test = digits
    labels = np.asarray(train.labels)
    old, new = (
        eqd.Dataset(train.images[r], labels[r], 10) for r in (labels < 7, labels > 6)
    )
    model = LogisticRegression(64, 10)
    start = eqd.DistilledSet.from_class_means(
        old, [1] * 7 + [0] * 3, l2=0.01, key=jr.key(0)
    )
    plain = eqd.DistilledSet.concatenate([start, new])
    weight = len(old) / len(start)
    union = eqd.DistilledSet.concatenate([start, new], weights=[weight, 1])
    copies = eqd.DistilledSet(
        jnp.concatenate(
            [jnp.repeat(start.images, round(weight), axis=0), new.floating()]
        ),
        np.concatenate([np.repeat(start.labels, round(weight)), new.labels]),
        l2=0.01,
    )
    recall = lambda found: np.nanmean(found.per_class[0, 0, :7])
    found = [eqd.evaluate(x, model, test) for x in (plain, union, copies)]
    assert recall(found[0]) < 0.5 < 0.8 < recall(found[1])
    np.testing.assert_allclose(recall(found[1]), recall(found[2]), atol=0.02)


@pytest.mark.slow
def test_union_of_labels_of_different_classes():
    soft = eqd.DistilledSet(IMAGES, SOFT, l2=0.1)
    hard = eqd.DistilledSet(2 * IMAGES, HARD + 2, l2=0.1)
    union = eqd.DistilledSet.concatenate([soft, hard], num_classes=5)
    p = jax.nn.softmax(union.labels)
    wanted = np.pad(jax.nn.softmax(SOFT), ((0, 0), (0, 2)))
    np.testing.assert_allclose(p[:5], wanted, atol=1e-6)
    np.testing.assert_array_equal(p[5:], np.eye(5)[HARD + 2])
    model = LogisticRegression(6, 5, use_intercept=True)
    assert eqd.fit(union, model).converged

    first = eqd.DistilledSet(IMAGES, HARD, l2=0.1).with_targets(3)
    union = eqd.DistilledSet.concatenate([first, hard.with_targets(5)], num_classes=5)
    wanted = eqd.DistilledSet(IMAGES, HARD, l2=0.1).with_targets(5)
    np.testing.assert_allclose(union.labels[:5], wanted.labels, atol=1e-6)
    hard_union = eqd.DistilledSet.concatenate([hard, hard], l2=1.0)
    assert hard_union.labels.ndim == 1
    assert hard_union.log_weights is None

    with pytest.raises(ValueError, match=r"`num_classes` must be given.*\[3, 5\]"):
        eqd.DistilledSet.concatenate([first, hard.with_targets(5)])
    with pytest.raises(ValueError, match=r"`num_classes` must be at least 3.*got 2"):
        eqd.DistilledSet.concatenate([soft, hard], num_classes=2)
    with pytest.raises(ValueError, match="`sets` must have the same loss"):
        eqd.DistilledSet.concatenate([first, hard])
    with pytest.raises(ValueError, match="one for each of the 5 examples; got"):
        eqd.DistilledSet(IMAGES, HARD, l2=0.1, weights=[1, 2, 0, 1, 1])


def test_names_of_a_union():
    def named(*names):
        return eqd.DistilledSet(IMAGES, HARD, l2=0.1, class_names=names)

    union = eqd.DistilledSet.concatenate([named("a", "b", "c"), named(*"abcd")])
    assert union.class_names == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match="class 0 is 'a' in a set and 'b' in `sets"):
        eqd.DistilledSet.concatenate([named("a", "b", "c"), named("b", "a", "c")])
    soft = eqd.DistilledSet(IMAGES, SOFT, l2=0.1)
    large = eqd.DistilledSet(IMAGES, HARD + 2, l2=0.1)
    with pytest.raises(ValueError, match=r"`num_classes` must be larger .* got 3"):
        eqd.DistilledSet.concatenate([soft, large])


def test_learned_weights_need_no_mean_of_one():
    distilled, _ = pair(SOFT, eqd.SquaredError())
    assert distilled.log_weights is not None
    logs = distilled.log_weights - 1
    distilled = eqx.tree_at(lambda d: d.log_weights, distilled, logs)
    model = LogisticRegression(6, 3, use_intercept=True)
    solvers = RidgeSolver(), eqd.ArgminSolver()
    found, wanted = (eqd.fit(distilled, model, inner).model for inner in solvers)
    np.testing.assert_allclose(found.head.weight, wanted.head.weight, atol=1e-3)
    np.testing.assert_allclose(found.head.bias, wanted.head.bias, atol=1e-3)


def test_labels_of_a_union_are_checked():
    logits = eqd.DistilledSet(IMAGES, SOFT, l2=0.1)
    p = np.asarray(jax.nn.softmax(SOFT))
    with pytest.raises(ValueError, match="got probabilities"):
        eqd.DistilledSet.concatenate([logits, eqd.Dataset(IMAGES, p)])
    with pytest.raises(ValueError, match=r"`weights\[1\]` must be positive.*got -1"):
        eqd.DistilledSet.concatenate([logits, logits], weights=[1, -1])
