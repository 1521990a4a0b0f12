import io

import equinox as eqx
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import eqdistill as eqd


def distilled(labels, shape=(5, 4)):
    images = np.random.default_rng(0).normal(size=(len(labels), *shape))
    return eqd.DistilledSet(images.astype(np.float32), labels, l2=0.1)


def test_images_share_a_symmetric_scale(tmp_path):
    d = distilled(np.arange(7), shape=(1, 5, 4))
    figure = eqd.plot.images(d)
    drawn = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn] == [str(i) for i in range(7)]
    limit = np.abs(d.images).max()
    for axis, image in zip(drawn, d.images, strict=True):
        (picture,) = axis.images
        assert picture.get_clim() == (-limit, limit)
        np.testing.assert_array_equal(picture.get_array(), image[0])
    figure.savefig(tmp_path / "images.png")


def test_soft_labels_are_named():
    d = distilled(np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], np.float32)))
    titles = [axis.get_title() for axis in eqd.plot.images(d).axes if axis.images]
    assert titles == ["0 (70%)", "2 (80%)"]


@pytest.mark.parametrize("shape", [(3, 5, 4), (5, 4, 3)])
def test_colours_share_an_affine_scale(tmp_path, shape):
    d = distilled(np.arange(2), shape=shape)
    figure = eqd.plot.images(d)
    images = np.asarray(d.images)
    if shape[0] == 3:
        images = np.moveaxis(images, 1, 3)
    low, high = images.min(), images.max()
    for axis, image in zip(figure.axes, images, strict=True):  # There is no bar.
        drawn = axis.images[0].get_array()
        np.testing.assert_allclose(drawn, (image - low) / (high - low), atol=1e-6)
    figure.savefig(tmp_path / "images.png")


def test_real_colours_are_drawn_as_they_are():
    d = distilled(np.arange(2), shape=(5, 4, 3))
    levels = np.linspace(0, 1, 120, dtype=np.float32).reshape(2, 5, 4, 3)
    figure = eqd.plot.images(eqx.tree_at(lambda d: d.images, d, levels))
    for axis, image in zip(figure.axes, levels, strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), image, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
def test_many_images_have_a_row_for_each_class(tmp_path, shape):
    labels = np.random.default_rng(1).permutation(np.arange(60) % 3)
    d = distilled(labels, shape=shape)
    figure = eqd.plot.images(d)
    (picture,) = figure.axes[0].images
    canvas = np.ma.filled(picture.get_array(), np.nan)
    # A gap on the right of and below each image, and room for the class on the left.
    height, width = 7, 6
    assert canvas.shape[:2] == (3 * height, 21 * width)
    low, high = d.images.min(), d.images.max()
    for class_, text in enumerate(figure.axes[0].texts):
        assert text.get_text() == str(class_)
        assert text.get_position()[1] == class_ * height + 3
        row = canvas[class_ * height :][:height]
        for i, image in enumerate(d.images[labels == class_]):
            drawn = row[:6, (i + 1) * width :][:, :5]
            if len(shape) == 3:
                image = (np.moveaxis(image, 0, 2) - low) / (high - low)
            np.testing.assert_allclose(drawn, image, atol=1e-6)
    empty = canvas[:, :width]
    assert (empty == 1).all() if len(shape) == 3 else np.isnan(empty).all()
    figure.savefig(tmp_path / "images.png")


def test_a_mosaic_takes_rows_and_blocks(tmp_path):
    figure = eqd.plot.images(distilled(np.arange(60) % 3), columns=10)
    (picture,) = figure.axes[0].images
    # Two rows for each class of 20, and a gap of a quarter of an image below them.
    assert np.shape(picture.get_array()) == (3 * (2 * 6 + 1), 11 * 5)
    figure = eqd.plot.images(distilled(np.arange(100)))
    (picture,) = figure.axes[0].images
    # One image in a class: blocks of classes stand side by side.
    rows, columns = np.shape(picture.get_array())
    assert rows <= columns < 2 * rows
    assert len(figure.axes[0].texts) == 100
    figure.savefig(tmp_path / "images.png")


def test_soft_labels_in_a_mosaic_go_to_their_most_likely_class():
    labels = 4 * np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    axis = eqd.plot.images(distilled(labels)).axes[0]
    assert [text.get_text() for text in axis.texts] == ["0", "1", "2"]


def test_images_refuses():
    with pytest.raises(ValueError, match=r"`distilled`.*got \(2, 5, 4\)"):
        eqd.plot.images(distilled(np.arange(2), shape=(2, 5, 4)))
    with pytest.raises(ValueError, match=r"`columns` must be at least 1; got 0"):
        eqd.plot.images(distilled(np.arange(2)), columns=0)


def test_equal_pixels_are_drawn(tmp_path):
    for shape in ((5, 4), (3, 5, 4)):
        zeros = eqd.DistilledSet(np.zeros((60, *shape), "f4"), np.arange(60), l2=0.1)
        eqd.plot.images(zeros).savefig(tmp_path / "images.png")


def test_history(tmp_path):
    series = np.geomspace(1, 1e-4, 60, dtype=np.float32).reshape(3, 20)
    figure = eqd.plot.history(eqd.History(*series))
    left, right = figure.axes
    lines = (*left.lines, *right.lines)
    for line, values in zip(lines, series, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert right.get_yscale() == "log"
    figure.savefig(tmp_path / "history.png")


def test_long_history_has_medians(tmp_path):
    series = np.tile(np.arange(1, 7, dtype=np.float32), 200)
    figure = eqd.plot.history(eqd.History(series, 2 * series, 3 * series))
    left, right = figure.axes
    pale, dark = left.lines
    np.testing.assert_array_equal(pale.get_ydata(), series)
    np.testing.assert_allclose(dark.get_xdata(), np.arange(5.5, 1200, 12))
    np.testing.assert_array_equal(dark.get_ydata(), np.full(100, 3.5))
    _, labels = right.get_legend_handles_labels()
    assert labels == ["hypergradient", "inner residual"]
    figure.savefig(tmp_path / "history.png")


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
def test_draws_into_given_axes(shape):
    figure = Figure()
    # A colour bar would take room from the axes beside.
    left, right, below, last = figure.subplots(2, 2).ravel()
    place = left.get_position(original=True)
    d = distilled(np.arange(10), shape=shape)
    assert eqd.plot.images(d, ax=left, columns=1) is figure
    assert len(figure.axes) == 4
    assert left.get_position(original=True).bounds == place.bounds
    assert sorted(text.get_text() for text in left.texts) == [str(i) for i in range(10)]
    canvas = np.ma.filled(left.images[0].get_array(), np.nan)
    drawn = canvas[:6, 6:11]
    image = np.asarray(d.images[0])
    if len(shape) == 3:
        low, high = d.images.min(), d.images.max()
        image = (np.moveaxis(image, 0, 2) - low) / (high - low)
    np.testing.assert_allclose(drawn, image, atol=1e-6)
    series = np.geomspace(1, 1e-4, 60, dtype=np.float32).reshape(3, 20)
    assert eqd.plot.history(eqd.History(*series), ax=[below, last]) is figure
    np.testing.assert_array_equal(below.lines[0].get_ydata(), series[0])
    assert not right.has_data()
    with pytest.raises(ValueError, match="`ax` must be two Matplotlib axes; got 1"):
        eqd.plot.history(eqd.History(*series), ax=[right])
    with pytest.raises(TypeError, match="`ax` must be Matplotlib axes; got a Figure"):
        eqd.plot.images(d, ax=figure)


def test_shows_itself_in_a_notebook_without_pyplot():
    figure = eqd.plot.images(distilled(np.arange(2)))
    content, size = figure._repr_png_()
    picture = Image.open(io.BytesIO(content))
    assert picture.width == 2 * size["width"]
    assert picture.height == pytest.approx(2 * size["height"], abs=1)
