import os
import sys

import numpy as np
import PIL.Image
import pytest

import eqdistill as eqd


RNG = np.random.default_rng(0)
GREY = RNG.integers(256, size=(6, 5, 4), dtype=np.uint8)
COLOUR = RNG.integers(256, size=(6, 5, 4, 3), dtype=np.uint8)


def write(root, pictures, names="aabbcc", suffix=".png", **options):
    """One picture after the other into the folders of these names."""
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        (root / name).mkdir(exist_ok=True)
        image = picture
        if not isinstance(picture, PIL.Image.Image):
            image = PIL.Image.fromarray(picture)
        image.save(root / name / f"{i:03}{suffix}", **options)
    return root


@pytest.mark.parametrize(
    ("suffix", "options"), [(".png", {}), (".bmp", {}), (".webp", {"lossless": True})]
)
def test_colour(tmp_path, suffix, options):
    got = eqd.datasets.from_folder(write(tmp_path, COLOUR, suffix=suffix, **options))
    np.testing.assert_array_equal(got.images, np.moveaxis(COLOUR, 3, 1))
    np.testing.assert_array_equal(got.labels, [0, 0, 1, 1, 2, 2])
    assert got.class_names == ("a", "b", "c")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif"])
def test_grey(tmp_path, suffix):
    got = eqd.datasets.from_folder(write(tmp_path, GREY, suffix=suffix))
    wanted = np.stack(3 * [GREY], axis=1) if suffix == ".gif" else GREY
    np.testing.assert_array_equal(got.images, wanted)


def test_jpeg(tmp_path):
    smooth = np.broadcast_to(np.arange(0, 240, 10, dtype=np.uint8)[:, None], (6, 24, 9))
    got = eqd.datasets.from_folder(write(tmp_path, smooth, suffix=".JPG", quality=95))
    np.testing.assert_allclose(np.int32(got.images), smooth, atol=3)


def test_what_lies_beside_is_not_read(tmp_path):
    write(tmp_path, COLOUR)
    (tmp_path / "README.txt").write_text("Not an image.")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "a" / "again.png").symlink_to(tmp_path / "b" / "002.png")
    got = eqd.datasets.from_folder(tmp_path)
    assert len(got) == 7
    np.testing.assert_array_equal(got.images[2], got.images[3])


def test_other_kinds_of_pixels(tmp_path):
    alpha = np.where(np.arange(4) < 2, 255, 0).astype(np.uint8) * np.ones((5, 1), "u1")
    palette = PIL.Image.fromarray(np.arange(20, dtype=np.uint8).reshape(5, 4), "P")
    palette.putpalette(COLOUR[:2].ravel().tolist()[:60])
    shown = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[:20]
    with_alpha = np.concatenate([COLOUR[0], alpha[..., None]], axis=2)
    write(tmp_path, [palette, with_alpha], "ab")
    # Some of a palette's colours may be transparent, too.
    palette.save(tmp_path / "b" / "last.png", transparency=bytes([0] + 19 * [255]))
    got = np.moveaxis(np.asarray(eqd.datasets.from_folder(tmp_path).images), 1, 3)
    np.testing.assert_array_equal(got[0], shown.reshape(5, 4, 3))
    np.testing.assert_array_equal(got[1], np.where(alpha[..., None] > 0, COLOUR[0], 0))
    shown[0] = 0
    np.testing.assert_array_equal(got[2], shown.reshape(5, 4, 3))


def test_grey_with_transparency_and_of_one_bit(tmp_path):
    half = np.stack([GREY[0], np.full_like(GREY[0], 128)], axis=2)
    write(tmp_path, [half, GREY[1] > 127], "ab")
    got = eqd.datasets.from_folder(tmp_path)
    np.testing.assert_allclose(got.images[0], GREY[0] * (128 / 255), atol=1)
    np.testing.assert_array_equal(got.images[1], 255 * (GREY[1] > 127))


def test_size(tmp_path):
    write(tmp_path, [GREY[0], np.full((20, 30), 100, np.uint8)], "ab")
    got = eqd.datasets.from_folder(tmp_path, size=(10, 8))
    assert got.shape == (10, 8)
    np.testing.assert_array_equal(got.images[1], 100)
    with pytest.raises(ValueError, match=r"`size` must be a positive.*0"):
        eqd.datasets.from_folder(tmp_path, size=(0, 8))


def test_many_files_keep_their_order(tmp_path):
    levels = np.arange(200, dtype=np.uint8)
    write(tmp_path, levels[:, None, None] * np.ones((1, 2, 2), np.uint8), 200 * "a")
    got = eqd.datasets.from_folder(tmp_path)
    np.testing.assert_array_equal(got.images[:, 0, 0], levels)


def outside(root):
    target = root.parent / "outside.png"
    PIL.Image.fromarray(GREY[0]).save(target)
    (root / "a" / "x.png").symlink_to(target)


def linked_folder(root):
    (root.parent / "outside").mkdir()
    (root / "d").symlink_to(root.parent / "outside")


def loop(root):
    (root / "a" / "x.png").symlink_to(root / "a" / "x.png")


def truncated(root):
    data = (root / "a" / "000.png").read_bytes()
    (root / "a" / "x.png").write_bytes(data[:60])


def sixteen_bits(root):
    image = PIL.Image.fromarray(1000 * GREY[0].astype(np.uint16))
    image.save(root / "a" / "x.png")


def save(root, picture):
    PIL.Image.fromarray(picture).save(root / "a" / "x.png")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda root: (root / "d").mkdir(), "images of each class; .*d has none"),
        (
            lambda root: (root / "a" / "x.png").write_text("Hello"),
            "x.png is not .*cann",
        ),
        (lambda root: (root / "a" / "x.png").touch(), "x.png is not .*cannot identify"),
        (lambda root: (root / "a" / "x.png").mkdir(), r"x.png is not \(not a file"),
        (lambda root: os.mkfifo(root / "a" / "x.png"), r"x.png is not \(not a file"),
        (truncated, "x.png is not "),
        (sixteen_bits, "x.png is not .*'I;16', where 8 bits"),
        (outside, "no links that lead out of it; .*x.png leads to .*outside.png"),
        (linked_folder, "no links that lead out of it; .*d leads to .*outside"),
        (loop, r"x.png is not \(not a file"),
        (lambda root: save(root, COLOUR[0]), "000.png is grey, and .*x.png in colour"),
        (
            lambda root: save(root, GREY[0].T),
            r"of one size, or resized by `size=\(height.*000.png is 5 x 4, and .*x.png "
            "is 4 x 5",
        ),
        (
            lambda root: save(root, np.zeros((9, 9), np.uint8)),
            "81 pixels, where 80 are",
        ),
        (lambda root: save(root, np.zeros((99, 9), np.uint8)), "exceeds limit of 160"),
    ],
    ids=[
        "empty",
        "text",
        "no bytes",
        "folder",
        "pipe",
        "truncated",
        "16 bits",
        "link",
        "linked folder",
        "loop",
        "mixed",
        "sizes",
        "bomb",
        "big bomb",
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refuses(tmp_path, monkeypatch, spoil, found):
    root = tmp_path / "root"
    root.mkdir()
    write(root, GREY)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 80)
    spoil(root)
    with pytest.raises(ValueError, match=found) as info:
        eqd.datasets.from_folder(root)
    assert str(root) in str(info.value)


def test_refuses_what_is_no_folder_of_classes(tmp_path):
    write(tmp_path, GREY)
    with pytest.raises(ValueError, match=r"one folder .* for each class; .*a has no"):
        eqd.datasets.from_folder(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"`path` must name a folder.*nowhere"):
        eqd.datasets.from_folder(tmp_path / "nowhere")


def test_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow.*eqdistill\[data\]"):
        eqd.datasets.from_folder(tmp_path)
