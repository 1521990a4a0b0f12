import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from ._layout import AbstractLayout


class GrowingBatch(eqx.Module):
    r"""Starts on a random part of the real images, and goes on to all of them when the
    hypergradient is lost in the noise of having sampled them.

    The part consists of two halves, whose hypergradients are $g_1$ and $g_2$. That of
    both is their mean, and its noise is about as large as half of their difference: all
    of the images are taken once

    $$\tfrac{1}{2} \|g_1 - g_2\| \ge \rho \; \tfrac{1}{2} \|g_1 + g_2\|.$$

    The optimiser is then started anew, as what it remembers is of another loss.

    Source: Byrd, Chin, Nocedal and Wu, *Sample size selection in optimization methods
    for machine learning*, 2012, for the criterion.
    """

    fraction: float
    ratio: float

    def __init__(self, fraction: float = 1 / 16, *, ratio: float = 1.0):
        r"""**Arguments:**

        - `fraction`: the fraction of the real images to start on, between 0 and 1.
        - `ratio`: $\rho > 0$. (Keyword only argument.)

        **Raises:**

        A `ValueError` for either out of its range.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"`fraction` must be between 0 and 1; got {fraction}.")
        if not ratio > 0:
            raise ValueError(f"`ratio` must be positive; got {ratio}.")
        self.fraction = fraction
        self.ratio = ratio


class GrowingLayout(AbstractLayout):
    """A part of the images, in two halves, and all the others."""

    halves: tuple[AbstractLayout, AbstractLayout]
    others: AbstractLayout
    is_whole: Bool[Array, ""]
    num_images: int = eqx.field(static=True)

    def value(self, classifier):
        part = _mean(self._half_sizes, [half.value(classifier) for half in self.halves])
        return self._and_others(part, lambda: self.others.value(classifier))

    def value_and_grad(self, classifier):
        loss, gradient, _ = self.value_grad_and_difference(classifier)
        return loss, gradient

    def value_grad_and_difference(
        self, classifier: PyTree
    ) -> tuple[Float[Array, ""], PyTree, PyTree]:
        """The loss and its gradient, and half of the difference between the gradients
        of the two halves."""
        (_, first), (_, second) = halves = [
            half.value_and_grad(classifier) for half in self.halves
        ]
        part = _mean(self._half_sizes, halves)
        loss, gradient = self._and_others(
            part, lambda: self.others.value_and_grad(classifier)
        )
        return loss, gradient, optax.tree.scale(0.5, optax.tree.sub(first, second))

    @property
    def num_images_now(self):
        return jnp.where(self.is_whole, self.num_images, self._part_size)

    @property
    def mean_square(self):
        part = _mean(self._half_sizes, [half.mean_square for half in self.halves])
        return self._and_others(part, lambda: self.others.mean_square)

    @property
    def _half_sizes(self) -> list[int]:
        return [half.num_images for half in self.halves]

    @property
    def _part_size(self) -> int:
        return sum(self._half_sizes)

    def _and_others(self, part: PyTree, others) -> PyTree:
        sizes = [self._part_size, self.others.num_images]
        return jax.lax.cond(
            self.is_whole,
            lambda: _mean(sizes, [part, others()]),
            lambda: part,
        )


def _mean(sizes: list[int], trees: list[PyTree]) -> PyTree:
    total = sum(sizes)
    terms = [
        optax.tree.scale(size / total, tree)
        for size, tree in zip(sizes, trees, strict=True)
    ]
    return jax.tree.map(lambda *x: sum(x), *terms)
