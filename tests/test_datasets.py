import contextlib
import functools
import gzip
import hashlib
import http.server
import shutil
import tarfile
import threading
import tracemalloc
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import PIL.Image
import pytest

import eqdistill as eqd
from eqdistill._data._cifar import CifarBinary
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
    counts = np.bincount(np.ravel(train.images), minlength=256)
    levels = np.arange(256) / 255
    mean = np.average(levels, weights=counts)
    deviation = np.sqrt(np.average((levels - mean) ** 2, weights=counts))
    # As published.
    np.testing.assert_allclose(mean, 0.1307, atol=5e-5)
    np.testing.assert_allclose(deviation, 0.3081, atol=5e-5)
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
            r"promises shape \(10000, 28, 28\).*7840016 bytes.*has only 7840015",
        ),
        (
            lambda data: gzip.compress(gzip.decompress(data)[:-1] + b"\1", 1),
            r"shape \(10000, 28, 28\).*not the published ones: SHA-256",
        ),
        (
            lambda data: (SHIPPED / "train-labels-idx1-ubyte.gz").read_bytes(),
            r"shape \(60000,\), where \(10000, 28, 28\) was wanted",
        ),
        (
            lambda data: gzip.compress(gzip.decompress(data)[:10], 1),
            "ends within its header, which has 16 bytes for 3 axes: it has 10",
        ),
        (lambda data: gzip.compress(b"\0\0\x08\xff" + bytes(40)), "for 255 axes"),
    ],
    ids=[
        "truncated",
        "html",
        "empty",
        "floats",
        "short",
        "corrupt",
        "mismatched",
        "cut",
        "axes",
    ],
)
def test_spoilt_files(folder, spoil, found):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=found) as info:
        eqd.datasets.load("mnist", folder)
    assert str(path) in str(info.value)
    assert "`data_dir`" in str(info.value)


def test_unpacks_no_more_than_was_published(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    header = gzip.decompress(path.read_bytes())[:16]
    path.write_bytes(gzip.compress(header + bytes(300 * 2**20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"47040016 bytes .*but it has more"):
            eqd.datasets.load("mnist", folder)
        assert tracemalloc.get_traced_memory()[1] < 120 * 2**20
    finally:
        tracemalloc.stop()


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
    """Serves a folder, and gives its address."""
    with contextlib.ExitStack() as stack:

        def serve(folder=SHIPPED):
            handler = functools.partial(Handler, directory=str(folder))
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            stack.enter_context(server)
            threading.Thread(
                target=server.serve_forever, args=(0.01,), daemon=True
            ).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}/"

        yield serve


def serve_from(monkeypatch, name, url):
    source = SOURCES[name]._replace(url=url, system=None)
    monkeypatch.setitem(SOURCES, name, source)


def test_downloads_once(nowhere, server, monkeypatch):
    serve_from(monkeypatch, "mnist", server())
    train, _ = eqd.datasets.load("mnist")
    assert len(train) == 60_000
    # From the cache.
    serve_from(monkeypatch, "mnist", "http://127.0.0.1:9/")
    train, _ = eqd.datasets.load("mnist")
    assert len(train) == 60_000


def test_refuses_the_wrong_download(nowhere, server, monkeypatch):
    serve_from(monkeypatch, "fashion_mnist", server())
    for _ in range(2):  # Nothing of it stays in the cache.
        with pytest.raises(ValueError, match="not the published ones"):
            eqd.datasets.load("fashion_mnist")


def test_says_what_to_do_without_a_network(nowhere, monkeypatch):
    serve_from(monkeypatch, "mnist", "http://127.0.0.1:9/")
    with pytest.raises(FileNotFoundError, match="could not be downloaded") as info:
        eqd.datasets.load("mnist")
    for words in (str(nowhere), "train-images-idx3-ubyte.gz", "`data_dir`"):
        assert words in str(info.value)


# The binary version of CIFAR-10, but with fewer images.
RECORDS = 20
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]


@pytest.fixture
def cifar(nowhere, monkeypatch):
    """A folder of six files with random pixels, and the two sets in them."""
    serve_cifar(monkeypatch)
    folder = nowhere / "made" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sets = []
    for names in (TRAIN, ["test_batch.bin"]):
        n = RECORDS * len(names)
        labels = np.sort(np.arange(n, dtype=np.uint8) % 10)
        images = rng.integers(256, size=(n, 3, 32, 32), dtype=np.uint8)
        records = np.concatenate([labels[:, None], images.reshape(n, -1)], axis=1)
        for name, part in zip(names, np.split(records, len(names)), strict=True):
            (folder / name).write_bytes(part.tobytes())
        names = SOURCES["cifar10"].format.class_names
        sets.append(eqd.Dataset(images, labels, class_names=names))
    return folder, *sets


def serve_cifar(monkeypatch, url="http://127.0.0.1:9/", archive=b""):
    published = SOURCES["cifar10"].format
    small = CifarBinary(
        archive=published.archive,
        md5=hashlib.md5(archive).hexdigest(),
        records=RECORDS,
        class_names=published.class_names,
    )
    serve_from(monkeypatch, "cifar10", url)
    monkeypatch.setitem(SOURCES, "cifar10", SOURCES["cifar10"]._replace(format=small))


def make_archive(folder, add):
    """An archive in a new folder, of what `add` puts into it."""
    folder.mkdir()
    path = folder / SOURCES["cifar10"].format.archive
    with tarfile.open(path, "w:gz") as archive:
        add(archive)
    return path.read_bytes()


def test_what_is_published_of_cifar10():
    published = SOURCES["cifar10"].format
    assert published.records == 10_000
    assert published.md5 == "c32a1d4ab5d03f1284b67883e8d87530"
    assert list(published.files) == [*TRAIN, "test_batch.bin"]


@pytest.mark.parametrize("where", ["cifar10", "cifar10/cifar-10-batches-bin", "", "."])
def test_cifar10_is_found(cifar, where):
    folder, *wanted = cifar
    # "." is the folder with the files itself, and "" the folder around it.
    data_dir = folder if where == "." else folder.parent
    if where.startswith("cifar10"):
        shutil.copytree(folder, data_dir / where)
        shutil.rmtree(folder)
    got = eqd.datasets.load("cifar10", data_dir)
    for a, b in zip(got, wanted, strict=True):
        assert eqx.tree_equal(a, b)


def test_missing_cifar10(cifar):
    folder, *_ = cifar
    (folder / "data_batch_1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"not data_batch_1.bin. Put all 6"):
        eqd.datasets.load("cifar10", folder)


def test_names_are_kept(cifar):
    _, train, _ = cifar
    for part in train.split(0.1, key=jr.key(0)):
        assert part.class_names == train.class_names


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda data: data[:-1], "has 61459 bytes.*20 images of 3073 bytes.*: 61460"),
        (lambda data: b"", "has 0 bytes"),
        (lambda data: b"\x0a" + data[1:], r"labels must be in \[0, 10\).*is 10"),
        (lambda data: b"\x09" + data[1:], "same number of images.*but they have"),
    ],
    ids=["short", "empty", "label", "counts"],
)
def test_spoilt_cifar10(cifar, spoil, found):
    folder, *_ = cifar
    path = folder / "data_batch_1.bin"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=found) as info:
        eqd.datasets.load("cifar10", folder)
    assert str(path) in str(info.value)


def test_downloads_cifar10_once(cifar, server, tmp_path, monkeypatch):
    folder, *wanted = cifar
    served = tmp_path / "served"
    data = make_archive(served, lambda archive: archive.add(folder, folder.name))
    serve_cifar(monkeypatch, server(served), data)
    for a, b in zip(eqd.datasets.load("cifar10"), wanted, strict=True):
        assert eqx.tree_equal(a, b)
    cache = tmp_path / "cache" / "eqdistill" / "cifar10"
    assert sorted(file.name for file in cache.iterdir()) == [*TRAIN, "test_batch.bin"]
    serve_cifar(monkeypatch)  # From the cache.
    assert eqx.tree_equal(eqd.datasets.load("cifar10")[1], wanted[1])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"name": "../data_batch_1.bin"}, "cannot be unpacked"),
        ({"name": "/tmp/data_batch_1.bin"}, "cannot be unpacked"),
        ({"name": "cifar-10-batches-bin/data_batch_6.bin"}, "cannot be unpacked"),
        ({"type": tarfile.SYMTYPE, "size": 0}, "not a regular file of 61460"),
        ({"type": tarfile.LNKTYPE, "size": 0}, "not a regular file of 61460"),
        ({"type": tarfile.FIFOTYPE, "size": 0}, "not a regular file of 61460"),
    ],
    ids=["parent", "absolute", "missing", "symlink", "hard link", "pipe"],
)
def test_refuses_a_bad_archive(cifar, server, tmp_path, monkeypatch, change, found):
    folder, *_ = cifar

    def spoil(info):
        if info.name.endswith("data_batch_1.bin"):
            info.linkname = "cifar-10-batches-bin/test_batch.bin"
            for field, value in change.items():
                setattr(info, field, value)
        return info

    served = tmp_path / "served"
    data = make_archive(served, lambda a: a.add(folder, folder.name, filter=spoil))
    serve_cifar(monkeypatch, server(served), data)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=found):
        eqd.datasets.load("cifar10")
    cache = tmp_path / "cache"
    assert set(tmp_path.rglob("*")) == {*before, cache, cache / "eqdistill"}


def test_refuses_another_archive(cifar, server, tmp_path, monkeypatch):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"<html>")
    serve_cifar(monkeypatch, server(tmp_path))
    with pytest.raises(ValueError, match=r"not the published archive: MD5 .*wanted"):
        eqd.datasets.load("cifar10")
    serve_cifar(monkeypatch, server(tmp_path), b"<html>")  # No archive at all.
    with pytest.raises(ValueError, match=r"cannot be unpacked .*gzip"):
        eqd.datasets.load("cifar10")
    assert not (tmp_path / "cache" / "eqdistill" / "cifar10").exists()


def test_cifar10_is_the_same_as_pngs(cifar, tmp_path):
    _, train, _ = cifar
    pictures = np.moveaxis(np.asarray(train.images), 1, 3)
    for i, (picture, label) in enumerate(zip(pictures, train.labels, strict=True)):
        folder = tmp_path / "pngs" / train.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(folder / f"{i:05}.png")
    assert eqx.tree_equal(eqd.datasets.from_folder(tmp_path / "pngs"), train)
