"""Custom modules, each in one file that uses public names only: the pages of
`docs/extend`, and what is said to modules that break a promise."""

import re
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest

import eqdistill as eqd

from .conftest import hypergradient, OneStep


PAGES = sorted((Path(__file__).parents[1] / "docs" / "extend").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_run_use_public_names_and_are_short(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    code = "\n".join(blocks)
    assert 0 < len([line for line in code.splitlines() if line.strip()]) <= 60
    assert not re.search(r"eqdistill\._|eqd(\.\w+)*\._", code)
    # Their assertions are the tests.
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})


class Scripted(eqd.AbstractInnerSolver):
    """An inner solver that returns anything."""

    returns: object
    first: object = None

    def init(self, distilled, model, *, key):
        return self.first

    def __call__(self, distilled, model, state, *, key):
        return self.returns(distilled, model, state)


def good(distilled, model, state):
    fitted, _ = OneStep()(distilled, model, None, key=jr.key(0))
    return fitted, state


def wrong_outputs(distilled, model, state):
    fitted, state = good(distilled, model, state)
    return eqx.tree_at(lambda f: f.model, fitted, lambda image: jnp.sum(image)), state


@pytest.mark.parametrize(
    ("returns", "first", "match"),
    [
        (lambda d, m, s: m, None, "must return a pair.*returned a LinearClassifier"),
        (lambda d, m, s: (good(d, m, s)[0], 1.0), None, "nothing wanted, 1.0 got"),
        (
            lambda d, m, s: (good(d, m, s)[0], jnp.zeros(3)),
            jnp.zeros(2),
            r"float32.*\(2,\) wanted, .*float32.*\(3,\) got",
        ),
        (good, "text", r"an array wanted, 'text' got"),
        (wrong_outputs, None, r"model` must map one image.*shape \(c,\)"),
    ],
)
def test_a_solver_that_breaks_its_promise_is_refused(logistic, returns, first, match):
    start, linear, train = logistic
    objective = eqd.Bilevel(linear.models.model, Scripted(returns, first))
    for call in (eqd.distill, hypergradient):
        with pytest.raises((TypeError, ValueError), match=f"(?s){match}"):
            call(start, objective, train)


def test_a_fit_of_infinite_residual_has_not_converged(logistic):
    def infinite(distilled, model, state):
        fitted, state = good(distilled, model, state)
        where = lambda f: (f.converged, f.gradient_norm)
        return eqx.tree_at(where, fitted, (jnp.array(True), jnp.array(jnp.inf))), state

    start, linear, train = logistic
    model, inner = linear.models.model, Scripted(infinite)
    assert not eqd.fit(start, model, inner, throw=False).converged
    with pytest.raises(eqd.DistillationError, match="inner solver did not converge"):
        eqd.distill(start, eqd.Bilevel(model, inner), train)
