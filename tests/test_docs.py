"""The code in the README and in the documentation runs as printed."""

import json
import re
import runpy
from pathlib import Path

import jax
import pytest


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SCALE_UP = "docs/how-to/scale-up.md"


def python_in(page: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return "\n".join(blocks)


def pages():
    """`docs/extend` has tests of its own."""
    for folder in "docs", "docs/tutorials", "docs/how-to":
        for file in sorted((ROOT / folder).glob("*.md")):
            page = file.relative_to(ROOT).as_posix()
            if page != SCALE_UP and python_in(page):
                yield pytest.param(page, marks=pytest.mark.slow)


ON_DEVICES = pytest.param(
    SCALE_UP,
    marks=pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices"),
)


@pytest.mark.parametrize("page", ["README.md", *pages(), ON_DEVICES])
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(python_in(page), page, "exec"), {"__name__": page})


def test_folders_import_only_from_folders_above():
    script = runpy.run_path(str(DOCS / "scripts" / "draw_architecture.py"))
    modules, arrows = script["survey"]()
    script["check"](modules, arrows)
    assert ("_outer", "_inner") in arrows


def test_gallery_is_up_to_date():
    script = runpy.run_path(str(DOCS / "scripts" / "make_gallery.py"))
    pictures = script["read"]()
    # `python docs/scripts/make_gallery.py` writes it.
    assert script["PAGE"].read_text() == script["page"](pictures)
    for picture in pictures:
        assert (ROOT / "examples" / picture.command.split()[0]).exists()
    shown = {picture.image for picture in pictures}
    gallery = DOCS / "images" / "gallery"
    assert shown >= {f"gallery/{file.name}" for file in gallery.iterdir()}


def test_notebook_is_executed():
    """From its first cell to its last; `.ci/run` executes it again."""
    notebook = json.loads((DOCS / "dataset_distillation.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
