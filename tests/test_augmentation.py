from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.ndimage

import eqdistill as eqd
from eqdistill.augment import Affine, ColourJitter, Compose, Crop, Cutout, Flip, OneOf


KEY = jr.key(3)
COLOUR = jr.normal(jr.key(0), (3, 3, 6, 8))
AFFINE = Affine(shift=1, rotation=15, scale=1.2)
AUGMENTATIONS = [AFFINE, Crop(2), Flip(), Cutout(4), ColourJitter()]
ALL = [*AUGMENTATIONS, Compose(*AUGMENTATIONS[1:]), OneOf(*AUGMENTATIONS[1:])]
NO_JITTER = ColourJitter(brightness=0, saturation=0, contrast=0)
IDENTITIES = [Affine(), Crop(0), Flip(0), Cutout(0), NO_JITTER]


# One program, because compilation takes most of the time.
@eqx.filter_jit
def augment_by_each(augmentations, images, key):
    return [eqd.augment.augment(a, images, key=key) for a in augmentations]


@pytest.mark.slow
@pytest.mark.parametrize("images", [COLOUR, COLOUR[:, 0]], ids=["colour", "grey"])
def test_result_depends_on_image_and_key(images):
    runs = [augment_by_each(ALL, images, jr.key(i)) for i in (0, 0, 1, 2, 3)]
    for first, again, *others in zip(*runs, strict=True):
        assert first.shape == images.shape
        assert first.dtype == images.dtype
        np.testing.assert_array_equal(again, first)
        assert any(not np.array_equal(other, first) for other in others)


def test_zero_strength_is_the_identity():
    for changed in augment_by_each(IDENTITIES, COLOUR, KEY):
        np.testing.assert_array_equal(changed, COLOUR)


def test_affine_against_scipy(x64):
    affine = Affine(shift=1, rotation=20, scale=1.2)
    # The coordinates of pixels, as images, reveal the map: interpolation is exact.
    y, x = np.indices((21, 21)).astype(float)
    moved = [affine(jnp.asarray(z), key=KEY) for z in (y, x)]
    inside = slice(8, 12)
    columns = np.stack([y, x, np.ones_like(y)], -1)[inside, inside].reshape(-1, 3)
    wanted = np.stack(moved, -1)[inside, inside].reshape(-1, 2)
    solution, residual, _, _ = np.linalg.lstsq(columns, wanted, rcond=None)
    assert residual.max() < 1e-20
    matrix, middle = solution[:2].T, np.array([10, 10])
    shift = matrix @ middle + solution[2] - middle
    scale = np.linalg.norm(matrix, axis=1)
    rotation = matrix / scale[:, None]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(2), atol=1e-12)
    assert 0 < abs(rotation[1, 0]) < np.sin(np.deg2rad(20))
    assert (abs(shift) < 1).all()
    assert (abs(np.log(scale)) < np.log(1.2)).all()
    image = np.random.default_rng(0).normal(size=(6, 8))
    centre = (np.array(image.shape) - 1) / 2 + 3
    wanted = scipy.ndimage.affine_transform(
        np.pad(image, 3), matrix, centre + shift - matrix @ centre, order=1
    )[3:-3, 3:-3]
    np.testing.assert_allclose(affine(jnp.asarray(image), key=KEY), wanted, atol=1e-12)


def test_flip_cutout_crop_and_one_of():
    ramp = np.tile(np.arange(4, dtype=np.float32), (200, 4, 1))
    augmentations = [Flip(), Cutout(2), Crop(1), OneOf(Constant(1.0), Constant(2.0))]
    changed = augment_by_each(augmentations, ramp + 1, KEY)
    flipped, cut, cropped, one_of = map(np.asarray, changed)
    is_flipped = flipped[:, 0, 0] == 4
    assert 60 < is_flipped.sum() < 140
    np.testing.assert_array_equal(flipped[is_flipped], 4 - ramp[is_flipped])
    np.testing.assert_array_equal(flipped[~is_flipped], 1 + ramp[~is_flipped])
    # In a corner, at an edge, or inside.
    assert set((cut == 0).sum((1, 2))) == {1, 2, 4}
    assert set((cropped > 0).sum((1, 2))) == {9, 12, 16}
    assert set(np.unique(one_of)) == {1, 2}
    assert 60 < (one_of[:, 0, 0] == 1).sum() < 140


def test_one_of_per_batch():
    """One augmentation for each batch, at a different position in each image."""
    one_of = OneOf(Cutout(2), Constant(2.0), per_batch=True)
    augmentation = Compose(Constant(3.0), one_of)
    ones = jnp.ones((50, 4, 4))
    augment = lambda key: eqd.augment.augment(augmentation, ones, key=key)
    batches = np.asarray(jax.jit(jax.vmap(augment))(jr.split(KEY, 20)))
    is_cut = [not (batch == 2).any() for batch in batches]
    assert 0 < sum(is_cut) < 20
    for batch in batches[is_cut]:
        assert (batch == 0).any((1, 2)).all()
        assert len(np.unique(batch, axis=0)) > 5


def test_colour_jitter():
    image = COLOUR[:1].repeat(200, 0)
    augmentations = [
        ColourJitter(saturation=0, contrast=0),
        ColourJitter(brightness=0, contrast=0),
        ColourJitter(brightness=0, saturation=0),
    ]
    changed = augment_by_each(augmentations, image, KEY)
    image, brightness, saturation, contrast = map(np.asarray, (image, *changed))

    def check_range(values, low, high):
        assert low - 1e-5 <= values.min() < low + 0.1
        assert high - 0.1 < values.max() <= high + 1e-5

    axes = (1, 2, 3)
    assert np.ptp(brightness - image, axis=axes).max() < 1e-5
    check_range(brightness - image, -0.5, 0.5)
    # Saturation keeps the mean of each pixel, and contrast the mean of the image.
    np.testing.assert_allclose(saturation.mean(1), image.mean(1), atol=1e-5)
    check_range(saturation.std(1) / image.std(1), 0.0, 2.0)
    np.testing.assert_allclose(contrast.mean(axes), image.mean(axes), atol=1e-5)
    check_range(contrast.std(axes) / image.std(axes), 0.5, 1.5)


class Constant(eqd.augment.AbstractAugmentation):
    value: float

    def __call__(self, image, *, key):
        return jnp.full_like(image, self.value)


def test_shape_and_dtype_are_checked():
    class Wrong(eqd.augment.AbstractAugmentation):
        change: Callable

        def __call__(self, image, *, key):
            return self.change(image)

    for change, match in (
        (lambda x: x[..., 1:], r"shape .*3, 6, 8\) wanted, .*3, 6, 7\) got"),
        (lambda x: x.astype(jnp.bfloat16), "dtype .*float32 .* wanted, .*bfloat16 .*"),
        (lambda x: (x, x), r"shape .*`Wrong` did not: .* wanted, nothing got"),
    ):
        with pytest.raises(ValueError, match="`augmentation` must keep.*" + match):
            eqd.augment.augment(Wrong(change), COLOUR, key=KEY)
