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
    """Writes each picture into the folder with the corresponding name."""
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        (root / name).mkdir(exist_ok=True)
        is_image = isinstance(picture, PIL.Image.Image)
        image = picture if is_image else PIL.Image.fromarray(picture)
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


def test_other_files_are_ignored(tmp_path):
    write(tmp_path, COLOUR)
    (tmp_path / "README.txt").write_text("Not an image.")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "a" / "again.png").symlink_to(tmp_path / "b" / "002.png")
    got = eqd.datasets.from_folder(tmp_path)
    assert len(got) == 7
    np.testing.assert_array_equal(got.images[2], got.images[3])


def test_palette_and_transparency(tmp_path):
    alpha = np.where(np.arange(4) < 2, 255, 0).astype(np.uint8) * np.ones((5, 1), "u1")
    palette = PIL.Image.fromarray(np.arange(20, dtype=np.uint8).reshape(5, 4), "P")
    palette.putpalette(COLOUR[:2].ravel().tolist()[:60])
    shown = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[:20]
    with_alpha = np.concatenate([COLOUR[0], alpha[..., None]], axis=2)
    write(tmp_path, [palette, with_alpha], "ab")
    # The first colour of the palette is transparent.
    palette.save(tmp_path / "b" / "last.png", transparency=bytes([0] + 19 * [255]))
    got = np.moveaxis(np.asarray(eqd.datasets.from_folder(tmp_path).images), 1, 3)
    np.testing.assert_array_equal(got[0], shown.reshape(5, 4, 3))
    np.testing.assert_array_equal(got[1], np.where(alpha[..., None] > 0, COLOUR[0], 0))
    shown[0] = 0
    np.testing.assert_array_equal(got[2], shown.reshape(5, 4, 3))


def test_grey_with_transparency_or_one_bit(tmp_path):
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


def link_file(root):
    target = root.parent / "outside.png"
    PIL.Image.fromarray(GREY[0]).save(target)
    (root / "a" / "x.png").symlink_to(target)


def link_folder(root):
    (root.parent / "outside").mkdir()
    (root / "d").symlink_to(root.parent / "outside")


def truncate(root):
    data = (root / "a" / "000.png").read_bytes()
    (root / "a" / "x.png").write_bytes(data[:60])


def save(root, picture):
    PIL.Image.fromarray(picture).save(root / "a" / "x.png")


NOT_A_FILE = r"x.png is not one \(not a file"
REFUSED = {
    "empty": (lambda root: (root / "d").mkdir(), "images for each class; .*d has none"),
    "text": (lambda root: (root / "a" / "x.png").write_text("Hello"), "x.png is not"),
    "pipe": (lambda root: os.mkfifo(root / "a" / "x.png"), NOT_A_FILE),
    "truncated": (truncate, "x.png is not one "),
    "16 bits": (lambda root: save(root, GREY[0].astype(np.uint16)), "mode 'I"),
    "link": (link_file, "point outside it; .*x.png links to .*outside.png"),
    "linked folder": (link_folder, "point outside it; .*d links to .*outside"),
    "mixed": (
        lambda root: save(root, COLOUR[0]),
        "grey, and .*x.png is .* and in colour",
    ),
    "sizes": (
        lambda root: save(root, GREY[0].T),
        r"the same size, .*000.png is 5 x 4 and .*x.png is 4 x 5 and .* Pass `size=",
    ),
    "bomb": (lambda root: save(root, np.zeros((9, 9), "u1")), "81 pixels; .* is 80"),
    "big bomb": (lambda root: save(root, np.zeros((99, 9), "u1")), "limit of 160"),
}


@pytest.mark.parametrize(("spoil", "found"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files(tmp_path, monkeypatch, spoil, found):
    root = tmp_path / "root"
    root.mkdir()
    write(root, GREY)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 80)
    spoil(root)
    with pytest.raises(ValueError, match=found) as info:
        eqd.datasets.from_folder(root)
    assert str(root) in str(info.value)


def test_numbers_are_sorted_by_value(tmp_path):
    pictures = RNG.integers(256, size=(12, 5, 4), dtype=np.uint8)
    names = tuple(str(i) for i in range(12))
    write(tmp_path, pictures, names)
    got = eqd.datasets.from_folder(tmp_path)
    assert got.class_names == names
    np.testing.assert_array_equal(got.labels, np.arange(12))
    np.testing.assert_array_equal(got.images, pictures)
    (tmp_path / "10").rename(tmp_path / "ten")
    got = eqd.datasets.from_folder(tmp_path)
    assert got.class_names == ("0", "1", "11", *"23456789", "ten")


def test_given_class_names(tmp_path):
    write(tmp_path, GREY, "aabbdd")
    (tmp_path / "c").mkdir()
    names = ["d", "missing", "c", "b", "a"]
    got = eqd.datasets.from_folder(tmp_path, class_names=names)
    assert got.class_names == tuple(names)
    np.testing.assert_array_equal(got.labels, [0, 0, 3, 3, 4, 4])
    np.testing.assert_array_equal(got.images, GREY[[4, 5, 2, 3, 0, 1]])
    np.testing.assert_array_equal(got.class_counts, [2, 0, 0, 2, 2])
    with pytest.raises(ValueError, match=r"each folder in .*; 'c' is missing"):
        eqd.datasets.from_folder(tmp_path, class_names=["a", "b", "d"])
    with pytest.raises(ValueError, match="has none"):
        eqd.datasets.from_folder(tmp_path / "c", class_names=["a"])


def test_no_class_folders_and_no_pillow(tmp_path, monkeypatch):
    write(tmp_path, GREY)
    with pytest.raises(ValueError, match=r"one folder .* for each class; .*a has no"):
        eqd.datasets.from_folder(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow.*eqdistill\[data\]"):
        eqd.datasets.from_folder(tmp_path)
