import io

import equinox as eqx
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import eqdistill as eqd
from eqdistill._outer._distillation import History


def make_set(labels, shape=(5, 4), **kwargs):
    images = np.random.default_rng(0).normal(size=(len(labels), *shape))
    return eqd.DistilledSet(images.astype(np.float32), labels, l2=0.1, **kwargs)


def in_unit_range(images):
    """Colour images, channels last, as they should be drawn."""
    images = np.asarray(images)
    images = np.moveaxis(images, 1, 3) if images.shape[1] == 3 else images
    return (images - images.min()) / (images.max() - images.min())


def test_grey_images_have_a_symmetric_scale():
    d = make_set(np.arange(7), shape=(1, 5, 4))
    drawn = [axis for axis in eqd.plot.images(d).axes if axis.images]
    assert [axis.get_title() for axis in drawn] == [str(i) for i in range(7)]
    limit = np.abs(d.images).max()
    for axis, image in zip(drawn, d.images, strict=True):
        (picture,) = axis.images
        assert picture.get_clim() == (-limit, limit)
        np.testing.assert_array_equal(picture.get_array(), image[0])


@pytest.mark.parametrize("shape", [(3, 5, 4), (5, 4, 3)])
def test_colour_images_have_an_affine_scale(shape):
    d = make_set(np.arange(2), shape=shape)
    levels = np.linspace(0, 1, 120, dtype=np.float32).reshape(2, *shape)
    for images in (d.images, levels):
        figure = eqd.plot.images(eqx.tree_at(lambda d: d.images, d, images))
        # There is no colour bar.
        for axis, wanted in zip(figure.axes, in_unit_range(images), strict=True):
            np.testing.assert_allclose(axis.images[0].get_array(), wanted, atol=1e-6)


def test_soft_labels():
    d = make_set(np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], np.float32)))
    titles = [axis.get_title() for axis in eqd.plot.images(d).axes if axis.images]
    assert titles == ["0 (70%)", "2 (80%)"]
    many = make_set(4 * np.eye(3, dtype=np.float32)[np.arange(60) % 3])
    texts = eqd.plot.images(many).axes[0].texts
    assert [text.get_text() for text in texts] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("loss", "labels", "wanted"),
    [
        (eqd.SquaredError(), [[0.25], [-1234.5]], ["0.25", "-1.23e+03"]),
        (eqd.SquaredError(), [[1, 2], [3, 4]], ["1, 2", "3, 4"]),
        (eqd.SquaredError(), [[0, 2, 1], [9, 8, 0]], ["1", "0"]),
        (eqd.BinaryCrossEntropy(), [[1, 0, 1], [0, 0, 0]], ["0, 2", ""]),
    ],
)
def test_targets(loss, labels, wanted):
    labels = np.array(labels, np.float32)
    figure = eqd.plot.images(make_set(labels, loss=loss))
    assert [axis.get_title() for axis in figure.axes if axis.images] == wanted
    mosaic = eqd.plot.images(make_set(np.repeat(labels, 30, axis=0), loss=loss))
    classes = [text.get_text() for text in mosaic.axes[0].texts]
    is_class = isinstance(loss, eqd.SquaredError) and labels.shape[1] == 3
    assert classes == (["0", "1"] if is_class else [])


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
def test_mosaic_has_a_row_for_each_class(tmp_path, shape):
    labels = np.random.default_rng(1).permutation(np.arange(60) % 3)
    d = make_set(labels, shape=shape)
    figure = eqd.plot.images(d)
    (picture,) = figure.axes[0].images
    canvas = np.ma.filled(picture.get_array(), np.nan)
    # With a gap on the right of each image and below it, and the label on the left.
    height, width = 7, 6
    assert canvas.shape[:2] == (3 * height, 21 * width)
    wanted = in_unit_range(d.images) if len(shape) == 3 else d.images
    for class_, text in enumerate(figure.axes[0].texts):
        assert text.get_text() == str(class_)
        assert text.get_position()[1] == class_ * height + 3
        row = canvas[class_ * height :][:height]
        for i, image in enumerate(wanted[labels == class_]):
            drawn = row[:6, (i + 1) * width :][:, :5]
            np.testing.assert_allclose(drawn, image, atol=1e-6)
    empty = canvas[:, :width]
    assert (empty == 1).all() if len(shape) == 3 else np.isnan(empty).all()
    figure.savefig(tmp_path / "images.png")


def test_class_names():
    labels, names = np.array([1, 0, 1]), ["cat", "aeroplane"]
    images = make_set(np.tile(labels, 20)).images
    d = eqd.DistilledSet(images[:3], labels, l2=0.1, class_names=names)
    titles = [axis.get_title() for axis in eqd.plot.images(d).axes if axis.images]
    assert titles == ["aeroplane", "cat", "aeroplane"]
    many = eqd.DistilledSet(images, np.tile(labels, 20), l2=0.1, class_names=names)
    (axis, *_) = eqd.plot.images(many).axes
    assert [text.get_text() for text in axis.texts] == names
    # Three columns of five pixels are left for nine characters.
    empty = np.ma.filled(axis.images[0].get_array(), np.nan)[:, : 3 * 5]
    assert np.isnan(empty).all()


def test_history(tmp_path):
    loss, norm, residual = np.geomspace(1, 1e-4, 60, dtype=np.float32).reshape(3, 20)
    history = History(loss, norm, {"inner_residual": residual, "other": loss})
    figure = eqd.plot.history(history)
    left, right = figure.axes
    lines = (*left.lines, *right.lines)
    for line, values in zip(lines, (loss, norm, residual, loss), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert right.get_yscale() == "log"
    _, labels = right.get_legend_handles_labels()
    assert labels == ["gradient norm", "inner residual", "other"]
    figure.savefig(tmp_path / "history.png")


def test_long_history_has_medians():
    series = np.tile(np.arange(1, 7, dtype=np.float32), 200)
    left, right = eqd.plot.history(History(series, 2 * series, {})).axes
    pale, dark = left.lines
    np.testing.assert_array_equal(pale.get_ydata(), series)
    np.testing.assert_allclose(dark.get_xdata(), np.arange(5.5, 1200, 12))
    np.testing.assert_array_equal(dark.get_ydata(), np.full(100, 3.5))
    assert len(right.lines) == 2


def test_given_axes():
    figure = Figure()
    left, right, below, last = figure.subplots(2, 2).ravel()
    place = left.get_position(original=True)
    d = make_set(np.arange(10), shape=(6, 5))
    assert eqd.plot.images(d, ax=left, columns=1) is figure
    # A colour bar would take space from other axes.
    assert len(figure.axes) == 4
    assert left.get_position(original=True).bounds == place.bounds
    assert sorted(text.get_text() for text in left.texts) == [str(i) for i in range(10)]
    canvas = np.ma.filled(left.images[0].get_array(), np.nan)
    np.testing.assert_allclose(canvas[:6, 6:11], d.images[0], atol=1e-6)
    series = np.geomspace(1, 1e-4, 20, dtype=np.float32)
    history = History(series, series, {})
    assert eqd.plot.history(history, ax=[below, last]) is figure
    np.testing.assert_array_equal(below.lines[0].get_ydata(), series)
    assert not right.has_data()


def test_display_in_a_notebook():
    content, size = eqd.plot.images(make_set(np.arange(2)))._repr_png_()
    picture = Image.open(io.BytesIO(content))
    assert picture.width == 2 * size["width"]
    assert picture.height == pytest.approx(2 * size["height"], abs=1)


def test_constant_images(tmp_path):
    for shape in ((5, 4), (3, 5, 4)):
        zeros = eqd.DistilledSet(np.zeros((60, *shape), "f4"), np.arange(60), l2=0.1)
        eqd.plot.images(zeros).savefig(tmp_path / "images.png")
