"""The papers that a run should cite."""

import inspect
import re
import tomllib
from functools import partial
from pathlib import Path

import jax.random as jr
import optax
import pytest

import eqdistill as eqd

from .conftest import evaluation


ROOT = Path(__file__).parents[1]
MODULES = (eqd, eqd.adjoints, eqd.augment, eqd.datasets, eqd.linear, eqd.nn)
MODULES += (eqd.recipes, eqd.DistilledSet)
MAKE = partial(eqd.nn.MLP, (8, 8), 10, widths=())


def cited(*objects):
    """The surname of the first author and the year of each entry but the package's."""
    _, *entries = eqd.cite(*objects).split("\n\n")
    form = r"@\w+\{\w+,\n  author = \{(\w+), .* year = \{(\d{4})\},\n\}"
    assert all(re.fullmatch(form, entry, re.DOTALL) for entry in entries)
    assert all(entry.count("{") == entry.count("}") for entry in entries)
    return [re.findall(form, entry, re.DOTALL)[0] for entry in entries]


def test_docstrings_name_the_same_papers():
    docs = {
        x: " ".join((inspect.getdoc(x) or "").split()).partition("Source: ")[2]
        for module in MODULES
        for name, x in inspect.getmembers(module, callable)
        if name[0] != "_"
    }
    known = set(cited(*docs))
    assert len(known) >= 17
    for x, source in docs.items():
        named = {
            (author, year)
            for author, year in known
            if re.search(rf"\b{author}\b", source) and year in source
        }
        assert {*cited(x)} == named, x


def test_a_run_cites_its_methods(logistic):
    start, objective, train = logistic
    optimiser = optax.chain(eqd.adjoints.clip_by_running_norm(), optax.adam(0.1))
    result = eqd.distill(start, objective, train, optimiser=optimiser, steps=1)
    assert cited(result) == [("Pedregosa", "2016"), ("Feng", "2024")]
    packed = eqd.Packed(start, (16, 16))
    objective = eqd.Bilevel(eqd.Pool(MAKE), eqd.linear.LinearisedSolver())
    networks = [("Zhao", "2021"), ("Kim", "2022"), ("Zhou", "2022"), ("Loo", "2023")]
    assert cited(packed, objective) == [("Pedregosa", "2016"), *networks]
    assert cited() == cited("Pool is a word", train) == []


@pytest.mark.parametrize(
    ("recipe", "papers"),
    [
        (eqd.recipes.dc(MAKE), [("Zhao", "2021")]),
        (eqd.recipes.frepo(MAKE), [("Zhao", "2021"), ("Zhou", "2022")]),
        (
            eqd.recipes.learned_rates(MAKE, learning_rates=[0.1], batch_size=10),
            [("Wang", "2018"), ("Zhao", "2021")],
        ),
    ],
)
def test_a_file_cites_its_recipe(tmp_path, digits, recipe, papers):
    start = eqd.DistilledSet.from_real(digits[0], l2=0.1, key=jr.key(0))
    found = evaluation(recipe)
    eqd.save(tmp_path / "a.safetensors", start, found)
    assert cited(found) == cited(eqd.load(tmp_path / "a.safetensors")) == papers


def test_package_is_cited_as_in_its_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r'^([\w-]+): "?(.*?)"?$', citation, re.MULTILINE))
    url = fields["repository-code"]
    assert fields["version"] == project["version"]
    assert url == project["urls"]["Repository"]
    entry = re.sub("[{}]", "", eqd.cite())
    assert f"title = {fields['title']}," in entry
    assert f"url = {url}," in entry
    assert f"## {project['version']} - {fields['date-released']}" in (
        ROOT / "CHANGELOG.md"
    ).read_text("utf-8")
