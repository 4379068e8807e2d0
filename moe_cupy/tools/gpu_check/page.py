"""The report as a page: kernel by kernel what has run on a GPU, and all that was measured."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_cupy.kernels.cuda.sources import kernels
from moe_cupy.tools.gpu_check.runner import Report, wrongs
from moe_ref.command import RequestError, whole_file

NOT_RUN = "**not run on a GPU**"


def write(report: Report, prefix: Path) -> list[Path]:
    """PREFIX.json and PREFIX.md, each whole or not at all."""
    json_path, page_path = prefix.with_suffix(".json"), prefix.with_suffix(".md")
    for path, text in ((json_path, json.dumps(report, indent=1) + "\n"), (page_path, page(report))):
        with whole_file(path) as out:
            out.write(text.encode())
    return [json_path, page_path]


BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def write_between_marks(report: Report, path: Path) -> None:
    """Replace what stands between the marks of a page by the kernels' table."""
    text = path.read_text("utf-8")
    if BEGIN not in text or END not in text:
        raise RequestError(f"{path}: there is no {BEGIN} … {END} in it to replace")
    made = f"{report['made'][:10]}, version {report['version']}, {report['backend']} device."
    lines = "\n".join([BEGIN, made, *kernel_table(report), END])
    with whole_file(path) as out:
        out.write((text.partition(BEGIN)[0] + lines + text.partition(END)[2]).encode())


def page(report: Report) -> str:
    """The whole page."""
    return "\n".join([*head(report), *section_tables(report), *kernel_table(report)]) + "\n"


def head(report: Report) -> Iterator[str]:
    """What was run, when, and what was wrong."""
    yield "# GPU status"
    yield ""
    if report["backend"] != "cuda":
        yield f"**None of this ran on a GPU**: it is what the {report['backend']} device gave, whose rates say nothing."
        yield "`make gpu-check` on a machine with a GPU writes this page anew."
    else:
        yield "Written by `make gpu-check`."
    yield f"{report['made']}, version {report['version']}{', commit ' + report['commit'] if report['commit'] else ''}."
    found = list(wrongs(report))
    yield ""
    yield f"{len(found)} findings:" if found else "Nothing was wrong."
    yield from (f"- {finding}" for finding in found)


def cell(value: Any) -> str:
    """A table cell."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def section_tables(report: Report) -> Iterator[str]:
    """A table of each section but the kernels'."""
    for name, section in report["sections"].items():
        if name == "kernels":
            continue
        rows = section["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        yield from ("", f"## {name}", "", f"{section['status']}, {section['seconds']} s", "")
        if rows:
            yield f"| {' | '.join(columns)} |"
            yield "|" + "---|" * len(columns)
            yield from (f"| {' | '.join(cell(row.get(column, '')) for column in columns)} |" for row in rows)


def kernel_table(report: Report) -> Iterator[str]:
    """Every kernel there is: how many cases it ran, the worst error as a share of what is allowed, and where."""
    section = report["sections"].get("kernels", {"status": "not asked for", "seconds": 0, "rows": []})
    on_gpu = report["backend"] == "cuda"
    cases: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for row in section["rows"]:
        for kernel in row["kernels"]:
            cases[kernel].append((row["share"], row["name"]))
    yield from ("", "## kernels", "", f"{section['status']}, {section['seconds']} s", "")
    yield f"| kernel | cases on {report['backend']} | worst error / allowed | worst case | GPU |"
    yield "|---|--:|--:|---|---|"
    for kernel in sorted(kernels()):
        worst, where = max(cases[kernel], default=(0.0, ""))
        state = ("right" if worst <= 1 else "**WRONG**") if on_gpu and cases[kernel] else NOT_RUN
        yield f"| {kernel} | {len(cases[kernel])} | {worst:.3g} | {cell(where)} | {state} |"
