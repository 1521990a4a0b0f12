"""Pre-trained networks of other packages, and features that are kept in files."""

import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd


KEY = jr.key(0)


class Features(eqx.Module):
    weight: jax.Array
    activation: str = eqx.field(static=True, default="tanh")

    def __call__(self, image):
        return getattr(jnp, self.activation)(self.weight @ jnp.ravel(image))


def features(key=KEY, **kwargs):
    return Features(0.1 * jr.normal(key, (5, 9)), **kwargs)


def real(seed=0, dtype=np.float32):
    pixels = np.random.default_rng(seed).integers(256, size=(12, 3, 3))
    images = pixels.astype(dtype) if dtype == np.uint8 else pixels / dtype(255)
    return eqd.Dataset(images, np.arange(12) % 3)


def test_features_are_kept_in_files(tmp_path):
    folder = tmp_path / "new" / "folder"
    names = lambda: {file.name for file in folder.iterdir()}
    wanted = real().map(features()).images
    for _ in range(2):
        found = real().map(features(), directory=folder)
        np.testing.assert_array_equal(found.images, wanted)
    (name,) = names()
    # Other outputs in the file show that it is read.
    np.save(folder / name, np.asarray(wanted) + 1)
    found = real().map(features(), directory=folder)
    np.testing.assert_array_equal(found.images, wanted + 1)
    # Anything else that changes the outputs changes the name.
    others = [(features(jr.key(1)), real()), (features(activation="sin"), real())]
    others += [(features(), real(1)), (features(), real(0, np.uint8))]
    for i, (fn, data) in enumerate(others):
        data.map(fn, directory=folder)
        assert len(names()) == i + 2
    with pytest.raises(ZeroDivisionError):
        real().map(lambda x: x / (1 // 0), directory=folder)
    assert len(names()) == len(others) + 1  # No part of a file is left.


def test_half_precision_is_kept(tmp_path):
    half = lambda x: jnp.ravel(x).astype(jnp.bfloat16)
    for _ in range(2):
        found = real().map(half, directory=tmp_path).images
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, real().map(half).images)


@pytest.mark.slow
def test_another_process_finds_the_file(tmp_path):
    """Of a network whose program has custom derivatives."""
    code = (
        "import equinox as eqx, jax.random as jr, numpy as np, eqdistill as eqd;"
        "net = eqd.nn.ConvNet((8, 8), 3, widths=(4,), key=jr.key(0));"
        "images = np.arange(12 * 64.0).reshape(12, 8, 8).astype(np.float32);"
        f"eqd.Dataset(images, np.arange(12) % 3).map(net, directory={str(tmp_path)!r})"
    )
    exec(code, {})
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path.cwd())
    assert len(list(tmp_path.iterdir())) == 1


def test_cached_parts_keep_their_outputs(tmp_path):
    part = eqd.Cached(features(), "a", tmp_path)
    head = eqd.linear.LogisticRegression(5, 3).head
    model = eqd.linear.LinearClassifier(part, head)
    data = eqd.FullBatch(real(), cached=[part])
    np.testing.assert_array_equal(data.cached["a"], real().map(features()).images)
    (path,) = tmp_path.iterdir()
    start = eqd.DistilledSet(real().images[:3], np.arange(3), l2=0.1).with_targets(3)
    plain = eqd.linear.LinearClassifier(eqd.Cached(features(), "a"), head)
    wanted = eqd.evaluate(start, plain, real())
    assert eqd.evaluate(start, model, real()).loss == pytest.approx(wanted.loss)
    assert [*tmp_path.iterdir()] == [path]
    # The file, and not the network, decides.
    np.save(path, -np.load(path))
    assert abs(eqd.evaluate(start, model, real()).loss - wanted.loss) > 1e-3
    result = eqd.distill(start, model, eqd.Batches(real(1), 6, cached=[part]), steps=1)
    assert np.isfinite(result.history.loss).all()
    assert len([*tmp_path.iterdir()]) == 2


def test_backbone_prepares_images():
    network = lambda x: jnp.concatenate([x.mean((1, 2)), x[:, 0, 0]])
    mean, deviation = np.float32([0.1, 0.2, 0.3]), np.float32([1.0, 2.0, 4.0])
    backbone = eqd.nn.Backbone(
        network, (3, 4, 4), mean=mean.tolist(), deviation=deviation.tolist()
    )
    colour = np.random.default_rng(0).uniform(size=(3, 2, 2)).astype(np.float32)
    for image in (colour, colour[:1], colour[0]):
        full = np.broadcast_to(image, (3, 2, 2))
        pixels = np.stack([full.mean((1, 2)), full[:, 0, 0]])
        wanted = ((pixels - mean) / deviation).ravel()
        np.testing.assert_allclose(backbone(jnp.asarray(image)), wanted, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`image` must have .* got \(2, 4, 4\)"):
        backbone(jnp.ones((2, 4, 4)))
    # Its arrays are not fitted.
    head = eqd.linear.LogisticRegression(6, 3).head
    model = eqd.linear.LinearClassifier(backbone, head)
    mask = eqd.nn.parameters(model)
    assert sum(jax.tree.leaves(mask)) == 1


@pytest.mark.slow
def test_vision_transformer(tmp_path):
    vit = pytest.importorskip("equimo.models").VisionTransformer(
        *(32, 3, 16, 16, 2, [1]), drop_path_rate=0.5, num_classes=0, key=KEY
    )
    backbone = eqd.nn.Backbone(eqx.Partial(vit, inference=True), (3, 32, 32))
    train = real(0, np.uint8)
    cached = eqd.Cached(backbone, "vit", tmp_path)
    head = eqd.linear.LogisticRegression(16, 3).head
    model = eqd.linear.LinearClassifier(cached, head)
    start = eqd.DistilledSet.from_real(train, l2=1e-3, key=KEY).with_targets(3)
    start = eqd.Pyramid.from_distilled(start)
    inner = eqd.augment.AugmentedFit(eqd.augment.Flip(), copies=2)
    result = eqd.distill(
        start,
        eqd.Bilevel(model, inner),
        eqd.FullBatch(train, cached=[cached]),
        learn=lambda s: s.levels.images,
        steps=5,
    )
    assert result.history.loss[-1] < result.history.loss[0]
    wanted = jax.vmap(lambda x: vit(backbone_input(x), inference=True))
    images = np.broadcast_to(train.images[:, None] / np.float32(255), (12, 3, 3, 3))
    large = jax.image.resize(images, (12, 3, 32, 32), "bilinear")
    (path,) = tmp_path.iterdir()
    np.testing.assert_allclose(np.load(path), wanted(large), rtol=1e-4, atol=1e-4)


def backbone_input(image):
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    column = lambda x: jnp.asarray(x)[:, None, None]
    return (image - column(mean)) / column(deviation)
