"""The code in the README and in the documentation runs as printed."""

import json
import re
import runpy
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


ROOT = Path(__file__).parents[1]
NAMES = ["evaluation", "elsewhere", "networks", "training-runs", "backbones"]
NAMES += ["getting-started", "growing-data", "tables", "targets"]
SLOW = [pytest.param(f"docs/{name}.md", marks=pytest.mark.slow) for name in NAMES]
SCALE_UP = pytest.param(
    "docs/scale-up.md",
    marks=pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices"),
)


@pytest.mark.parametrize("page", ["README.md", *SLOW, SCALE_UP])
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    try:
        exec(compile("\n".join(blocks), page, "exec"), {"__name__": page})
    finally:  # A page may choose a folder for compiled programs.
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def test_folders_import_only_from_folders_above():
    script = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    modules, arrows = script["survey"]()
    script["check"](modules, arrows)
    assert ("_outer", "_inner") in arrows


def test_gallery_is_up_to_date():
    script = runpy.run_path(str(ROOT / "docs" / "make_gallery.py"))
    pictures = script["read"]()
    # `python docs/make_gallery.py` writes it.
    assert (ROOT / "docs" / "gallery.md").read_text() == script["page"](pictures)
    for picture in pictures:
        assert (ROOT / "examples" / picture.command.split()[0]).exists()
    shown = {picture.image for picture in pictures}
    gallery = ROOT / "docs" / "images" / "gallery"
    assert shown >= {f"gallery/{file.name}" for file in gallery.iterdir()}


def test_notebook_is_executed():
    """From its first cell to its last; `.ci/run` executes it again."""
    notebook = json.loads(
        (ROOT / "docs" / "dataset_distillation.ipynb").read_text("utf-8")
    )
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
