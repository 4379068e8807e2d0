"""The course keeps its form: short cells, a header, stored outputs, paths that exist. (Runs: test_runs.py)"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_CELLS, MOST_LINES, MOST_COLUMNS = 25, 10, 120
HEADER = ("**Question.**", "**Afterwards you can**", "**Runtime**", "**Needs**")
SECTIONS = ("Predict", "Build", "Measure", "What surprised us", "Exercises", "Where this lives in the code")
RICH = {"image/png", "image/svg+xml", "text/html", "text/markdown", "application/vnd.jupyter.widget-view+json"}
TAGS = {"timing", "rounding"}  # what a saved output may differ in from a fresh one: test_runs.py
MACHINE_PATH = re.compile(r"(?<![\w.])/(tmp|home|root|work|Users|opt|mnt|var)/|[A-Z]:\\Users")
REPOSITORY_PATH = re.compile(r"`((?:moe_ref|moe_cupy|tests|data)/[\w./-]*)`")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def prose(path: Path) -> str:
    return "\n\n".join(map(source, cells(path, "markdown")))


def texts(value: Any) -> Iterator[str]:
    """All strings of a JSON value, pictures left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (text for item in value for text in texts(item))
    elif isinstance(value, dict):
        yield from (text for key, item in value.items() if key != "image/png" for text in texts(item))


def test_there_is_a_course():
    assert len(NOTEBOOKS) >= 6


@every_notebook
def test_code_comes_in_few_short_cells(path):
    code = [source(cell) for cell in cells(path, "code")]
    tall = {i: n for i, text in enumerate(code, 1) if (n := len(text.splitlines())) > MOST_LINES}
    assert len(code) <= MOST_CELLS and not tall, f"{len(code)} code cells; lines of those that are too tall: {tall}"


@every_notebook
def test_lines_are_no_wider_than_the_code_base(path):
    lines = [line for kind in ("code", "markdown") for cell in cells(path, kind) for line in source(cell).splitlines()]
    assert not [line for line in lines if len(line) > MOST_COLUMNS and not line.startswith("|")]


@every_notebook
def test_the_header_says_what_one_needs_to_know(path):
    header = source(cells(path, "markdown")[0])
    assert header.startswith(f"# {int(path.stem[:2])} · "), header[:40]
    assert [part for part in HEADER if part not in header] == []


@every_notebook
def test_sections_come_in_the_order_of_the_course(path):
    headings = [line.lstrip("# ") for line in prose(path).splitlines() if line.startswith("#")]
    first = [next((i for i, h in enumerate(headings) if h.startswith(name)), None) for name in SECTIONS]
    assert None not in first, dict(zip(SECTIONS, first, strict=True))
    assert first == sorted(first), headings


@every_notebook
def test_claims_are_asserted_drawn_and_tried_out(path):
    code = [source(cell) for cell in cells(path, "code")]
    assert sum("assert " in text for text in code) >= 8
    assert sum("label" in text and "plt.subplots" in text for text in code) >= 3
    assert any("interact(" in text for text in code)
    exercises = set(re.findall(r"def (check_\d)", "\n".join(code)))
    assert 2 <= len(exercises) <= 3
    assert all(f"assert {name}(" in prose(path) for name in exercises), "an exercise without a solution"


@every_notebook
def test_outputs_are_those_of_one_run_from_top_to_bottom(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert json.loads(path.read_text())["metadata"]["widgets"], "the widgets have no stored state"


@every_notebook
def test_no_cell_ends_in_a_bare_repr(path):
    """Like `<matplotlib.legend.Legend at 0x7f…>`: a missing semicolon. Values are printed, or shown as a picture."""
    results = [
        (number, output["data"]["text/plain"])
        for number, cell in enumerate(cells(path, "code"), 1)
        for output in cell["outputs"]
        if output["output_type"] == "execute_result" and not set(output["data"]) & RICH
    ]
    assert not results, f"In[n] and its repr: {results}"


@every_notebook
def test_nothing_of_the_machine_is_stored(path):
    notebook = json.loads(path.read_text())
    assert [text for text in texts(notebook) if MACHINE_PATH.search(text)] == []
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"]), "cells carry times"
    assert all(set(cell["metadata"].get("tags", [])) <= TAGS for cell in notebook["cells"])


@every_notebook
def test_every_path_it_names_exists(path):
    named = REPOSITORY_PATH.findall(prose(path))
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_machine_path_is_recognised():
    assert all(MACHINE_PATH.search(text) for text in ("File /tmp/a.py", "'/home/a/x'", r"C:\Users\a"))
    assert not any(MACHINE_PATH.search(text) for text in ("flop/s", "data/valid.txt", "../tmp/x", "bits/opt/x"))
