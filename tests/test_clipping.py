"""Clipping at a multiple of the running mean of the norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings, strategies as st

from eqdistill.adjoints import clip_by_running_norm


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_norms_are_at_most_twice_the_mean_of_the_previous_ones(norms):
    transform = clip_by_running_norm(2.0, 0.9)
    direction = [jnp.array([0.6, 0.0]), jnp.array(0.8)]
    state, clipped = transform.init(direction), []
    for norm in norms:
        scaled = optax.tree.scale(norm, direction)
        updates, state = transform.update(scaled, state)
        got = float(optax.tree.norm(updates))
        limit = np.inf
        if clipped:
            weights = 0.9 ** np.arange(len(clipped))[::-1]
            limit = 2 * np.average(clipped, weights=weights)
        np.testing.assert_allclose(got, min(norm, limit), rtol=1e-4)
        first, second = jax.tree.leaves(updates)
        np.testing.assert_allclose(first[0] / second, 0.75, rtol=1e-5)
        clipped.append(got)
