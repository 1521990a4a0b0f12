"""`SpanSolver` against scikit-learn, central differences, and itself in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

import eqdistill as eqd
from eqdistill.linear import LogisticRegression, SpanSolver

from .conftest import check_gradient, small_noise, subset


KEY = jr.key(0)
SOLVE = eqx.filter_jit(lambda *args: SpanSolver()(*args, key=KEY))


def cases(train, n):
    """Distilled images and labels, with equally many images of each class. The cases of
    a list have the same shapes, so they share one compiled program."""
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


@eqx.filter_jit
def fit_and_pull_back(distilled, cotangent):
    """The fit, and the gradient of the weights times a cotangent."""
    model = LogisticRegression(*cotangent.shape[::-1], use_intercept=True)

    def product(distilled):
        fitted, _ = SpanSolver()(distilled, model, model.head, key=KEY)
        return jnp.sum(fitted.model.head.weight * cotangent), fitted

    (_, fitted), gradient = eqx.filter_value_and_grad(product, has_aux=True)(distilled)
    return fitted, gradient.images


def run(case, l2, dtype):
    images, labels = case
    labels = labels.astype(dtype) if labels.ndim == 2 else labels
    distilled = eqd.DistilledSet(images.astype(dtype), labels, l2=np.asarray(l2, dtype))
    cotangent = np.random.default_rng(1).normal(size=(10, images[0].size))
    fitted, gradient = fit_and_pull_back(distilled, cotangent.astype(dtype))
    assert fitted.converged
    return np.asarray(fitted.model.head.weight), np.asarray(gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "n"),
    # Twenty images have more unknowns than Cholesky decomposition is used for, unless
    # the problem is ill conditioned.
    [("soft", 10), ("hard", 20), ("soft", 20)],
)
def test_float32_agrees_with_float64(digits, labels, n):
    for case in cases(digits[0], n)[labels]:
        l2s = (1.0, 1e-4, 1e-8)
        single = [run(case, l2, np.float32) for l2 in l2s]
        with jax.enable_x64(True):
            double = [run(case, l2, np.float64) for l2 in l2s]
        for got, wanted in zip(single, double, strict=True):
            for x, y, rtol in zip(got, wanted, (1e-3, 1e-2), strict=True):
                assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y)


@pytest.mark.usefixtures("x64")
def test_agrees_with_scikit_learn(digits):
    x, y = cases(digits[0], 10)["hard"][0]
    model = LogisticRegression(64, 10, use_intercept=True)
    for l2 in (1.0, 1e-3):
        fitted = eqd.fit(eqd.DistilledSet(x, y, l2=l2), model, SpanSolver())
        reference = SklearnLogisticRegression(
            C=1 / (10 * l2), solver="newton-cholesky", tol=1e-10, max_iter=1000
        ).fit(x.reshape(10, 64), y)
        np.testing.assert_allclose(
            fitted.model.head.weight, reference.coef_, rtol=0, atol=1e-6
        )


slow = lambda x: pytest.param(x, marks=pytest.mark.slow)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [slow("soft"), "more than pixels", slow("many")])
def test_derivative_agrees_with_central_differences(digits, mnist, kind):
    real, pixels = subset(digits[0], 100), slice(0, 8)
    images, labels = cases(digits[0], 10)["soft"][0]
    if kind == "more than pixels":  # Each image twice.
        images, labels = cases(digits[0], 20)["hard"][-1]
        pixels = slice(3, 6)
    if kind == "many":  # Too many unknowns for the images to be decomposed.
        real, pixels = subset(mnist[0], 100), slice(0, 28)
        images = np.asarray(mnist[0].images[100:310]) / 255.0
        labels = jr.normal(KEY, (210, 10))
    images = images[:, pixels, pixels]
    real = eqd.Dataset(real.images[:, pixels, pixels], real.labels, 10)
    model = LogisticRegression(images[0].size, 10, use_intercept=True)
    start = eqd.DistilledSet(images, labels, l2=1e-2 if kind == "many" else 1e-3)
    check_gradient(start, eqd.Bilevel(model, SpanSolver()), real)


def test_second_derivative_is_refused(digits):
    start, model = small_noise(digits[0]), LogisticRegression(64, 10)

    def size(log_l2):
        distilled = eqx.tree_at(lambda d: d.log_l2, start, log_l2)
        fitted, _ = SpanSolver()(distilled, model, model.head, key=KEY)
        return jnp.sum(fitted.model.head.weight**2)

    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        jax.jit(jax.grad(jax.grad(size)))(start.log_l2)


@pytest.mark.slow
def test_converges_where_the_softmax_saturates(mnist):
    # Full Newton steps change the sign of the slope here, and would go too far.
    rng = np.random.default_rng(0)
    labels = 3 * rng.normal(size=(100, 10)).astype(np.float32)[40:]
    images = mnist[0].floating()[:60]
    for l2 in (3e-6, 1e-6, 3e-7):
        distilled = eqd.DistilledSet(images, labels, l2=l2)
        fitted = eqd.fit(distilled, LogisticRegression(784, 10), SpanSolver())
        assert fitted.gradient_norm < 1e-4


@pytest.mark.slow
def test_tiny_ridge(mnist):
    # The squares of the gradient underflow.
    distilled = eqd.DistilledSet.from_real(mnist[0], 20, l2=1e-16, key=KEY)
    fitted = eqd.fit(distilled, LogisticRegression(784, 10), SpanSolver())
    outputs = jax.vmap(fitted.model)(distilled.images)
    np.testing.assert_array_equal(jnp.argmax(outputs, axis=1), distilled.labels)


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
    # The softmax may saturate on the wrong classes at a random start, and on the right
    # classes at a multiple of the solution.
    distilled = eqd.DistilledSet.from_real(digits[0], l2=10**log_l2, key=jr.key(seed))
    model = LogisticRegression(64, 10, use_intercept=use_intercept)
    rng = np.random.default_rng(seed + 1)
    noise = lambda x: (10**log_scale * rng.normal(size=x.shape)).astype(x.dtype)
    multiple = lambda x: np.float32(10**log_scale) * np.asarray(x)
    solve = lambda start: SOLVE(distilled, model, start)[0].model.head
    head = solve(model.head)
    start = jax.tree.map(multiple if is_near else noise, head)
    error = np.linalg.norm(solve(start).weight - head.weight)
    assert error <= 1e-4 * np.linalg.norm(head.weight)


def test_warm_start_takes_fewer_steps(digits):
    distilled = eqd.DistilledSet.from_real(digits[0], l2=0.01, key=KEY)
    model = LogisticRegression(64, 10)
    cold = SpanSolver().init(distilled, model, key=KEY)
    _, warm = SOLVE(distilled, model, cold)
    moved = eqx.tree_at(lambda d: d.images, distilled, 1.05 * distilled.images)
    slow, fast = (SOLVE(moved, model, state)[0] for state in (cold, warm))
    assert fast.stats["steps"] < slow.stats["steps"]
    weights = [x.model.head.weight for x in (fast, slow)]
    np.testing.assert_allclose(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_without_a_solution_it_does_not_converge(digits):
    # Without an image of some class, its intercept would be minus infinity.
    distilled = eqd.DistilledSet.from_real(digits[0], l2=0.1, key=KEY)
    labels = distilled.labels % 9
    distilled = eqx.tree_at(lambda d: d.labels, distilled, labels)
    model = LogisticRegression(64, 10, use_intercept=True)
    fitted, _ = SOLVE(distilled, model, model.head)
    assert not fitted.converged
