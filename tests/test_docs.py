"""The code of the README and of the documentation runs as it stands."""

import re
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/write-a-solver.md",
    pytest.param("docs/evaluation.md", marks=pytest.mark.slow),
    pytest.param("docs/elsewhere.md", marks=pytest.mark.slow),
    pytest.param("docs/networks.md", marks=pytest.mark.slow),
    pytest.param("docs/training-runs.md", marks=pytest.mark.slow),
    pytest.param("docs/backbones.md", marks=pytest.mark.slow),
    pytest.param("docs/getting-started.md", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": page})


def test_no_room_imports_from_below():
    script = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    modules, arrows = script["survey"]()
    script["check"](modules, arrows)
    assert ("_outer", "_inner") in arrows
