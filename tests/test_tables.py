"""Rows with columns of very different scales, against scikit-learn and NumPy."""

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
import sklearn.datasets
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing

import eqdistill as eqd
from eqdistill.datasets import Standardisation

from .test_artifact import run


L2 = 0.01
MODEL = eqd.linear.LogisticRegression(13, 3, use_intercept=True)


def scikit_learn(n):
    """The same logistic regression on `n` rows."""
    return sklearn.linear_model.LogisticRegression(
        C=1 / (n * L2), tol=1e-8, max_iter=1000
    )


@pytest.fixture(scope="module")
def wine():
    train, test = eqd.datasets.load("wine")
    return train, test, Standardisation.fit(train)


def outputs(distilled, rows, model=MODEL):
    return jax.vmap(eqd.fit(distilled, model).model)(rows)


@pytest.mark.slow
def test_all_rows_against_scikit_learn(wine):
    train, test, standardisation = wine
    assert train.class_names == ("class_0", "class_1", "class_2")
    pipeline = sklearn.pipeline.make_pipeline(
        sklearn.preprocessing.StandardScaler(), scikit_learn(len(train))
    )
    pipeline.fit(train.images, train.labels)
    standard = train.map(standardisation)
    every = eqd.DistilledSet(standard.images, standard.labels, l2=L2)
    found = eqd.evaluate(every, MODEL, test.map(standardisation))
    assert found.accuracy == pytest.approx(pipeline.score(test.images, test.labels))
    assert found.accuracy > 0.95
    head = found.fitted.model.head
    np.testing.assert_allclose(head.weight, pipeline[-1].coef_, atol=1e-3)
    np.testing.assert_allclose(head.bias, pipeline[-1].intercept_, atol=1e-3)


@pytest.mark.slow
def test_rows_are_published(wine, tmp_path, monkeypatch, capsys):
    train, test, standardisation = wine
    train, standard = train.map(standardisation), test.map(standardisation)
    distilled = eqd.DistilledSet.from_kmeans(train, l2=L2, key=jr.key(0))
    found = eqd.evaluate(distilled, MODEL, standard)
    path = tmp_path / "wine.safetensors"

    def check(preprocessing):
        data = {"preprocessing": preprocessing, "dataset": "wine"}
        eqd.save(path, distilled, found, **data)
        return run(monkeypatch, capsys, path)[0]

    assert check(standardisation) == 0
    eqd.export(tmp_path / "wine", eqd.load(path))
    with np.load(tmp_path / "wine" / "distilled.npz", allow_pickle=False) as file:
        exported = dict(file)
    refitted = scikit_learn(3)
    refitted.fit(exported["images"], exported["targets"].argmax(axis=1))
    rows = (np.asarray(test.images) - exported["mean"]) / exported["deviation"]
    wanted = outputs(distilled, standard.images)
    np.testing.assert_allclose(refitted.decision_function(rows), wanted, atol=1e-2)
    accuracy = np.mean(refitted.predict(rows) == test.labels)
    assert accuracy == pytest.approx(exported["claimed_score"])
    # The column with the smallest scale could hide what is to be learned.
    i = int(np.argmin(standardisation.deviation))
    mean = standardisation.mean.at[i].add(standardisation.deviation[i] / 10)
    assert check(eqx.tree_at(lambda s: s.mean, standardisation, mean)) == 2


def test_regression_is_refitted_in_numpy(tmp_path):
    x, y = sklearn.datasets.make_friedman1(60, 6, random_state=0)
    x = x * 10.0 ** np.arange(-3, 3)
    train = eqd.Dataset(x, ((y - y.mean()) / y.std())[:, None])
    standardisation = Standardisation.fit(train)
    train = train.map(standardisation)
    distilled = eqd.DistilledSet.from_kmeans(train, 10, l2=L2, key=jr.key(0))
    eqd.save(tmp_path / "a.safetensors", distilled, preprocessing=standardisation)
    eqd.export(tmp_path / "out", eqd.load(tmp_path / "a.safetensors"))
    with np.load(tmp_path / "out" / "distilled.npz", allow_pickle=False) as file:
        exported = {name: file[name].astype(float) for name in ("images", "targets")}
        rows = (x - file["mean"]) / file["deviation"]
        l2 = float(file["l2"])
    images, targets = exported["images"], exported["targets"]
    ridge = images.T @ images / len(images) + l2 * np.eye(6)
    weight = np.linalg.solve(ridge, images.T @ targets / len(images))
    model = eqd.linear.LogisticRegression(6, 1)
    got = outputs(distilled, train.images, model)
    np.testing.assert_allclose(got, rows @ weight, atol=1e-4)
