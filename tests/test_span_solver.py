"""The solver in the span of the images, against the general one, against scikit-learn,
and in single against double precision."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

import eqdistill as eqd

from .conftest import exact, MLP, subset


@eqx.filter_jit
def fit_and_pull_back(images, labels, l2, cotangent, inner, use_intercept):
    """The fitted weights, and a cotangent's pull-back to all of the distilled set."""
    classifier = eqd.LogisticRegression(
        cotangent.shape[0], cotangent.shape[1], use_intercept=use_intercept
    )
    distilled = eqd.DistilledSet(images, labels, l2=l2)

    def weights(distilled):
        fitted = inner(classifier, distilled)
        return jnp.sum(fitted.classifier.weights * cotangent), fitted

    (_, fitted), grad = eqx.filter_value_and_grad(weights, has_aux=True)(distilled)
    return fitted, grad


def many_cases(train):
    """Of more unknowns than are solved for by their matrix, unless this is ill
    conditioned."""
    rng = np.random.default_rng(0)
    x = np.asarray(train.images[:40], np.float64) / 255
    y = np.asarray(train.labels[:40])
    soft = 3 * rng.normal(size=(40, 10))
    half = np.concatenate([x[:20], x[:20]])
    return {
        "hard": (x, y),
        "huge": (1e3 * x, y),
        "soft": (x, soft),
        "nearly hard": (x, 20 * np.eye(10)[y] + soft),
        "soft duplicates": (half, np.concatenate([soft[:20], -soft[:20]])),
    }


def cases(train):
    rng = np.random.default_rng(0)
    x = np.asarray(train.images[:60], np.float64) / 255
    y = np.asarray(train.labels[:60])
    x10 = np.stack([x[np.argmax(y == k)] for k in range(10)])
    soft = 3 * rng.normal(size=(10, 10))
    twice = np.concatenate([x10, x10])
    return {
        "hard": (x10, np.arange(10)),
        "soft": (x10, soft),
        "nearly hard": (x10, 20 * np.eye(10) + soft),
        "duplicates": (twice, np.tile(np.arange(10), 2)),
        "soft duplicates": (twice, np.concatenate([soft, -soft])),
        "more than pixels": (x[:, 3:6, 3:6], y),
        "huge": (1e3 * x10, np.arange(10)),
        "tiny": (1e-3 * x10, np.arange(10)),
    }


def run(case, l2, dtype, use_intercept):
    images, labels = case
    if labels.ndim == 2:
        labels = labels.astype(dtype)
    cotangent = np.random.default_rng(1).normal(size=(images[0].size, 10))
    fitted, grad = fit_and_pull_back(
        images.astype(dtype),
        labels,
        np.asarray(l2, dtype),
        cotangent.astype(dtype),
        eqd.SpanSolver(),
        use_intercept,
    )
    assert fitted.converged
    return np.asarray(fitted.classifier.weights), np.asarray(grad.images)


@pytest.mark.parametrize(
    "names",
    # Those of one test share their shapes, and so what is compiled.
    [("hard", "huge", "tiny"), ("soft", "nearly hard"), ("soft duplicates",)],
    ids=" ".join,
)
def test_single_precision_is_right(digits, names):
    for name in names:
        check_single_precision(cases(digits[0])[name], use_intercept=True)


@pytest.mark.parametrize(
    "names",
    [("hard", "huge"), ("soft", "nearly hard", "soft duplicates")],
    ids=" ".join,
)
def test_single_precision_is_right_of_many(digits, names):
    for name in names:
        check_single_precision(many_cases(digits[0])[name], use_intercept=True)


def check_single_precision(case, use_intercept):
    l2s = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)
    single = [run(case, l2, np.float32, use_intercept) for l2 in l2s]
    with jax.enable_x64(True):
        double = [run(case, l2, np.float64, use_intercept) for l2 in l2s]
    for (weights, grad), (want_weights, want_grad) in zip(single, double, strict=True):
        error = np.linalg.norm(weights - want_weights)
        assert error <= 1e-3 * np.linalg.norm(want_weights)
        error = np.linalg.norm(grad - want_grad)
        assert error <= 1e-2 * np.linalg.norm(want_grad)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("use_intercept", [False, True])
def test_agrees_with_argmin_solver(digits, use_intercept):
    name = "more than pixels" if use_intercept else "duplicates"
    images, labels = cases(digits[0])[name]
    cotangent = np.random.default_rng(1).normal(size=(images[0].size, 10))
    args = images, labels, 0.05, cotangent
    got, got_grad = fit_and_pull_back(*args, eqd.SpanSolver(), use_intercept)
    want, want_grad = fit_and_pull_back(*args, exact(), use_intercept)
    assert want.converged
    for a, b in zip(
        jax.tree.leaves((got.classifier, got_grad)),
        jax.tree.leaves((want.classifier, want_grad)),
        strict=True,
    ):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(
                a, b, rtol=0, atol=1e-8 * float(jnp.abs(b).max())
            )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("use_intercept", [False, True])
def test_agrees_with_scikit_learn(digits, use_intercept):
    real = subset(digits[0], 40)
    x, y = real.floating(), real.labels
    for l2 in (1.0, 1e-3):
        fitted = eqd.fit(
            eqd.DistilledSet(x, y, l2=l2),
            eqd.LogisticRegression(64, 10, use_intercept=use_intercept),
            eqd.SpanSolver(),
        )
        reference = SklearnLogisticRegression(
            C=1 / (40 * l2),
            fit_intercept=use_intercept,
            solver="newton-cholesky",
            tol=1e-10,
            max_iter=1000,
        ).fit(np.asarray(x).reshape(40, 64), np.asarray(y))
        error = np.abs(fitted.classifier.weights - reference.coef_.T).max()
        assert error <= 1e-6


@pytest.mark.usefixtures("x64")
def test_derivative_agrees_with_central_differences(digits):
    real = subset(digits[0], 100)
    images, labels = cases(digits[0])["soft"]
    distilled = eqd.DistilledSet(images, labels, l2=1e-3)
    classifier = eqd.LogisticRegression(64, 10, use_intercept=True)

    @jax.jit
    def loss(*learned):
        where = lambda d: (d.images, d.labels, d.log_l2)
        at = eqx.tree_at(where, distilled, learned)
        return eqd.outer_loss(at, classifier, real, eqd.SpanSolver())

    learned = (distilled.images, distilled.labels, distilled.log_l2)
    check_grads(loss, learned, 1, modes=("fwd", "rev"), rtol=1e-6, atol=1e-9, eps=1e-5)


def test_many_images(mnist):
    # So many that they are not decomposed.
    real = subset(mnist[0], 250)
    distilled = eqd.DistilledSet(real.floating(), real.labels, l2=1e-2)
    for use_intercept in (False, True):
        classifier = eqd.LogisticRegression(784, 10, use_intercept=use_intercept)
        fitted = eqd.fit(distilled, classifier, eqd.SpanSolver())
        reference = SklearnLogisticRegression(
            C=1 / (250 * 1e-2), fit_intercept=use_intercept, tol=1e-8, max_iter=1000
        ).fit(np.asarray(real.floating(), np.float64).reshape(250, 784), real.labels)
        error = np.abs(fitted.classifier.weights - reference.coef_.T).max()
        assert error <= 1e-4 * np.abs(reference.coef_).max()


@pytest.mark.usefixtures("x64")
def test_derivative_of_many_agrees_with_central_differences(mnist):
    real = subset(mnist[0], 300)
    x = np.asarray(real.images) / 255.0
    distilled = eqd.DistilledSet(x[:210], jr.normal(jr.key(0), (210, 10)), l2=1e-2)
    data = eqd.Dataset(x[210:], real.labels[210:], 10)

    @jax.jit
    def loss(learned):
        where = lambda d: (d.images, d.labels, d.log_l2)
        at = eqx.tree_at(where, distilled, learned)
        classifier = eqd.LogisticRegression(784, 10, use_intercept=True)
        return eqd.outer_loss(at, classifier, data, eqd.SpanSolver())

    learned = (distilled.images, distilled.labels, distilled.log_l2)
    check_grads(loss, (learned,), 1, modes=("rev",), rtol=1e-6, atol=1e-9, eps=1e-5)


def test_converges_where_the_softmax_saturates(mnist):
    # Full steps of Newton's method, by which the slope changes its sign, go too far.
    rng = np.random.default_rng(0)
    labels = 3 * rng.normal(size=(100, 10)).astype(np.float32)[40:]
    images = mnist[0].floating()[:60]
    for l2 in (3e-6, 1e-6, 3e-7):
        distilled = eqd.DistilledSet(images, labels, l2=l2)
        fitted = eqd.fit(distilled, eqd.LogisticRegression(784, 10), eqd.SpanSolver())
        assert fitted.gradient_norm < 1e-4


def test_ridge_near_nothing(mnist):
    # Where the gradient of the inner loss is so small that its squares are zero.
    distilled = eqd.DistilledSet.from_real(mnist[0], 50, l2=1e-16, key=jr.key(0))
    classifier = eqd.LogisticRegression(784, 10)
    fitted = eqd.fit(distilled, classifier, eqd.SpanSolver())
    predicted = jnp.argmax(jax.vmap(fitted.classifier)(distilled.images), axis=1)
    np.testing.assert_array_equal(predicted, distilled.labels)
    assert fitted.gradient_norm < 1e-15


def test_is_differentiated_but_once(digits):
    start = eqd.DistilledSet.from_noise(digits[0], key=jr.key(0))
    train = subset(digits[0], 50)

    def squared_norm(log_l2):
        at = lambda x: eqx.tree_at(lambda d: d.log_l2, start, x)
        classifier = eqd.LogisticRegression(64, 10)
        loss = lambda x: eqd.outer_loss(at(x), classifier, train)
        return jax.grad(loss)(log_l2) ** 2

    with pytest.raises(NotImplementedError, match="be differentiated but once"):
        jax.grad(squared_norm)(start.log_l2)


@settings(max_examples=40, deadline=None)
@given(
    log_scale=st.floats(-3, 3),
    log_l2=st.floats(-6, 0),
    is_near=st.booleans(),
    use_intercept=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_start(digits, log_scale, log_l2, is_near, use_intercept, seed):
    # Random ones, at which the softmax may be saturated on the wrong classes; and
    # multiples of the solution, where it is on the right ones.
    distilled = eqd.DistilledSet.from_real(digits[0], l2=10**log_l2, key=jr.key(seed))
    classifier = eqd.LogisticRegression(64, 10, use_intercept=use_intercept)
    noise = lambda x: 10**log_scale * jr.normal(jr.key(seed + 1), x.shape)
    fitted = eqd.fit(distilled, classifier, eqd.SpanSolver()).classifier
    multiple = lambda x: 10**log_scale * x
    start = jax.tree.map(multiple if is_near else noise, fitted)
    got = eqd.fit(distilled, start, eqd.SpanSolver()).classifier.weights
    error = jnp.linalg.norm(got - fitted.weights)
    assert error <= 1e-4 * jnp.linalg.norm(fitted.weights)


def test_next_start_is_quicker(digits):
    distilled = eqd.DistilledSet.from_real(digits[0], l2=0.01, key=jr.key(0))
    classifier = eqd.LogisticRegression(64, 10)
    first = eqd.fit(distilled, classifier, eqd.SpanSolver())
    moved = eqx.tree_at(lambda d: d.images, distilled, 1.05 * distilled.images)
    again = eqd.fit(moved, classifier, eqd.SpanSolver())
    quicker = eqd.fit(moved, first.next_start, eqd.SpanSolver())
    assert quicker.steps < again.steps
    weights = quicker.classifier.weights
    np.testing.assert_allclose(weights, again.classifier.weights, rtol=1e-4, atol=1e-6)


def test_refuses_what_is_not_linear(digits):
    classifier = MLP(64, 8, jax.nn.softplus, key=jax.random.key(0))
    distilled = eqd.DistilledSet.from_noise(digits[0], key=jax.random.key(0))
    match = "`SpanSolver` fits a `LogisticRegression`.*got a MLP. Use `ArgminSolver`"
    with pytest.raises(TypeError, match=match):
        eqd.fit(distilled, classifier, eqd.SpanSolver())


def test_says_where_there_is_no_solution(digits):
    # Without an image of some class, its intercept would be minus infinity.
    distilled = eqd.DistilledSet.from_noise(digits[0], 5, key=jax.random.key(0))
    classifier = eqd.LogisticRegression(64, 10, use_intercept=True)
    with pytest.raises(RuntimeError, match="inner solver did not converge"):
        eqd.fit(distilled, classifier)
