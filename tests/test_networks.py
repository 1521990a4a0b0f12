"""The networks of `nn`, and how their weights are drawn."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

from eqdistill import nn
from eqdistill.linear import last_layer


COLOUR, GREY = (3, 32, 32), (28, 28)
KEY = jr.key(0)
CALL = eqx.filter_jit(lambda network, image: network(image))


@pytest.mark.parametrize(
    ("make", "shape", "settings", "wanted"),
    [
        # As published: LeCun et al. 1998, and printed by the code of Zhao et al. 2021.
        (nn.LeNet, GREY, {}, 61_706),
        (nn.ConvNet, COLOUR, {}, 320_010),
        (nn.AlexNet, COLOUR, {"norm": None}, 1_872_202),
        (nn.VGG11, COLOUR, {}, 9_231_114),
        (nn.ResNet18, COLOUR, {}, 11_173_962),
        # By hand.
        (nn.MLP, GREY, {}, 784 * 128 + 128 + 128 * 128 + 128 + 1290),
        (nn.MLP, GREY, {"widths": ()}, 7850),
        (nn.ConvNet, GREY, {}, 317_706 - 1280 * (16 - 9)),
        (nn.ConvNet, GREY, {"size": 32}, 317_706),
        (nn.VGG11, GREY, {}, 9_229_962),
        (nn.ResNet18, GREY, {"norm": nn.group_norm}, 11_172_810),
    ],
)
def test_number_of_parameters(make, shape, settings, wanted):
    build = lambda key: make(shape, 10, key=key, **settings)
    network = eqx.filter_eval_shape(build, KEY)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert eqx.filter_eval_shape(network, image).shape == (10,)
    sizes = [x.size for x in jax.tree.leaves(network) if hasattr(x, "size")]
    assert sum(sizes) == wanted
    # The network can be rebuilt from what it stores.
    rebuild = lambda key: getattr(nn, network.architecture)(
        **dict(network.settings), key=key
    )
    assert eqx.tree_equal(eqx.filter_eval_shape(rebuild, KEY), network)


@pytest.fixture(scope="module")
def network():
    make = lambda key: nn.ConvNet((8, 8), 10, widths=(4, 6), size=10, key=key)
    return eqx.filter_jit(make)(KEY)


def test_layers_are_as_by_hand(network):
    image = jr.normal(jr.key(1), (8, 8))
    x = np.pad(np.asarray(image), 1)[None]
    for i in (1, 5):
        convolution = network.layers[i]
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
    linear = last_layer(network)
    assert linear.head is head
    np.testing.assert_allclose(CALL(linear, image), wanted, rtol=1e-4, atol=1e-5)


def test_order_of_normalisation_and_pooling():
    make = lambda key: nn.ConvNet((8, 8), 10, widths=(4,), norm_last=True, key=key)
    layers = list(make(KEY).layers)
    assert layers[3] == nn.average_pool
    assert isinstance(layers[4], eqx.nn.GroupNorm)


def test_weights_and_biases_are_uniform_as_in_pytorch():
    make = lambda key: nn.LeNet((28, 28), 10, key=key)
    first, second = make(KEY), make(jr.key(1))
    drawn = [[], []]
    for layer, other in zip(first.layers, second.layers, strict=True):
        if isinstance(layer, nn.Conv2d | eqx.nn.Linear):
            bound = layer.weight[0].size ** -0.5
            for i, x in enumerate((layer, other)):
                drawn[i] += [jnp.ravel(y) / bound for y in (x.weight, x.bias)]
    first, second = map(jnp.concatenate, drawn)
    assert scipy.stats.kstest(first, "uniform", (-1, 2)).pvalue > 1e-3
    assert abs(jnp.corrcoef(first, second)[0, 1]) < 0.02
    assert abs(jnp.corrcoef(first[1:], first[:-1])[0, 1]) < 0.02


def test_initialise_and_zero_head(network):
    initialise = eqx.filter_jit(nn.initialise)
    drawn = initialise(network, nn.he, key=jr.key(1))
    weight = drawn.layers[5].weight
    np.testing.assert_allclose(jnp.std(weight), np.sqrt(2 / (4 * 9)), rtol=0.2)
    assert not drawn.layers[5].bias.any()
    assert drawn.layers[-1].weight.any()
    # Normalisation layers are unchanged.
    assert eqx.tree_equal(drawn.layers[2], network.layers[2])
    assert eqx.tree_equal(drawn, initialise(network, nn.he, key=jr.key(1)))
    zero = nn.zero_head(drawn)
    assert not CALL(zero, jnp.ones((8, 8))).any()
    assert eqx.tree_equal(zero.layers[1], drawn.layers[1])


class Custom(eqx.Module):
    """A network of a user's own, with its layers in no particular order."""

    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear
    convolutions: dict
    extra: eqx.Module | jax.Array | None

    def __init__(self, extra=None):
        keys = jr.split(KEY, 5)
        self.norm = eqx.nn.LayerNorm(6)
        self.attention = eqx.nn.MultiheadAttention(2, 6, use_output_bias=True, key=KEY)
        self.head = eqx.nn.Linear(6, 3, key=keys[0])
        self.convolutions = {
            "a": eqx.nn.Conv2d(1, 2, 3, key=keys[1]),
            "b": [eqx.nn.Conv1d(2, 4, 3, use_bias=False, key=keys[2])],
            "c": eqx.nn.ConvTranspose1d(4, 6, 2, key=keys[3]),
            "d": nn.Conv2d(1, 1, 3, key=keys[4]),
        }
        self.extra = extra

    def __call__(self, image):
        return self.head(image)


@pytest.mark.slow
def test_any_module_is_initialised():
    network = Custom(extra=nn.Frozen(eqx.nn.GRUCell(2, 2, key=KEY)))
    drawn = nn.initialise(network, nn.lecun, key=KEY)
    kept = (".norm", ".extra")
    for path, old in jax.tree.leaves_with_path(eqx.filter(network, eqx.is_array)):
        name = jax.tree_util.keystr(path)
        new = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(drawn)}
        assert jnp.array_equal(new[name], old) == name.startswith(kept)
        assert "bias" not in name or name.startswith(kept) or not new[name].any()
    zero = nn.zero_head(network, lambda n: n.head)
    assert not zero.head.weight.any()
    zero = eqx.tree_at(lambda n: n.head, zero, network.head)
    assert eqx.tree_equal(zero, network)


class Scaled(eqx.nn.Linear):
    scale: jax.Array

    def __init__(self):
        super().__init__(2, 2, key=KEY)
        self.scale = jnp.ones(2)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (Scaled(), "got `extra.scale`"),
        (eqx.nn.GRUCell(2, 2, key=KEY), "got `extra.weight_ih`"),
        (eqx.nn.Embedding(2, 2, key=KEY), "got `extra.weight`"),
        (jnp.ones(2), "got `extra`"),
        (eqx.filter_vmap(lambda key: eqx.nn.Linear(2, 2, key=key))(jr.split(KEY)),
         r"got `extra.weight` of shape \(2, 2, 2\)"),
    ],
)  # fmt: skip
def test_layers_that_would_keep_their_weights_are_refused(extra, match):
    with pytest.raises(TypeError, match=match):
        nn.initialise(Custom(extra), nn.he, key=KEY)


def test_images_must_have_the_shape_of_the_network(network):
    with pytest.raises(ValueError, match=r"`image` must have shape \(8, 8\).*\(9, 8\)"):
        network(jnp.ones((9, 8)))
    with pytest.raises(ValueError, match="`shape` must be at most 32 x 32"):
        nn.LeNet((64, 64), 10, key=KEY)
