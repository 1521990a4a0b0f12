"""The solver in the span of the images, against scikit-learn and central differences,
and in single against double precision."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

import eqdistill as eqd

from .conftest import check_gradient, small_noise, subset


@eqx.filter_jit
def fit_and_pull_back(images, labels, l2, cotangent, inner, use_intercept):
    """The fitted weights, and a cotangent's pull-back to all of the distilled set."""
    model = eqd.LogisticRegression(
        cotangent.shape[1], cotangent.shape[0], use_intercept=use_intercept
    )
    distilled = eqd.DistilledSet(images, labels, l2=l2)

    def weights(distilled):
        state = inner.init(distilled, model, key=None)
        fitted, _ = inner(distilled, model, state, key=None)
        return jnp.sum(fitted.model.head.weight * cotangent), fitted

    (_, fitted), grad = eqx.filter_value_and_grad(weights, has_aux=True)(distilled)
    return fitted, grad


def cases(train, n):
    """Equally many images of each class. The cases with hard labels share their shapes,
    and so what is compiled; as do those with soft ones."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 10
    x = (
        np.stack([train.images[train.labels == k][i // 10] for i, k in enumerate(y)])
        / 255.0
    )
    soft = 3 * rng.normal(size=(n, 10))
    half = n // 2
    twice = np.concatenate([x[:half], x[:half]])
    return {
        "hard": [(x, y), (1e3 * x, y), (1e-3 * x, y), (twice, np.tile(y[:half], 2))],
        "soft": [
            (x, soft),
            (x, 20 * np.eye(10)[y] + soft),
            (twice, np.concatenate([soft[:half], -soft[:half]])),
        ],
    }


def run(case, l2, dtype, use_intercept):
    images, labels = case
    if labels.ndim == 2:
        labels = labels.astype(dtype)
    cotangent = np.random.default_rng(1).normal(size=(10, images[0].size))
    fitted, grad = fit_and_pull_back(
        images.astype(dtype),
        labels,
        np.asarray(l2, dtype),
        cotangent.astype(dtype),
        eqd.SpanSolver(),
        use_intercept,
    )
    assert fitted.converged
    return np.asarray(fitted.model.head.weight), np.asarray(grad.images)


@pytest.mark.slow
def test_single_precision_is_right(digits):
    for case in cases(digits[0], 10)["soft"]:
        check_single_precision(case, use_intercept=True)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_single_precision_is_right_of_many(digits, labels):
    # Of more unknowns than are solved for by their matrix, unless this is ill
    # conditioned.
    for case in cases(digits[0], 20)[labels]:
        check_single_precision(case, use_intercept=True)


def check_single_precision(case, use_intercept):
    l2s = (1.0, 1e-4, 1e-8)
    single = [run(case, l2, np.float32, use_intercept) for l2 in l2s]
    with jax.enable_x64(True):
        double = [run(case, l2, np.float64, use_intercept) for l2 in l2s]
    for (weights, grad), (want_weights, want_grad) in zip(single, double, strict=True):
        error = np.linalg.norm(weights - want_weights)
        assert error <= 1e-3 * np.linalg.norm(want_weights)
        error = np.linalg.norm(grad - want_grad)
        assert error <= 1e-2 * np.linalg.norm(want_grad)


@pytest.mark.usefixtures("x64")
def test_agrees_with_scikit_learn(digits):
    x, y = cases(digits[0], 10)["hard"][0]
    model = eqd.LogisticRegression(64, 10, use_intercept=True)
    for l2 in (1.0, 1e-3):
        fitted = eqd.fit(eqd.DistilledSet(x, y, l2=l2), model, eqd.SpanSolver())
        reference = SklearnLogisticRegression(
            C=1 / (10 * l2), solver="newton-cholesky", tol=1e-10, max_iter=1000
        ).fit(x.reshape(10, 64), y)
        error = np.abs(fitted.model.head.weight - reference.coef_).max()
        assert error <= 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "kind",
    [pytest.param("soft labels", marks=pytest.mark.slow), "more images than pixels"],
)
def test_derivative_agrees_with_central_differences(digits, kind):
    real, pixels = subset(digits[0], 100), slice(0, 8)
    images, labels = cases(digits[0], 10)["soft"][0]
    if kind == "more images than pixels":  # Half of them twice.
        images, labels = cases(digits[0], 20)["hard"][-1]
        pixels = slice(3, 6)
        real = eqd.Dataset(real.images[:, pixels, pixels], real.labels, 10)
    distilled = eqd.DistilledSet(images[:, pixels, pixels], labels, l2=1e-3)
    model = eqd.LogisticRegression(
        images[0, pixels, pixels].size, 10, use_intercept=True
    )
    check_gradient(distilled, model, real, eqd.SpanSolver())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivative_of_many_agrees_with_central_differences(mnist):
    # Of so many unknowns that the images are not decomposed.
    real = subset(mnist[0], 300)
    x = np.asarray(real.images) / 255.0
    distilled = eqd.DistilledSet(x[:210], jr.normal(jr.key(0), (210, 10)), l2=1e-2)
    data = eqd.Dataset(x[210:], real.labels[210:], 10)
    model = eqd.LogisticRegression(784, 10, use_intercept=True)
    check_gradient(distilled, model, data, eqd.SpanSolver())


@pytest.mark.slow
def test_many_images(mnist):
    # So many that they are not decomposed.
    real = subset(mnist[0], 250)
    distilled = eqd.DistilledSet(real.floating(), real.labels, l2=1e-2)
    model = eqd.LogisticRegression(784, 10, use_intercept=True)
    fitted = eqd.fit(distilled, model, eqd.SpanSolver())
    reference = SklearnLogisticRegression(
        C=1 / (250 * 1e-2), tol=1e-8, max_iter=1000
    ).fit(np.asarray(real.floating(), np.float64).reshape(250, 784), real.labels)
    error = np.abs(fitted.model.head.weight - reference.coef_).max()
    assert error <= 1e-4 * np.abs(reference.coef_).max()


@pytest.mark.slow
def test_converges_where_the_softmax_saturates(mnist):
    # Full steps of Newton's method, by which the slope changes its sign, go too far.
    rng = np.random.default_rng(0)
    labels = 3 * rng.normal(size=(100, 10)).astype(np.float32)[40:]
    images = mnist[0].floating()[:60]
    for l2 in (3e-6, 1e-6, 3e-7):
        distilled = eqd.DistilledSet(images, labels, l2=l2)
        fitted = eqd.fit(distilled, eqd.LogisticRegression(784, 10), eqd.SpanSolver())
        assert fitted.gradient_norm < 1e-4


@pytest.mark.slow
def test_ridge_near_nothing(mnist):
    # Where the gradient of the inner loss is so small that its squares are zero.
    distilled = eqd.DistilledSet.from_real(mnist[0], 20, l2=1e-16, key=jr.key(0))
    model = eqd.LogisticRegression(784, 10)
    fitted = eqd.fit(distilled, model, eqd.SpanSolver())
    weight = fitted.model.head.weight
    logits = distilled.images.reshape(20, 784) @ weight.T
    np.testing.assert_array_equal(jnp.argmax(logits, axis=1), distilled.labels)
    assert fitted.gradient_norm < 1e-15


def test_is_differentiated_but_once(digits):
    start = small_noise(digits[0])
    train = subset(digits[0], 50)
    model = eqd.LogisticRegression(64, 10)

    @jax.jit
    def squared_norm(log_l2):
        at = lambda x: eqx.tree_at(lambda d: d.log_l2, start, x)
        loss = lambda x: eqd.outer_loss(at(x), model, train)[0]
        return jax.grad(loss)(log_l2) ** 2

    with pytest.raises(NotImplementedError, match="can be differentiated only once"):
        jax.grad(squared_norm)(start.log_l2)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    log_scale=st.floats(-3, 3),
    log_l2=st.floats(-6, 0),
    is_near=st.booleans(),
    use_intercept=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_warm_start(digits, log_scale, log_l2, is_near, use_intercept, seed):
    # Random ones, at which the softmax may be saturated on the wrong classes; and
    # multiples of the solution, where it is on the right ones.
    distilled = eqd.DistilledSet.from_real(digits[0], l2=10**log_l2, key=jr.key(seed))
    model = eqd.LogisticRegression(64, 10, use_intercept=use_intercept)
    rng = np.random.default_rng(seed + 1)
    noise = lambda x: (10**log_scale * rng.normal(size=x.shape)).astype(x.dtype)
    multiple = lambda x: np.float32(10**log_scale) * np.asarray(x)
    solve = lambda start: SOLVE(distilled, model, start)[0].model.head
    head = solve(model.head)
    start = jax.tree.map(multiple if is_near else noise, head)
    error = np.linalg.norm(solve(start).weight - head.weight)
    assert error <= 1e-4 * np.linalg.norm(head.weight)


@eqx.filter_jit
def SOLVE(distilled, model, state):
    return eqd.SpanSolver()(distilled, model, state, key=None)


def test_warm_start_is_quicker(digits):
    distilled = eqd.DistilledSet.from_real(digits[0], l2=0.01, key=jr.key(0))
    model = eqd.LogisticRegression(64, 10)
    cold = eqd.SpanSolver().init(distilled, model, key=None)
    _, warm = SOLVE(distilled, model, cold)
    moved = eqx.tree_at(lambda d: d.images, distilled, 1.05 * distilled.images)
    again, _ = SOLVE(moved, model, cold)
    quicker, _ = SOLVE(moved, model, warm)
    assert quicker.stats["steps"] < again.stats["steps"]
    weights = [x.model.head.weight for x in (quicker, again)]
    np.testing.assert_allclose(*weights, rtol=1e-4, atol=1e-6)


def test_refuses_what_is_not_linear(digits):
    distilled = small_noise(digits[0])
    network = eqx.nn.Sequential(
        [eqx.nn.Lambda(jnp.ravel), eqd.LogisticRegression(64, 10).head]
    )
    match = r"a `LinearClassifier`.*`SpanSolver`; got a Sequential.*`last_layer"
    with pytest.raises(TypeError, match=match):
        eqd.fit(distilled, network, eqd.SpanSolver())
    squared = eqx.tree_at(lambda d: d.loss, distilled, eqd.SquaredError())
    with pytest.raises(TypeError, match=r"have `CrossEntropy`.*got `SquaredError`"):
        eqd.fit(squared, eqd.LogisticRegression(64, 10), eqd.SpanSolver())


@pytest.mark.slow
def test_says_where_there_is_no_solution(digits):
    # Without an image of some class, its intercept would be minus infinity.
    distilled = eqd.DistilledSet.from_real(digits[0], l2=0.1, key=jr.key(0))
    labels = distilled.labels % 9
    distilled = eqx.tree_at(lambda d: d.labels, distilled, labels)
    model = eqd.LogisticRegression(64, 10, use_intercept=True)
    fitted, _ = SOLVE(distilled, model, model.head)
    assert not fitted.converged
