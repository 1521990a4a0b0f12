"""The layers that are fast on a CPU against the layers of Equinox."""

import dataclasses
import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqdistill import nn
from eqdistill._nn._convolve import convolve_xla, ConvSettings


def _make(constructor):
    """A module with random parameters, drawn by NumPy: compiling JAX's draws for each
    shape would take longer than the tests."""
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)
    shapes = eqx.filter_eval_shape(lambda: constructor(jr.key(0)))
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda x: draw(x) if is_shape(x) else x, shapes)


def _normal(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), float)


def _library(**settings):
    return _make(lambda key: eqx.nn.Conv2d(**{"kernel_size": 3, **settings}, key=key))


def _network(key):
    keys = jr.split(key, 4)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 3, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.tanh),
            eqx.nn.Conv2d(3, 2, 3, stride=2, use_bias=False, key=keys[1]),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(8, 2, key=keys[2]),
        ]
    )


# The numbers of channels, and other settings.
LOWER = {"kernel_size": 2, "stride": 2, "padding": "SAME_LOWER"}
CASES = {
    "same, stride": (
        2,
        3,
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": "SAME"},
    ),
    "uneven padding, dilation, no bias": (
        *(1, 2),
        {"padding": ((2, 0), (-1, 3)), "dilation": (2, 1), "use_bias": False},
    ),
    "one channel": (1, 2, {"padding": 1}),
    "large kernel": (2, 2, {"kernel_size": (9, 3), "padding": 4, "stride": 3}),
    "reflect": (4, 6, {"padding": 1, "groups": 2, "padding_mode": "REFLECT"}),
    "depthwise, circular": (3, 3, {"groups": 3, "padding_mode": "CIRCULAR"} | LOWER),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("channels", "out_channels", "settings"), CASES.values(), ids=CASES
)
def test_values_and_derivatives_agree_with_equinox(channels, out_channels, settings):
    arguments = {"in_channels": channels, "out_channels": out_channels, **settings}
    library = _library(**arguments)
    arguments = {"kernel_size": 3, **arguments}
    ours = _make(lambda key: nn.Conv2d(**arguments, key=key))
    images, d_images = _normal(2, 2, channels, 7, 6)
    d_library = jax.tree.map(lambda x: jnp.asarray(np.sin(3 * x)), library)
    # Two sets of weights, each with its own images.
    both = lambda tree: jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree)

    # Most of the time would be spent in LLVM's optimisations.
    @ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def everything(conv, d_conv, images, d_images):
        def loss(conv, images):
            out = jax.vmap(conv)(images)
            return jnp.sum(jnp.sin(out)), out

        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jvp(
            jax.vmap(grad),
            (both(conv), both(images)),
            (both(d_conv), both(d_images)),
        )

    expected = everything(library, d_library, images, d_images)
    actual = everything(ours, nn.Conv2d.of(d_library), images, d_images)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_average_pool_agrees_with_equinox():
    image, tangent = _normal(2, 2, 5, 4)

    def everything(pool, image, tangent):
        derivative = lambda x: jax.jvp(jax.grad(lambda x: jnp.sum(pool(x) ** 3)), *x)
        return pool(image), derivative(((image,), (tangent,)))

    actual = everything(nn.average_pool, image, tangent)
    expected = everything(eqx.nn.AvgPool2d(2, 2), image, tangent)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def _num_convolutions(function, *args, platform="cpu"):
    dynamic, static = eqx.partition((function, args), eqx.is_array)

    def call(dynamic):
        function, args = eqx.combine(dynamic, static)
        return eqx.filter(function(*args), eqx.is_array)

    lowered = jax.jit(call).trace(dynamic).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("stablehlo.convolution")


def _train(network, images):
    params, static = eqx.partition(network, eqx.is_inexact_array)
    loss = lambda p: jnp.sum(jax.vmap(eqx.combine(p, static))(images) ** 2)
    step = lambda p, _: (jax.tree.map(jnp.subtract, p, jax.grad(loss)(p)), None)
    params, _ = jax.lax.scan(step, params, length=2)
    return sum(map(jnp.sum, jax.tree.leaves(params)))


def test_derivatives_on_a_cpu_contain_no_convolution():
    library = _make(_network)
    ours = nn.fast_convolutions(library)
    images = jnp.ones((2, 1, 6, 6))
    assert _num_convolutions(_train, library, images) > 2
    # The forward pass of the second layer. The first one has images of one channel.
    assert _num_convolutions(_train, ours, images) == 1
    # Neither do the derivatives of these steps.
    through = jax.grad(_train, argnums=1)
    assert _num_convolutions(through, ours, images) == 1
    assert _num_convolutions(_train, ours, images, platform="cuda") > 2


def test_other_devices_use_the_library():
    library = _library(in_channels=2, out_channels=3, padding="SAME")
    ours = nn.Conv2d.of(library)
    image = _normal(2, 5, 5)
    grad = jax.grad(lambda conv, image: jnp.sum(conv(image) ** 2), argnums=(0, 1))
    assert _num_convolutions(grad, ours, image, platform="cuda") == 3
    settings = ConvSettings((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    layout = ("NCHW", "OIHW", "NCHW")
    assert ours.bias is not None
    got = convolve_xla(image, ours.weight, settings, layout) + ours.bias
    np.testing.assert_allclose(got, library(image), rtol=1e-5, atol=1e-6)


def test_half_precision():
    half = jnp.bfloat16
    ours = _make(lambda key: nn.Conv2d(2, 3, 3, padding=1, dtype=half, key=key))
    loss = lambda conv, image: jnp.sum(conv(image))
    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for leaf in jax.tree.leaves(value_and_grad(ours, jnp.ones((2, 4, 4), half))):
        assert leaf.dtype == jnp.bfloat16
        assert jnp.isfinite(leaf).all()


class Subclass(eqx.nn.Conv2d):
    pass


def test_fast_convolutions():
    network = _make(_network)
    conv1d = _make(lambda key: eqx.nn.Conv1d(1, 1, 3, key=key))
    subclass = _make(lambda key: Subclass(1, 1, 3, key=key))
    others = [eqx.nn.AvgPool2d(2, 1), eqx.nn.MaxPool2d(2, 2), jnp.tanh, jnp.ones(2)]
    tree = {"a": network, "b": [conv1d, subclass, None, 3, *others]}
    fast = nn.fast_convolutions(tree)
    assert type(fast["a"][0]) is type(fast["a"][2]) is nn.Conv2d
    assert nn.fast_convolutions([eqx.nn.AvgPool2d(2, 2)]) == [nn.average_pool]
    for field in dataclasses.fields(nn.Conv2d):
        assert getattr(fast["a"][2], field.name) is getattr(network[2], field.name)
    assert eqx.tree_equal(fast["a"][4], network[4])
    assert eqx.tree_equal(fast["b"], tree["b"])
    # Nothing is left to replace.
    assert eqx.tree_equal(nn.fast_convolutions(fast), fast)

    both = lambda x: (network(x), fast["a"](x))
    expected, actual = jax.jit(jax.vmap(both))(_normal(2, 1, 6, 6))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_images_smaller_than_the_kernel_are_refused():
    make = lambda key: nn.Conv2d(1, 1, 3, dilation=(1, 2), padding=(0, 1), key=key)
    conv = _make(make)
    assert conv(jnp.ones((1, 3, 3))).shape == (1, 1, 1)
    with pytest.raises(ValueError, match=r"`image` must be at least as large"):
        conv(jnp.ones((1, 3, 2)))
