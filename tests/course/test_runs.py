"""Each notebook runs once, top to bottom, its printed solutions included: nothing raises, all gives what is saved.

Lines are compared word by word and number by number. What may differ: the last digit of a decimal fraction and numbers
like 3.1e-07, which are rounding errors (processors round sums differently); in cells tagged `rounding` all fractions;
in cells tagged `timing` the numbers of lines with a unit of time or speed. Of pictures, only that they are there.

The notebooks' clock lies here, every step by a factor of its own: an assertion about time would fail at once.
"""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from scripts.save_notebooks import NOTEBOOKS, execute

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
SOLUTION = re.compile(r"<summary>Solution</summary>\s+```python\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?")
MEASURED = re.compile(r"\d (?:[num]?s|µs|[Gk]B/s|[Gg]?flop/s|GFLOP/s|tok/s|tokens per second|x as fast)\b")
LYING_CLOCK = """
import random as _random, time as _time, timeit as _timeit, warnings as _warnings
_warnings.filterwarnings("ignore", "Creating legend with loc=.best. can be slow")  # says Matplotlib after a second
def _clock(true=_time.perf_counter, last=[0.0, 0.0], rng=_random.Random(0)):
    now = true()
    last[:] = now, last[1] + (now - last[0]) * 10 ** rng.uniform(-2, 2)
    return last[1]
for _f in (_timeit.timeit, _timeit.repeat, _timeit.Timer.__init__):
    _f.__defaults__ = tuple(_clock if value is _time.perf_counter else value for value in _f.__defaults__)
_time.perf_counter = _timeit.default_timer = _clock
"""


def to_run(saved: NotebookNode) -> NotebookNode:
    """The notebook with a clock that lies, and with every printed solution as a cell behind its text."""
    notebook = copy.deepcopy(saved)
    notebook.cells = [new_code_cell(LYING_CLOCK)]
    for cell in copy.deepcopy(saved.cells):
        notebook.cells.append(cell)
        if cell.cell_type == "markdown":
            notebook.cells += [new_code_cell(code) for code in SOLUTION.findall(cell.source)]
    return notebook


def same_number(saved: str, fresh: str, any_fraction: bool) -> bool:
    fractions = [text.partition(".")[2] for text in (saved, fresh)]
    if saved == fresh or "e" in saved + fresh or (any_fraction and any(fractions)):
        return True
    places = max(map(len, fractions))
    distance = abs(float(saved.replace(",", "")) - float(fresh.replace(",", "")))
    return places > 0 and distance < 1.5 * 10**-places


def same_line(saved: str, fresh: str, tags: list[str]) -> bool:
    words, others = (NUMBER.sub("#", line).split() for line in (saved, fresh))
    if words != others:
        return False
    if "timing" in tags and MEASURED.search(saved):
        return True
    pairs = zip(NUMBER.findall(saved), NUMBER.findall(fresh), strict=True)
    return all(same_number(*pair, "rounding" in tags) for pair in pairs)


def lines(cell: NotebookNode) -> list[str]:
    """What a cell prints; how a kernel cuts that into pieces, and empty lines, mean nothing."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return [line for line in text.splitlines() if line.strip()]


def shown(cell: NotebookNode) -> list[list[str]]:
    """What a cell displays: the kinds of data of each output."""
    return [sorted(output.data) for output in cell.outputs if output.output_type != "stream"]


def differences(saved: NotebookNode, fresh: NotebookNode) -> list[str]:
    ran, found = {cell.id: cell for cell in fresh.cells}, []
    for number, cell in enumerate(saved.cells):
        if cell.cell_type != "code":
            continue
        old, new, tags = lines(cell), lines(ran[cell.id]), cell.metadata.get("tags", [])
        if len(old) != len(new) or shown(cell) != shown(ran[cell.id]):
            found.append(f"cell {number}: saved {old}, {shown(cell)}\n  now {new}, {shown(ran[cell.id])}")
        pairs = zip(old, new, strict=False)
        found += [f"cell {number}: saved {a!r}\n  now {b!r}" for a, b in pairs if not same_line(a, b, tags)]
    return found


def widget_errors(notebook: NotebookNode) -> list[str]:
    """What the functions behind sliders raised; the widget catches it, so the cell goes on."""
    models = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    outputs = [output for model in models for output in model["state"].get("outputs", [])]
    return [output["evalue"] for output in outputs if output["output_type"] == "error"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_runs_solves_and_gives_what_is_saved(path: Path):
    saved = nbformat.read(path, as_version=4)
    fresh = to_run(saved)
    execute(fresh)
    assert not widget_errors(fresh)
    if path.stem.startswith("11_") and shutil.which("g++") is None:
        pytest.skip("ran without g++, with which its outputs were saved")
    found = differences(saved, fresh)
    assert not found, "\n".join([f"save it again: python scripts/save_notebooks.py {path.stem[:2]}", *found])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_exercise_has_a_solution_that_is_run(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    code, prose = ("\n\n".join(c.source for c in cells if c.cell_type == kind) for kind in ("code", "markdown"))
    checkers, solutions = set(re.findall(r"def (check_\d)", code)), SOLUTION.findall(prose)
    assert len(solutions) == prose.count("<details>") == len(checkers)
    assert {name for solution in solutions for name in re.findall(r"assert (check_\d)\(", solution)} == checkers


@pytest.mark.parametrize(
    ("saved", "fresh", "tags", "same"),
    [
        ("12 hits", "13 hits", [], False),
        ("12 hits", "12  hits", [], True),
        ("hits 24.4%", "hits 24.5%", [], True),
        ("hits 24.4%", "hits 24.6%", [], False),
        ("policy lru", "policy echo", [], False),
        ("error 3.1e-07", "error 0.0e+00", [], True),
        ("off 164,374.9 x", "off 151,227.7 x", [], False),
        ("off 164,374.9 x", "off 151,227.7 x", ["rounding"], True),
        ("5 of 8 rows, 1.5 off", "6 of 8 rows, 1.5 off", ["rounding"], False),
        ("took 9.7 ms", "took 37.6 ms", [], False),
        ("took 9.7 ms", "took 37.6 ms", ["timing"], True),
        ("took 9.7 ms", "used 9.7 ms", ["timing"], False),
        ("hit rate 24%", "hit rate 32%", ["timing"], False),
        ("32 tokens, 346.8 tok/s", "32 tokens, 75.7 tok/s", ["timing"], True),
        ("shape (6, 4)", "shape (6, 4, 2)", [], False),
    ],
)
def test_what_counts_as_the_same(saved, fresh, tags, same):
    assert same_line(saved, fresh, tags) is same


def cell(text: str, kind: str = "image/png", tags: tuple[str, ...] = ()) -> NotebookNode:
    """A code cell, always of the same id, that printed `text` and showed something of this kind."""
    made = new_code_cell("print()", id="a", metadata={"tags": list(tags)})
    made.outputs = [
        nbformat.v4.new_output("stream", text=text),
        nbformat.v4.new_output("display_data", {kind: "", "text/plain": ""}),
    ]
    return made


def test_a_stale_output_is_found():
    def notebook(*given, **more):
        return nbformat.v4.new_notebook(cells=[cell(*given, **more)])

    assert differences(notebook("a 1\n"), notebook("a 1\n")) == []
    assert len(differences(notebook("policy lru\n"), notebook("policy echo\n"))) == 1
    assert len(differences(notebook("a\n"), notebook("a\nb\n"))) == 1
    assert len(differences(notebook("a\n"), notebook("a\n", "text/html"))) == 1
