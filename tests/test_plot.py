import numpy as np
import pytest

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


def test_colour_is_refused():
    with pytest.raises(ValueError, match=r"`distilled`.*got \(3, 5, 4\)"):
        eqd.plot.images(distilled(np.arange(2), shape=(3, 5, 4)))


def test_history(tmp_path):
    series = np.geomspace(1, 1e-4, 60, dtype=np.float32).reshape(3, 20)
    figure = eqd.plot.history(eqd.History(*series))
    left, right = figure.axes
    lines = (*left.lines, *right.lines)
    for line, values in zip(lines, series, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert right.get_yscale() == "log"
    figure.savefig(tmp_path / "history.png")
