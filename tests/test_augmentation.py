"""Augmentations: pure functions of the image and the key, differentiable in the
image."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.ndimage

import eqdistill as eqd


KEY = jr.key(3)
COLOUR = jr.normal(jr.key(0), (3, 3, 6, 8))
AUGMENTATIONS = [
    eqd.Affine(shift=1, rotation=15, scale=1.2),
    eqd.Crop(2),
    eqd.Flip(),
    eqd.Cutout(4),
    eqd.ColourJitter(),
]
EVERYTHING = [
    *AUGMENTATIONS,
    eqd.Compose(*AUGMENTATIONS[1:]),
    eqd.OneOf(*AUGMENTATIONS[1:]),
]
IDENTITIES = [
    eqd.Affine(),
    eqd.Crop(0),
    eqd.Flip(0),
    eqd.Cutout(0),
    eqd.ColourJitter(brightness=0, saturation=0, contrast=0),
]


# In one program, as most of the time is that of compiling.
@eqx.filter_jit
def augment_by_each(augmentations, images, key):
    return [eqd.augment(a, images, key=key) for a in augmentations]


@pytest.mark.slow
@pytest.mark.parametrize("images", [COLOUR, COLOUR[:, 0]], ids=["colour", "grey"])
def test_a_function_of_image_and_key(images):
    runs = [augment_by_each(EVERYTHING, images, jr.key(i)) for i in (0, 0, 1, 2, 3)]
    for first, again, *others in zip(*runs, strict=True):
        assert first.shape == images.shape
        assert first.dtype == images.dtype
        np.testing.assert_array_equal(again, first)
        assert any(not np.array_equal(other, first) for other in others)


def test_nothing_is_changed_at_zero():
    for changed in augment_by_each(IDENTITIES, COLOUR, KEY):
        np.testing.assert_array_equal(changed, COLOUR)


def test_siamese():
    same = jnp.broadcast_to(COLOUR[:1], COLOUR.shape)
    augmentation = eqd.OneOf(eqd.Cutout(2), eqd.Cutout(4))
    both = jax.jit(
        lambda key: [
            eqd.augment(augmentation, same, key=key, siamese=siamese)
            for siamese in (True, False)
        ]
    )
    siamese, other = map(np.asarray, both(KEY))
    np.testing.assert_array_equal(siamese, siamese[:1].repeat(3, 0))
    assert not np.array_equal(other, other[:1].repeat(3, 0))


def test_affine_is_that_of_scipy(x64):
    image = np.random.default_rng(0).normal(size=(6, 8))

    # Its numbers are found from the images of the two coordinates, which bilinear
    # interpolation reproduces.
    def found(size, key):
        y, x = np.indices((size, size)).astype(float)
        moved = [
            eqd.Affine(shift=1, rotation=20, scale=1.2)(jnp.asarray(z), key=key)
            for z in (y, x)
        ]
        inside = slice(size // 2 - 2, size // 2 + 2)
        columns = np.stack([y, x, np.ones_like(y)], -1)[inside, inside].reshape(-1, 3)
        wanted = np.stack(moved, -1)[inside, inside].reshape(-1, 2)
        return np.linalg.lstsq(columns, wanted, rcond=None)

    (solution, residual, _, _) = found(21, KEY)
    assert residual.max() < 1e-20
    matrix, middle = solution[:2].T, np.array([10, 10])
    shift = matrix @ middle + solution[2] - middle
    scale = np.linalg.norm(matrix, axis=1)
    rotation = matrix / scale[:, None]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(2), atol=1e-12)
    assert 0 < abs(rotation[1, 0]) < np.sin(np.deg2rad(20))
    assert (abs(shift) < 1).all()
    assert (abs(np.log(scale)) < np.log(1.2)).all()
    centre = (np.array(image.shape) - 1) / 2
    wanted = scipy.ndimage.affine_transform(
        np.pad(image, 3), matrix, centre + 3 + shift - matrix @ (centre + 3), order=1
    )[3:-3, 3:-3]
    got = eqd.Affine(shift=1, rotation=20, scale=1.2)(jnp.asarray(image), key=KEY)
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.slow
def test_gradient_in_a_scan(x64):
    """Against a central difference, each step with another key."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 5)))
    augmentation = eqd.Compose(AUGMENTATIONS[0], eqd.ColourJitter())

    @jax.jit
    @jax.value_and_grad
    def loss(images):
        def body(total, key):
            changed = eqd.augment(augmentation, images, key=key)
            return total + jnp.sum(jnp.sin(changed)), None

        return jax.lax.scan(body, 0.0, jr.split(KEY, 8))[0]

    direction = np.random.default_rng(1).normal(size=images.shape)
    at = lambda t: loss(images + t * direction)
    slope = (at(1e-5)[0] - at(-1e-5)[0]) / 2e-5
    wanted = jnp.vdot(at(0.0)[1], direction)
    np.testing.assert_allclose(slope, wanted, rtol=1e-8)


def test_what_each_does():
    ones = jnp.ones((200, 4, 4))
    ramp = np.arange(4, dtype=np.float32) * ones
    augmentations = [eqd.Flip(), eqd.Cutout(2), eqd.Crop(1)]
    augmentations += [eqd.OneOf(Constant(1.0), Constant(2.0))]
    changed = augment_by_each(augmentations, ramp + 1, KEY)
    flipped, cut, cropped, one_of = map(np.asarray, changed)
    is_flipped = flipped[:, 0, 0] == 4
    assert 60 < is_flipped.sum() < 140
    np.testing.assert_array_equal(flipped[is_flipped], 4 - ramp[is_flipped])
    np.testing.assert_array_equal(flipped[~is_flipped], 1 + ramp[~is_flipped])
    # In a corner, at an edge, inside.
    assert set((cut == 0).sum((1, 2))) == {1, 2, 4}
    assert set((cropped > 0).sum((1, 2))) == {9, 12, 16}
    assert set(np.unique(one_of)) == {1, 2}
    assert 60 < (one_of[:, 0, 0] == 1).sum() < 140


def test_one_of_for_a_batch():
    """Of one kind in each batch, with another place in each image."""
    one_of = eqd.OneOf(eqd.Cutout(2), Constant(2.0), per_batch=True)
    augmentation = eqd.Compose(Constant(3.0), one_of)
    augment = lambda key: eqd.augment(augmentation, jnp.ones((50, 4, 4)), key=key)
    batches = np.asarray(jax.jit(jax.vmap(augment))(jr.split(KEY, 20)))
    is_cut = [not (batch == 2).any() for batch in batches]
    assert 0 < sum(is_cut) < 20
    for batch in batches[is_cut]:
        assert (batch == 0).any((1, 2)).all()
        assert len(np.unique(batch, axis=0)) > 5


def test_colour_jitter():
    image = COLOUR[:1].repeat(200, 0)
    augmentations = [
        eqd.ColourJitter(saturation=0, contrast=0),
        eqd.ColourJitter(brightness=0, contrast=0),
        eqd.ColourJitter(brightness=0, saturation=0),
    ]
    changed = augment_by_each(augmentations, image, KEY)
    image, brightness, saturation, contrast = map(np.asarray, (image, *changed))

    def check(values, low, high):
        assert low - 1e-5 <= values.min() < low + 0.1
        assert high - 0.1 < values.max() <= high + 1e-5

    # The brightness moves all alike. The contrast keeps the mean of an image, the
    # saturation that of each pixel.
    assert np.ptp(brightness - image, axis=(1, 2, 3)).max() < 1e-5
    check(brightness - image, -0.5, 0.5)
    np.testing.assert_allclose(saturation.mean(1), image.mean(1), atol=1e-5)
    check(saturation.std(1) / image.std(1), 0.0, 2.0)
    axes = (1, 2, 3)
    np.testing.assert_allclose(contrast.mean(axes), image.mean(axes), atol=1e-5)
    check(contrast.std(axes) / image.std(axes), 0.5, 1.5)


class Constant(eqd.AbstractAugmentation):
    value: float

    def __call__(self, image, *, key):
        return jnp.full_like(image, self.value)


class Own(eqd.AbstractAugmentation):
    change: str

    def __call__(self, image, *, key):
        return {
            "shape": image[..., 1:],
            "dtype": image.astype(jnp.bfloat16),
            "tuple": (image, image),
        }[self.change]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("shape", r"keep the shape .*\(3, 6, 8\); that of a Own is \(3, 6, 7\)"),
        ("dtype", r"keep the dtype .*float32; that of a Own is bfloat16"),
        ("tuple", r"keep the shape .*that of a Own is \(\(3, 6, 8\), \(3, 6, 8\)\)"),
    ],
)
def test_a_change_of_shape_is_refused(change, match):
    with pytest.raises(ValueError, match="`augmentation` must " + match):
        eqd.augment(Own(change), COLOUR, key=KEY)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: eqd.Affine(shift=-1), "`shift` must be at least 0; got -1"),
        (
            lambda: eqd.Affine(rotation=-1),
            "`rotation` must be at least 0; got -1",
        ),
        (
            lambda: eqd.Affine(scale=0.9),
            "`scale` must be at least 1; got 0.9",
        ),
        (lambda: eqd.Affine(scale=np.inf), "`scale` must be finite"),
        (lambda: eqd.Crop(-1), "`padding` must be at least 0; got -1"),
        (lambda: eqd.Flip(1.5), "`probability` must be from 0 to 1; got 1.5"),
        (lambda: eqd.Cutout(-1), "`size` must be at least 0; got -1"),
        (
            lambda: eqd.ColourJitter(contrast=-1),
            "`contrast` must be at least 0; got -1",
        ),
        (eqd.OneOf, "`augmentations` must be at least one; got none"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()
