"""The Python page and the notebook of the documentation, run as they stand."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_python_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    assert len(blocks) > 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    crown = names["crown"]
    assert crown.layers[0] != crown.layers[3]
    assert 1 < names["score"].bits_per_byte < 8
    assert names["again"].family == "llama"
    assert names["states"].shape[0] == 7 and len(names["updates"]) == 6


@pytest.mark.slow
@pytest.mark.xdist_group("study")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Its cells are plain Python, so that neither a kernel nor Jupyter is needed to run them."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((DOCS / "first-study.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "docs/first-study.ipynb", "exec"), names)
    assert names["verdict"]["protocols"]["params"]["arms"]["vanilla"]["difference"]
    assert (tmp_path / "studies/first/report.html").is_file()
