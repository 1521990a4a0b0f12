"""Runs in every build of the documentation, by `mkdocs.yml`.

It turns the formulas of pages, docstrings and notebooks into MathML, which needs no
JavaScript and no network, puts the version beside the link to the repository, and tells
the search that guides answer more questions than the reference.
"""

import html
import re
import tomllib
from pathlib import Path

from latex2mathml.converter import convert


# What `pymdownx.arithmatex` writes, and what notebooks hold.
_PAGE = re.compile(
    r'<(span|div) class="arithmatex">\s*\\[(\[](.+?)\\[)\]]\s*</\1>', re.DOTALL
)
_NOTEBOOK = re.compile(r"(\$\$?)([^$]+)\1")
_NOTEBOOK_TEXT = re.compile(
    r'<div[^>]*data-mime-type="text/markdown".*?</div>', re.DOTALL
)
# How much the search prefers a page, by the beginning of its path. The last one counts.
_BOOSTS = {
    "api/": 0.3,
    "citing": 3,
    "explanation/": 1.5,
    "extend/": 1.5,
    "glossary": 2,
    "how-to/": 2,
    "how-to/load-data": 3,
    "tutorials/": 3,
}
_MATHJAX = re.compile(r"<!-- Load mathjax -->.*?<!-- End of mathjax[^>]*>", re.DOTALL)


def on_config(config):
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    config["repo_name"] = f"{project['name']} {project['version']}"
    return config


def on_page_markdown(markdown, page, **_):
    for path, boost in _BOOSTS.items():
        if page.file.src_uri.startswith(path):
            page.meta["search"] = {"boost": boost}


def on_page_content(content, page, **_):
    if page.file.src_uri.endswith(".ipynb"):
        in_text = lambda text: _NOTEBOOK.sub(_formula_of_notebook, text[0])
        return _NOTEBOOK_TEXT.sub(in_text, _MATHJAX.sub("", content))
    return _PAGE.sub(lambda found: to_mathml(found[2], found[1] == "div"), content)


def _formula_of_notebook(found: re.Match) -> str:
    return to_mathml(found[2], found[1] == "$$")


def to_mathml(tex: str, is_block: bool) -> str:
    tex = html.unescape(tex).strip()
    # What `latex2mathml` does not know, or sets less well.
    tex = re.sub(r"\\arg\\(min|max)", r"\\operatorname{arg\1}", tex)
    tex = tex.replace(r"\Big\|", r"\Big‖").replace(r"\log ", r"\log\, ")
    tex = re.sub(r"\\mathrm\{(\w\w+)\}", r"\\text{\1}", tex)
    if is_block:
        tex = re.sub(r"(\\(min|max|operatorname\{arg[^}]*\}))_", r"\1\\limits_", tex)
    made = convert(tex, display="block" if is_block else "inline")
    if "\\" in made:
        raise ValueError(f"this formula is not converted to MathML: {tex}")
    tag = "div" if is_block else "span"
    return f'<{tag} class="formula">{made}</{tag}>'
