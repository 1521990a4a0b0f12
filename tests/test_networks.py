"""The networks of the field's tables."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqdistill as eqd
from eqdistill import nn


COLOUR, GREY = (3, 32, 32), (28, 28)
CALL = eqx.filter_jit(lambda network, image: network(image))


def count(make, shape, **settings):
    network = eqx.filter_eval_shape(
        lambda key: make(shape, 10, key=key, **settings), jr.key(0)
    )
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert eqx.filter_eval_shape(network, image).shape == (10,)
    return sum(x.size for x in jax.tree.leaves(network) if hasattr(x, "size"))


@pytest.mark.parametrize(
    ("make", "shape", "settings", "wanted"),
    [
        # As published: LeCun et al. 1998, and what the code of Zhao et al. 2021 prints.
        (nn.LeNet, GREY, {}, 61_706),
        (nn.ConvNet, COLOUR, {}, 320_010),
        (nn.AlexNet, COLOUR, {"norm": None}, 1_872_202),
        (nn.VGG11, COLOUR, {}, 9_231_114),
        (nn.ResNet18, COLOUR, {}, 11_173_962),
        # By hand.
        (nn.MLP, GREY, {}, 784 * 128 + 128 + 128 * 128 + 128 + 1290),
        (nn.ConvNet, GREY, {}, 317_706 - 1280 * (16 - 9)),
        (nn.ConvNet, GREY, {"size": 32}, 317_706),
        (
            nn.ConvNet,
            COLOUR,
            {"widths": (128, 256, 512), "norm": None},
            28 * 128 + (9 * 128 + 1) * 256 + (9 * 256 + 1) * 512 + 8193 * 10,
        ),
        (nn.VGG11, GREY, {}, 9_229_962),
        (nn.ResNet18, GREY, {"norm": nn.group_norm}, 11_172_810),
    ],
)
def test_number_of_parameters(make, shape, settings, wanted):
    assert count(make, shape, **settings) == wanted


@pytest.fixture(scope="module")
def network():
    make = lambda key: nn.ConvNet((8, 8), 10, widths=(4, 6), size=10, key=key)
    return eqx.filter_jit(make)(jr.key(0))


def test_layers_are_as_by_hand(network):
    image = jr.normal(jr.key(1), (8, 8))
    first, second = (network.layers[i] for i in (1, 5))
    x = np.pad(np.asarray(image), 1)[None]
    for convolution in (first, second):
        weight, bias = np.asarray(convolution.weight), np.asarray(convolution.bias)
        x = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        x = np.einsum("oikl,ihwkl->ohw", weight, windows) + bias
        deviation = np.sqrt(x.var(axis=(1, 2), keepdims=True) + 1e-5)
        x = np.maximum((x - x.mean(axis=(1, 2), keepdims=True)) / deviation, 0)
        h, w = x.shape[1] // 2, x.shape[2] // 2
        x = x[:, : 2 * h, : 2 * w].reshape(-1, h, 2, w, 2).mean(axis=(2, 4))
    head = network.layers[-1]
    wanted = np.asarray(head.weight) @ x.reshape(-1) + np.asarray(head.bias)
    np.testing.assert_allclose(CALL(network, image), wanted, rtol=1e-4, atol=1e-5)


def test_place_of_the_normalisation():
    make = lambda key: nn.ConvNet((8, 8), 10, widths=(4,), norm_last=True, key=key)
    layers = list(make(jr.key(0)).layers)
    assert layers[3] is nn.average_pool
    assert isinstance(layers[4], eqx.nn.GroupNorm)


def test_last_layer_is_the_head(network):
    linear = eqd.last_layer(network)
    assert linear.head is network.layers[-1]
    image = jr.normal(jr.key(1), (8, 8))
    got, wanted = CALL(linear, image), CALL(network, image)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_initialisation(network):
    initialise = eqx.filter_jit(nn.initialise)
    drawn = initialise(network, nn.he, key=jr.key(1))
    weight = drawn.layers[5].weight
    np.testing.assert_allclose(jnp.std(weight), np.sqrt(2 / (4 * 9)), rtol=0.2)
    assert not drawn.layers[5].bias.any()
    assert drawn.layers[-1].weight.any()
    # Scales of the normalisation stay.
    np.testing.assert_array_equal(drawn.layers[2].weight, 1)
    again = initialise(network, nn.he, key=jr.key(1))
    assert eqx.tree_equal(drawn, again)
    zero = nn.zero_head(drawn)
    assert not CALL(zero, jnp.ones((8, 8))).any()
    assert eqx.tree_equal(zero.layers[1], drawn.layers[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ConvNet((8, 8), 0, key=jr.key(0)),
        lambda: nn.ConvNet((0, 8), 10, key=jr.key(0)),
        lambda: nn.ConvNet((8, 8), 10, widths=(-4,), key=jr.key(0)),
        lambda: nn.MLP((8, 8), 10, widths=(0,), key=jr.key(0)),
        lambda: nn.ResNet18((8, 8), -1, key=jr.key(0)),
    ],
)
def test_sizes_must_be_positive(make):
    with pytest.raises(ValueError, match="`num_classes` and `widths` must be at least"):
        make()


def test_bad_input(network):
    with pytest.raises(ValueError, match=r"`image` must have shape \(8, 8\).*\(9, 8\)"):
        network(jnp.ones((9, 8)))
    with pytest.raises(ValueError, match=r"`shape` must be \(height, width\).*\(64,\)"):
        nn.ConvNet((64,), 10, key=jr.key(0))
    with pytest.raises(ValueError, match="`shape` must be of images of at most 32"):
        nn.LeNet((64, 64), 10, key=jr.key(0))
    with pytest.raises(ValueError, match=r"`widths` must have no more entries.*got 4"):
        nn.ConvNet((8, 8), 10, widths=(1, 1, 1, 1), key=jr.key(0))
