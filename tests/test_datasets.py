import functools
import gzip
import http.server
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import eqdistill as eqd
from eqdistill._data._sources import SOURCES


SHIPPED = Path(__file__).parents[1] / "examples" / "data" / "mnist"
NAMES = sorted(path.name for path in SHIPPED.glob("*.gz"))
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def folder(tmp_path):
    """A copy of MNIST that may be spoilt."""
    for name in NAMES:
        shutil.copy(SHIPPED / name, tmp_path)
    return tmp_path


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine on which no dataset is to be found, with an empty cache."""
    monkeypatch.setattr(eqd.datasets, "__file__", str(tmp_path / "a" / "b.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EQDISTILL_DATA_DIR", raising=False)
    return tmp_path


def test_mnist(mnist):
    train, test = mnist
    assert train.images.shape == (60_000, 28, 28)
    assert test.images.shape == (10_000, 28, 28)
    assert train.images.dtype == test.images.dtype == jnp.uint8
    assert train.num_classes == test.num_classes == 10
    pixels = np.asarray(train.images, np.float64) / 255
    # As published.
    np.testing.assert_allclose(pixels.mean(), 0.1307, atol=5e-5)
    np.testing.assert_allclose(pixels.std(), 0.3081, atol=5e-5)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(train.labels).tolist() == counts


@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist not installed")
def test_fashion_mnist():
    train, test = eqd.datasets.load("fashion_mnist")
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10


def test_digits(digits):
    train, test = digits
    assert train.images.shape == (1347, 8, 8)
    assert test.images.shape == (450, 8, 8)
    assert train.images.max() == 255
    assert 0 <= train.floating().min() <= train.floating().max() == 1
    assert np.bincount(test.labels).min() >= 43


def test_looks_in_order(folder, nowhere, monkeypatch):
    named = folder / "named"
    (named / "mnist").mkdir(parents=True)
    for name in NAMES:
        # Not compressed, and in a folder of the dataset's name.
        data = gzip.decompress((folder / name).read_bytes())
        (named / "mnist" / name.removesuffix(".gz")).write_bytes(data)
    by_argument = eqd.datasets.load("mnist", named)
    monkeypatch.setenv("EQDISTILL_DATA_DIR", str(named))
    by_variable = eqd.datasets.load("mnist")
    # The argument comes first: this one is found, and is bad.
    (folder / NAMES[0]).write_bytes(b"")
    with pytest.raises(ValueError, match="Cannot read"):
        eqd.datasets.load("mnist", folder)
    for train, test in (by_argument, by_variable):
        assert len(train) == 60_000
        assert len(test) == 10_000


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda data: data[: len(data) // 2], "truncated or not a gzip file"),
        (lambda data: b"<html>404</html>", "truncated or not a gzip file"),
        (lambda data: b"", "not an IDX file of bytes: it begins with b''"),
        (lambda data: gzip.compress(b"\0\0\r\2" + bytes(8)), "not an IDX file"),
        (
            lambda data: gzip.compress(gzip.decompress(data)[:-1], 1),
            r"promises shape \(10000, 28, 28\).*7840016 bytes.*has 7840015",
        ),
        (
            lambda data: gzip.compress(gzip.decompress(data)[:-1] + b"\1", 1),
            r"shape \(10000, 28, 28\).*not the published ones: SHA-256",
        ),
        (
            lambda data: (SHIPPED / "train-labels-idx1-ubyte.gz").read_bytes(),
            r"shape \(60000,\).*not the published ones",
        ),
    ],
    ids=["truncated", "html", "empty", "floats", "short", "corrupt", "mismatched"],
)
def test_spoilt_files(folder, spoil, found):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=found) as info:
        eqd.datasets.load("mnist", folder)
    assert str(path) in str(info.value)
    assert "`data_dir`" in str(info.value)


def test_missing_files(folder, nowhere):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="but not t10k-labels-idx1-ubyte"):
        eqd.datasets.load("mnist", folder)
    with pytest.raises(FileNotFoundError, match=r"`data_dir`.*that exists; got '.*no'"):
        eqd.datasets.load("mnist", folder / "no")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    handler = functools.partial(Handler, directory=str(SHIPPED))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def serve_from(monkeypatch, name, url):
    source = SOURCES[name]._replace(url=url, system=None)
    monkeypatch.setitem(SOURCES, name, source)


def test_downloads_once(nowhere, server, monkeypatch):
    serve_from(monkeypatch, "mnist", server)
    train, _ = eqd.datasets.load("mnist")
    assert len(train) == 60_000
    # From the cache.
    serve_from(monkeypatch, "mnist", "http://127.0.0.1:9/")
    train, _ = eqd.datasets.load("mnist")
    assert len(train) == 60_000


def test_refuses_the_wrong_download(nowhere, server, monkeypatch):
    serve_from(monkeypatch, "fashion_mnist", server)
    for _ in range(2):  # Nothing of it stays in the cache.
        with pytest.raises(ValueError, match="not the published ones"):
            eqd.datasets.load("fashion_mnist")


def test_says_what_to_do_without_a_network(nowhere, monkeypatch):
    serve_from(monkeypatch, "mnist", "http://127.0.0.1:9/")
    with pytest.raises(FileNotFoundError, match="could not be downloaded") as info:
        eqd.datasets.load("mnist")
    for words in (str(nowhere), "train-images-idx3-ubyte.gz", "`data_dir`"):
        assert words in str(info.value)
