"""Real data as an outer step sees them: means, batches, cached features, layouts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import eqdistill as eqd

from .conftest import hypergradient, OneStep, subset


KEY = jr.key(5)


def scalar(model, x, y):
    return jnp.tanh(model @ jnp.ravel(x))[y]


def tree(model, x, y):
    one_hot = jax.nn.one_hot(y, 3)
    return {
        "sums": jnp.outer(one_hot, jnp.sin(model @ jnp.ravel(x))),
        "counts": one_hot,
    }


@pytest.mark.parametrize("fn", [scalar, tree])
@pytest.mark.parametrize("chunk_bytes", [1, 1500, 2**27])
def test_mean_and_its_derivatives_are_those_of_the_plain_mean(fn, chunk_bytes):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (23, 2, 3), np.uint8)
    labels = rng.integers(0, 3, 23)
    data = eqd.FullBatch(eqd.Dataset(images, labels, 3), chunk_bytes=chunk_bytes)

    def plain(model):
        values = jax.vmap(lambda x, y: fn(model, x / 255.0, y))(images, labels)
        return jax.tree.map(lambda x: x.mean(0), values)

    @jax.jit
    def derivatives(model, tangent, seed):
        out = []
        for mean in (plain, lambda model: data.mean(fn, model, jnp.array(0), key=KEY)):
            value, pullback = jax.vjp(mean, model)
            cotangent = jax.tree.map(lambda x: jr.normal(seed, x.shape), value)
            _, moved = jax.jvp(mean, (model,), (tangent,))
            out.append((value, pullback(cotangent), moved))
        return out

    model, tangent = rng.normal(size=(2, 3, 6)).astype(np.float32)
    wanted, found = derivatives(model, tangent, KEY)
    for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fn", [scalar, tree])
def test_memory_is_bounded_by_the_size_of_a_chunk(fn):
    # The hidden activations of all examples take 16 MB in each layer.
    dataset = eqd.Dataset(np.ones((8192, 4), np.float32), np.zeros(8192, int), 3)
    first, hidden, last = jnp.ones((512, 4)), jnp.eye(512), jnp.ones((3, 512))
    deep = lambda layers, x, y: fn(layers[2], jnp.tanh(layers[1] @ (layers[0] @ x)), y)
    for chunk_bytes in (2**21, 2**23):
        data = eqd.FullBatch(dataset, chunk_bytes=chunk_bytes)

        def total(layers, data):
            mean = data.mean(deep, layers, jnp.array(0), key=KEY)
            return sum(jnp.sum(x) for x in jax.tree.leaves(mean))

        gradient = jax.jit(jax.grad(total)).lower((first, hidden, last), data)
        memory = gradient.compile().memory_analysis()
        assert memory is not None
        # A few gradients of the layers are alive too.
        assert memory.temp_size_in_bytes < chunk_bytes + 4 * hidden.nbytes


LABELS = np.array([2, 0, 1, 1, 0, 2, 1, 1, 2, 1, 0, 1, 1, 2])
COUNTS = [3, 7, 4]
# The pixel of an image is its number.
NUMBERS = np.arange(14, dtype=np.float32)[:, None, None]


def drawn(data, steps, key=KEY):
    """How often each image is drawn in each step: as it is, and with a half added."""
    identify = lambda _, x, y: jax.nn.one_hot(jnp.round(2 * x[0, 0]).astype(int), 28)
    of_step = lambda step: data.size * data.mean(identify, None, step, key=key)
    found = jax.jit(lambda: jax.lax.map(of_step, jnp.arange(steps)))()
    return np.round(np.asarray(found)).reshape(steps, 14, 2)


@pytest.mark.parametrize("size", [1, 2, 7, 14])
def test_an_epoch_has_each_example_once(size):
    data = eqd.Batches(eqd.Dataset(NUMBERS, LABELS), size)
    steps = 14 // size
    found = drawn(data, 2 * steps)[..., 0]
    np.testing.assert_array_equal(found.sum(1), size)
    first, second = found[:steps], found[steps:]
    np.testing.assert_array_equal(first.sum(0), 1)
    np.testing.assert_array_equal(second.sum(0), 1)
    if size < 14:
        assert not np.array_equal(first, second)
        assert not np.array_equal(drawn(data, steps, jr.key(6))[..., 0], first)


def test_balanced_batches():
    data = eqd.Batches(eqd.Dataset(NUMBERS, LABELS), 6, balanced=True)
    found = drawn(data, 60)[..., 0]
    for class_, count in enumerate(COUNTS):
        of_class = found[:, class_ == LABELS]
        np.testing.assert_array_equal(of_class.sum(1), 2)
        # No example comes twice in an epoch, and each comes in some epoch.
        epochs = of_class.reshape(-1, count // 2, count).sum(1)
        assert epochs.max() == 1
        assert epochs.sum(0).min() > 0
    assert not np.array_equal(drawn(data, 60, jr.key(6))[..., 0], found)


def test_classes_of_one_size_have_different_orders():
    data = eqd.Batches(eqd.Dataset(NUMBERS, np.arange(14) % 2), 2, balanced=True)
    found = drawn(data, 7)[..., 0]
    np.testing.assert_array_equal(found.sum(0), 1)
    assert not np.array_equal(found[:, ::2], found[:, 1::2])


class AddHalf(eqd.augment.AbstractAugmentation):
    """Adds a half to an image, or nothing."""

    def __call__(self, image, *, key):
        return image + 0.5 * jr.randint(key, (), 0, 2)


@pytest.mark.parametrize("balanced", [False, True])
def test_augmented_batches(balanced):
    dataset, size = eqd.Dataset(NUMBERS, LABELS), 6 if balanced else 7
    build = lambda x: eqd.Batches(dataset, size, balanced=balanced, augmentation=x)
    found = drawn(build(AddHalf()), 8)
    # The same examples are drawn without augmentation.
    np.testing.assert_array_equal(found.sum(2), drawn(build(None), 8).sum(2))
    augmented = found[..., 1]
    assert 0 < augmented.sum() < found.sum()
    assert len(np.unique(augmented, axis=0)) > 4


def test_batches_refuse_sizes_that_do_not_fit():
    dataset = eqd.Dataset(NUMBERS, LABELS)
    with pytest.raises(ValueError, match=r"multiple of 3, .*; got 4"):
        eqd.Batches(dataset, 4, balanced=True)


class Backbone(eqx.Module):
    weight: jax.Array

    def __call__(self, image):
        return jnp.tanh(self.weight @ jnp.ravel(image))


def test_cached_features_are_computed_once(logistic):
    start, _, train = logistic
    backbones = [Backbone(0.1 * jr.normal(key, (6, 64))) for key in jr.split(KEY)]
    one, other = map(eqd.Cached, backbones, ["one", "other"])
    impostor = eqd.Cached(backbones[1], "one")
    product = lambda model, x, y: jnp.outer(model[0](x), model[1](x))
    mean = lambda data, *model: data.mean(product, model, jnp.array(3), key=KEY)
    for build in (eqd.FullBatch, lambda *a, **k: eqd.Batches(*a, 20, **k)):
        cached = build(train, cached=[one])
        found = mean(cached, one, other)
        np.testing.assert_allclose(found, mean(build(train), one, other), rtol=1e-5)
        # The stored outputs are found by their name.
        np.testing.assert_array_equal(found, mean(cached, impostor, other))
    head = eqd.linear.LogisticRegression(6, 10).head
    objective = eqd.Bilevel(eqd.linear.LinearClassifier(impostor, head), OneStep())
    with pytest.raises(ValueError, match="module named 'one' is a different one"):
        eqd.distill(start, objective, cached)
    with pytest.raises(ValueError, match="finite"):
        eqd.FullBatch(train, cached=[eqd.Cached(lambda x: x / 0, "a")])
    with pytest.raises(ValueError, match="`augmentation` must be None with `cached`"):
        eqd.Batches(train, 20, augmentation=AddHalf(), cached=[one])


def test_data_may_be_a_function_of_the_step(logistic):
    start, objective, train = logistic
    half = lambda i: eqd.Dataset(train.images[i::2], train.labels[i::2], 10)
    parts = [eqd.FullBatch(half(i)) for i in range(2)]
    asked = []

    def stream(step):
        asked.append(step)
        if step == 5:
            raise OSError("The disk is gone.")
        return parts[step % 2]

    args = {"optimiser": optax.sgd(0.0)}
    result = eqd.distill(start, objective, stream, **args, steps=4)
    assert asked == [0, 1, 2, 3]
    wanted = [hypergradient(start, objective, part)[0] for part in parts]
    np.testing.assert_allclose(result.history.loss, 2 * wanted, rtol=1e-5)
    # A run that continues asks for the data of its own steps.
    with pytest.raises(eqd.DistillationError, match="step 5: `data` raised") as error:
        eqd.distill(start, objective, stream, **args, steps=8, state=result.state)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert int(error.value.distillation.state.step) == 5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case", ["constant pixels", "all constant", "bytes", "temperature"]
)
def test_sorted_pixels_give_the_generic_mean(digits, mnist, case):
    # The bytes fill several chunks, the last of them in part.
    train = subset(mnist[0], 7001) if case == "bytes" else subset(digits[0], 101)
    if case != "bytes":
        images = np.asarray(train.images, np.float64) / 16
        images[:, 0, :3] = 0.5
        images = np.full_like(images, 0.5) if case == "all constant" else images
        train = eqd.Dataset(images, train.labels, 10)
    p = int(np.prod(train.shape))
    model = eqd.linear.LogisticRegression(p, 10, use_intercept=case != "bytes")
    loss = eqd.CrossEntropy(0.3) if case == "temperature" else None
    objective = eqd.Bilevel(model, OneStep(), loss)
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=0.3, key=jr.key(0))
    sorted_pixels = objective.layout(train)
    assert not isinstance(sorted_pixels, eqd.FullBatch)
    found, gradient = hypergradient(start, objective, sorted_pixels)
    wanted, wanted_gradient = hypergradient(start, objective, train)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    np.testing.assert_allclose(
        gradient.images, wanted_gradient.images, rtol=1e-8, atol=1e-12
    )


def test_sorted_pixels_of_separated_data(logistic):
    # The loss is a small difference of large logits.
    start, _, train = logistic
    weight = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    logits = np.asarray(train.floating()).reshape(-1, 64) @ weight.T
    margins = np.diff(np.sort(logits, axis=1)[:, -2:])
    separated = eqd.Dataset(train.floating(), np.argmax(logits, axis=1), 10)
    model = eqd.linear.LogisticRegression(64, 10)
    weight = jnp.asarray(100 * weight / margins.min())
    model = eqx.tree_at(lambda m: m.head.weight, model, weight)
    objective = eqd.Bilevel(model, OneStep(learning_rate=0.0))
    loss, _ = hypergradient(start, objective, objective.layout(separated))
    assert 0 <= loss < 1e-6
