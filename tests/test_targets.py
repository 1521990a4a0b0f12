"""Real data with targets instead of class indices, and classes of unequal sizes."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import sklearn.datasets
import sklearn.linear_model
import sklearn.metrics

import eqdistill as eqd


def table(num_targets=2):
    x, y, *_ = sklearn.datasets.make_regression(
        200, 8, n_targets=num_targets, noise=5.0, random_state=0
    )
    y = (y - y.mean(axis=0)) / y.std(axis=0)
    return eqd.Dataset(x[:120], y[:120]), eqd.Dataset(x[120:], y[120:])


def multi_label():
    x, y, *_ = sklearn.datasets.make_multilabel_classification(
        200, 8, n_classes=3, random_state=0
    )
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    return eqd.Dataset(x[:120], y[:120]), eqd.Dataset(x[120:], y[120:])


MODEL = eqd.linear.LogisticRegression(8, 2, use_intercept=True)


def test_regression():
    train, test = table()
    assert train.has_targets
    assert train.num_classes == 2
    everything = eqd.DistilledSet(
        train.images, train.labels, l2=1e-3, loss=eqd.SquaredError()
    )
    of_all = eqd.evaluate(everything, MODEL, test)
    ridge = sklearn.linear_model.Ridge(alpha=120 * 1e-3).fit(train.images, train.labels)
    wanted = ridge.predict(test.images)
    r2 = sklearn.metrics.r2_score(test.labels, wanted, multioutput="raw_values")
    np.testing.assert_allclose(of_all.per_class[0, 0], r2, atol=1e-4)
    np.testing.assert_allclose(of_all.score, r2.mean(), atol=1e-4)
    error = sklearn.metrics.mean_squared_error(test.labels, wanted)
    np.testing.assert_allclose(of_all.metrics["mean squared error"], error, rtol=1e-3)
    # Half the squared distance: the default outer loss is that of the distilled set.
    np.testing.assert_allclose(of_all.loss, error, rtol=1e-3)
    assert repr(of_all) == f"R2 {of_all.score:.4g}"
    with pytest.raises(AttributeError, match=r"`metrics` \('R2', 'mean squared error'"):
        _ = of_all.accuracy

    start = eqd.DistilledSet.from_real(train, 4, l2=1e-3, key=jr.key(0))
    assert isinstance(start.loss, eqd.SquaredError)
    rows = np.asarray(train.images)
    for image, target in zip(start.images, start.labels, strict=True):
        (row,) = np.flatnonzero((rows == np.asarray(image)).all(axis=1))
        np.testing.assert_array_equal(train.labels[row], target)
    learn = lambda d: (d.images, d.labels)
    result = eqd.distill(start, MODEL, train, learn=learn, steps=100)
    random = eqd.evaluate(start, MODEL, test).score
    found = eqd.evaluate(result.distilled, MODEL, test).score
    assert random < 0.8 < 0.95 < found < of_all.score + 0.01


def test_regression_with_own_data():
    """The reported loss is the true one: outputs are not divided by a temperature."""

    class Rows(eqd.AbstractData):
        x: jax.Array
        y: jax.Array

        def mean(self, fn, model, step, *, key):
            means = jax.vmap(lambda x, y: fn(model, x, y))(self.x, self.y)
            return jax.tree.map(lambda v: jnp.mean(v, axis=0), means)

    train, _ = table()
    start = eqd.DistilledSet.from_real(train, 4, l2=1e-3, key=jr.key(0))
    data = Rows(train.images, train.labels)
    result = eqd.distill(start, MODEL, data, steps=20)
    fitted = eqd.fit(start, MODEL).model
    errors = jax.vmap(fitted)(train.images) - train.labels
    wanted = float(jnp.mean(jnp.sum(errors**2, axis=1)) / 2)
    np.testing.assert_allclose(result.history.loss[0], wanted, rtol=1e-4)
    assert result.history.loss[-1] < 0.8 * wanted


@pytest.mark.slow
def test_several_labels():
    train, test = multi_label()
    loss = eqd.BinaryCrossEntropy()
    model = eqd.linear.LogisticRegression(8, 3, use_intercept=True)
    start = eqd.DistilledSet.from_real(train, 6, l2=1e-2, loss=loss, key=jr.key(0))
    result = eqd.distill(start, model, train, steps=60)
    assert result.history.loss[-1] < 0.8 * result.history.loss[0]
    found = eqd.evaluate(result.distilled, model, test)
    outputs = jax.vmap(found.fitted.model)(test.floating())
    for k in range(3):
        truth, scores = np.asarray(test.labels)[:, k], np.asarray(outputs)[:, k]
        wanted = sklearn.metrics.average_precision_score(truth, scores)
        np.testing.assert_allclose(found.per_class[0, 0, k], wanted, rtol=1e-6)
    p = jax.nn.sigmoid(outputs)
    wanted = sum(sklearn.metrics.log_loss(test.labels[:, k], p[:, k]) for k in range(3))
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-4)
    assert found.metric == "mean average precision"
    with pytest.raises(ValueError, match="use `BinaryCrossEntropy`"):
        eqd.DistilledSet(train.images, train.labels, l2=0.1)
    objective = eqd.Bilevel(model, loss=eqd.CrossEntropy())
    with pytest.raises(ValueError, match="use `BinaryCrossEntropy`"):
        eqd.distill(start, objective, train, steps=1)
    with pytest.raises(ValueError, match="from 0 to 1 for `BinaryCrossEntropy`; got -"):
        eqd.DistilledSet(train.images, train.images[:, :3], l2=0.1, loss=loss)


@pytest.mark.slow
def test_classes_of_unequal_sizes(digits):
    train, test = digits
    few = np.flatnonzero(np.asarray(train.labels) == 3)[:5]
    rows = np.sort(np.append(np.flatnonzero(np.asarray(train.labels) != 3), few))
    rare = eqd.Dataset(train.images[rows], train.labels[rows], 10)
    assert rare.class_counts[3] == 5
    seen = eqd.Batches(rare, 200, balanced=True).mean(
        lambda model, x, y: jax.nn.one_hot(y, 10) * model,
        jnp.array(1.0),
        jnp.array(3),
        key=jr.key(0),
    )
    np.testing.assert_allclose(seen, np.full(10, 0.1), rtol=1e-5)
    counts = [1, 0, 2, 5, *[1] * 6]
    start = eqd.DistilledSet.from_real(rare, counts, l2=0.1, key=jr.key(0))
    np.testing.assert_array_equal(np.bincount(start.labels, minlength=10), counts)

    model = eqd.linear.LogisticRegression(64, 10)
    found = eqd.evaluate(start, model, test)
    outputs = jax.vmap(found.fitted.model)(test.floating())
    got = np.argmax(outputs, axis=1)
    wanted = sklearn.metrics.balanced_accuracy_score(test.labels, got)
    np.testing.assert_allclose(found.metrics["balanced accuracy"], wanted, rtol=1e-5)

    none = rows[~np.isin(rows, few)]
    names = [f"digit {i}" for i in range(10)]
    absent = eqd.Dataset(train.images[none], train.labels[none], class_names=names)
    for make in (eqd.DistilledSet.from_real, eqd.DistilledSet.from_class_means):
        with pytest.raises(ValueError, match=r"no images of class 3 \('digit 3'\)"):
            make(absent, l2=0.1, key=jr.key(0))
    with pytest.raises(ValueError, match=r"no images of class 3 \('digit 3'\)"):
        eqd.DistilledSet.from_noise(absent, l2=0.1, scale=0.1, key=jr.key(0))
    with pytest.raises(ValueError, match=r"each class needs an example"):
        eqd.Batches(absent, 20, balanced=True)
