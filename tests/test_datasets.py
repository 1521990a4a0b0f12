import contextlib
import functools
import gzip
import hashlib
import http.server
import shutil
import sys
import tarfile
import threading
import tracemalloc
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd


SHIPPED = Path(__file__).parents[1] / "examples" / "data" / "mnist"
NAMES = sorted(path.name for path in SHIPPED.glob("*.gz"))
NO_SERVER = "http://127.0.0.1:9/"


@pytest.fixture
def folder(tmp_path):
    """A copy of MNIST."""
    for name in NAMES:
        shutil.copy(SHIPPED / name, tmp_path)
    return tmp_path


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without local datasets, and with an empty cache."""
    monkeypatch.setattr(eqd.datasets, "__file__", str(tmp_path / "a" / "b.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EQDISTILL_DATA_DIR", raising=False)
    return tmp_path


@pytest.fixture
def serve(monkeypatch):
    """Publishes a dataset by the files in a folder, on a loopback server."""
    with contextlib.ExitStack() as stack:

        def serve(name, folder):
            handler = functools.partial(
                http.server.SimpleHTTPRequestHandler, directory=str(folder)
            )
            monkeypatch.setattr(handler.func, "log_message", lambda *args: None)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            stack.enter_context(server)
            threading.Thread(
                target=server.serve_forever, args=(0.01,), daemon=True
            ).start()
            stack.callback(server.shutdown)
            publish(monkeypatch, name, f"http://127.0.0.1:{server.server_port}/")
            for file in folder.iterdir():
                hashed = hashlib.sha256(file.read_bytes()).hexdigest()
                registry = eqd.datasets._SOURCES[name].registry
                if file.name in registry:
                    monkeypatch.setitem(registry, file.name, hashed)

        yield serve


def publish(monkeypatch, name, url):
    source = eqd.datasets._SOURCES[name]._replace(url=url, system=None)
    monkeypatch.setitem(eqd.datasets._SOURCES, name, source)


def test_mnist(mnist):
    train, test = mnist
    assert train.images.shape == (60_000, 28, 28)
    assert test.images.shape == (10_000, 28, 28)
    assert train.images.dtype == test.images.dtype == jnp.uint8
    assert train.num_classes == test.num_classes == 10
    counts = np.bincount(np.ravel(train.images), minlength=256)
    levels = np.arange(256) / 255
    mean = np.average(levels, weights=counts)
    deviation = np.sqrt(np.average((levels - mean) ** 2, weights=counts))
    # The published values.
    np.testing.assert_allclose(mean, 0.1307, atol=5e-5)
    np.testing.assert_allclose(deviation, 0.3081, atol=5e-5)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(train.labels).tolist() == counts


def test_digits(digits):
    train, test = digits
    assert train.images.shape == (1347, 8, 8)
    assert test.images.shape == (450, 8, 8)
    assert train.images.max() == 255
    assert 0 <= train.floating().min() <= train.floating().max() == 1
    assert np.bincount(test.labels).min() >= 43


def test_folders_are_searched_in_order(folder, nowhere, monkeypatch):
    named = folder / "named"
    (named / "mnist").mkdir(parents=True)
    for name in NAMES:  # Not compressed.
        data = gzip.decompress((folder / name).read_bytes())
        (named / "mnist" / name.removesuffix(".gz")).write_bytes(data)
    by_argument = eqd.datasets.load("mnist", named)
    monkeypatch.setenv("EQDISTILL_DATA_DIR", str(named))
    monkeypatch.setitem(sys.modules, "pooch", None)  # It is not needed.
    by_variable = eqd.datasets.load("mnist")
    for train, test in (by_argument, by_variable):
        assert len(train) == 60_000
        assert len(test) == 10_000
    # The argument comes first: it has a corrupt file.
    (folder / NAMES[0]).write_bytes(b"")
    with pytest.raises(ValueError, match="Cannot read"):
        eqd.datasets.load("mnist", folder)


def test_bad_idx_files(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    data = path.read_bytes()
    corrupt = gzip.compress(gzip.decompress(data)[:-1] + b"\1", 1)
    for bad, found in (
        (data[: len(data) // 2], "truncated or not a gzip file"),
        (b"<html>404</html>", "truncated or not a gzip file"),
        (b"", "7840016 bytes.* has 0 bytes"),
        (corrupt, "SHA-256 0fa7.* has 7840016 bytes and SHA-256"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=found) as info:
            eqd.datasets.load("mnist", folder)
        assert str(path) in str(info.value)


def test_large_files_are_not_unpacked(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(300 * 2**20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="has more than 47040016 bytes"):
            eqd.datasets.load("mnist", folder)
        assert tracemalloc.get_traced_memory()[1] < 120 * 2**20
    finally:
        tracemalloc.stop()


def test_missing_files(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="`data_dir` must be a folder with"):
        eqd.datasets.load("mnist", folder)


def test_files_are_downloaded_once(nowhere, serve, monkeypatch):
    serve("mnist", SHIPPED)
    assert len(eqd.datasets.load("mnist")[0]) == 60_000
    publish(monkeypatch, "mnist", NO_SERVER)
    assert len(eqd.datasets.load("mnist")[0]) == 60_000
    # A file that was corrupted in the cache is downloaded again, if possible.
    cached = nowhere / "cache" / "eqdistill" / "mnist" / NAMES[0]
    cached.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        eqd.datasets.load("mnist")
    serve("mnist", SHIPPED)
    assert len(eqd.datasets.load("mnist")[1]) == 10_000


def test_wrong_downloads_are_refused(nowhere, serve, monkeypatch):
    serve("fashion_mnist", SHIPPED)
    registry = eqd.datasets._SOURCES["fashion_mnist"].registry
    monkeypatch.setitem(registry, "train-images-idx3-ubyte.gz", "md5:0")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"hash of downloaded file .*train-images"):
            eqd.datasets.load("fashion_mnist")
        assert not [*(nowhere / "cache").rglob("*ubyte*")]


@pytest.mark.parametrize("has_pooch", [True, False])
def test_without_a_network(nowhere, monkeypatch, has_pooch):
    publish(monkeypatch, "mnist", NO_SERVER)
    if not has_pooch:
        monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        eqd.datasets.load("mnist")
    monkeypatch.setenv("EQDISTILL_DATA_DIR", str(nowhere))
    with pytest.raises(FileNotFoundError, match=f"are not in {nowhere}") as info:
        eqd.datasets.load("mnist")
    assert ("pip install" in str(info.value)) != has_pooch


# The binary version of CIFAR-10, with fewer images.
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
ARCHIVE = "cifar-10-binary.tar.gz"


@pytest.fixture
def cifar(nowhere, monkeypatch):
    """A folder with six files of random pixels, and the two sets in them."""
    monkeypatch.setattr("eqdistill._data._readers.CIFAR10_IMAGES", 20)
    folder = nowhere / "made" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    classes = "airplane automobile bird cat deer dog frog horse ship truck"
    sets = []
    for names in (TRAIN, ["test_batch.bin"]):
        n = 20 * len(names)
        labels = np.sort(np.arange(n, dtype=np.uint8) % 10)
        images = rng.integers(256, size=(n, 3, 32, 32), dtype=np.uint8)
        records = np.concatenate([labels[:, None], images.reshape(n, -1)], axis=1)
        for name, part in zip(names, np.split(records, len(names)), strict=True):
            (folder / name).write_bytes(part.tobytes())
        sets.append(eqd.Dataset(images, labels, class_names=classes.split()))
    return folder, *sets


def pack(folder, files):
    """An archive in a new folder."""
    folder.mkdir()
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for file in files:
            archive.add(file, f"cifar-10-batches-bin/{file.name}")
    return folder


def test_cifar10(cifar):
    folder, *wanted = cifar
    moved = folder.parent / "moved" / "cifar10"
    shutil.copytree(folder, moved / folder.name)
    for data_dir in (folder, folder.parent, moved, moved.parent):
        got = eqd.datasets.load("cifar10", data_dir)
        for a, b in zip(got, wanted, strict=True):
            assert eqx.tree_equal(a, b)
    for part in got[0].split(0.1, key=jr.key(0)):
        assert part.class_names == wanted[0].class_names


def test_bad_cifar10_files(cifar):
    folder, *_ = cifar
    path = folder / "data_batch_1.bin"
    data = path.read_bytes()
    for bad, found in (
        (data[:-1], "has 61460 bytes; got 61459"),
        (b"\x09" + data[1:], r"the same number of images.*\[9, 10, "),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=found) as info:
            eqd.datasets.load("cifar10", folder)
        assert str(path) in str(info.value)


def test_cifar10_is_downloaded_once(cifar, serve, tmp_path, monkeypatch):
    folder, *wanted = cifar
    # In any order.
    serve("cifar10", pack(tmp_path / "served", sorted(folder.iterdir(), reverse=True)))
    for a, b in zip(eqd.datasets.load("cifar10"), wanted, strict=True):
        assert eqx.tree_equal(a, b)
    publish(monkeypatch, "cifar10", NO_SERVER)
    assert eqx.tree_equal(eqd.datasets.load("cifar10")[1], wanted[1])


def test_bad_archives(cifar, tmp_path):
    folder, *_ = cifar
    few = pack(tmp_path / "few", [folder / "test_batch.bin"])
    with pytest.raises(ValueError, match=r"has 1 '\.bin' files; expected 6"):
        eqd.datasets.load("cifar10", few)
    (few / ARCHIVE).write_bytes(b"<html>")
    with pytest.raises(ValueError, match=rf"{ARCHIVE}: it cannot be unpacked"):
        eqd.datasets.load("cifar10", few)
    (folder / "data_batch_1.bin").unlink()
    (folder / "data_batch_1.bin").symlink_to("test_batch.bin")
    linked = pack(tmp_path / "linked", folder.iterdir())
    with pytest.raises(ValueError, match=r"has 5 '\.bin' files"):
        eqd.datasets.load("cifar10", linked)
