"""Gives each section its time and a process of its own, so that what one breaks the next does not find broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_cupy.tools.gpu_check.sections import ROOT, SECTIONS
from moe_cupy.tools.gpu_check.workbench import SMALL, Sizes, Workbench
from moe_ref import __version__

GRACE = 10.0  # seconds beyond its own that a section has to come to an end
OK = "complete"
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What to run: on which device, which sections (all if none is named), how large, and in this process or not."""

    choice: str = "cuda"
    only: tuple[str, ...] = ()
    small: bool = False
    few: bool = False
    here: bool = False

    @property
    def sizes(self) -> Sizes:
        """Of what is measured."""
        if self.small:
            return SMALL
        return Sizes(formats=SMALL.formats) if self.few else Sizes()

    def command(self, section: str, rows: Path) -> list[str]:
        """The command line of a process that runs one section and writes its rows."""
        flags = [flag for flag, given in (("--small", self.small), ("--few", self.few)) if given]
        inner = ["--backend", self.choice, "--only", section, "--here", "--rows", str(rows), *flags]
        return [sys.executable, "-m", "moe_cupy", "gpu-check", *inner]


def run_here(name: str, request: Request, sink: Callable[[dict[str, Any]], None]) -> str:
    """Run a section in this process, each row to ``sink`` as it comes; returns how it ended."""
    section, seconds = SECTIONS[name]
    end = time.monotonic() + seconds
    try:
        bench = Workbench(request.choice, request.sizes)
        try:
            for row in section(bench):
                sink(row)
                if time.monotonic() > end:
                    return f"stopped after {seconds:.0f} s"
        finally:
            bench.close()
    except Exception as error:  # recorded, so that the other sections still run
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return OK


def write_rows(name: str, request: Request, path: Path) -> None:
    """Run a section and append each row to a file as a line of JSON, its end last."""
    with path.open("a", encoding="utf-8") as file:

        def sink(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        sink({"status": run_here(name, request, sink)})


def run_apart(name: str, request: Request) -> tuple[list[dict[str, Any]], str]:
    """Run a section in a process of its own: its rows, as many as there are, and how it ended."""
    limit = SECTIONS[name][1] + GRACE
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        path.touch()
        command, env = request.command(name, path), os.environ | {"PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
            end = f"failed: exit status {done.returncode}: {' '.join(done.stderr.split())[-400:]}"
        except subprocess.TimeoutExpired:
            end = f"ended by force after {limit:.0f} s"
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if rows and "status" in rows[-1]:
        end = rows.pop()["status"]
    return rows, end


def run_all(request: Request, say: Callable[[str], None]) -> Report:
    """All sections of a request, one after another; what fails is recorded and the next goes on."""
    report: Report = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"), "version": __version__, "commit": commit(),
        "backend": request.choice, "small": request.small, "sections": {},
    }  # fmt: skip
    for name in request.only or SECTIONS:
        say(f"{name}: at most {SECTIONS[name][1]:.0f} s")
        start, rows = time.monotonic(), list[dict[str, Any]]()
        if request.here:
            end = run_here(name, request, rows.append)
        else:
            rows, end = run_apart(name, request)
        seconds = round(time.monotonic() - start, 1)
        report["sections"][name] = {"status": end, "seconds": seconds, "rows": rows}
        say(f"{name}: {end}, {len(rows)} rows in {seconds} s")
    return report


def commit() -> str:
    """The commit of this source tree; empty where git does not know."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def wrongs(report: Report) -> Iterator[str]:
    """What was not as it should be, in words."""
    for name, section in report["sections"].items():
        if section["status"] != OK and not section["status"].startswith("stopped"):
            yield f"{name}: {section['status']}"
        for row in section["rows"]:
            if row.get("ok") is False:
                yield f"{name}: {row['name']}: {'off by ' + format(row['share'], '.3g') if 'share' in row else 'wrong'}"
