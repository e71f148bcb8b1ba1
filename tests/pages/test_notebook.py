"""The notebook, run as a reader would, and how things show themselves there."""

from pathlib import Path

import pytest

import minisd
from minisd.notebook import bar, curve, progress, table

NOTEBOOK = Path(__file__).parents[2] / "scripts" / "walkthrough.ipynb"


def test_a_table_is_escaped_and_short():
    text = table("<b>", {"<script>": "a & b", "number": 1234567, "ratio": 0.123456789}, after="<svg></svg>")
    assert "<script>" not in text and "&lt;b&gt;" in text and "a &amp; b" in text and "1,234,567" in text
    assert "0.123457" in text and text.endswith("<svg></svg>")
    assert "and 5 more" in table("x", [(n,) for n in range(105)], ("number",))
    assert curve([1.0, 0.5, 0.0], [1]).count("<circle") == 1 and "value='2' max='5'" in bar(2, 5)
    assert list(progress(range(3), 3)) == [0, 1, 2]  # outside of a notebook: tqdm's


def test_the_notebook_runs():
    """Every cell, in a kernel of its own; what it shows is there."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install -e '.[test]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[test]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept in the repository"
    here = str(Path(minisd.__file__).parents[1])
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {here!r})"))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "\n".join("".join(one.get("text/html", "")) for one in shown)
    for words in (
        "text_encoder, parameters",
        "DDIMScheduler",
        "<polyline",
        "step 10 of 10",
        "readings",
        "<iframe",
        "norm1",
    ):
        assert words in text, words
    assert sum("image/png" in one for one in shown) >= 5
