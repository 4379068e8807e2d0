"""compute-sanitizer, where it is installed, on the kernels' cases with a few formats."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from moe_cupy.tools.gpu_check.workbench import Workbench

TOOLS = ("memcheck", "racecheck")
SECONDS = 40.0  # for each tool
KEPT = 600  # characters of what it said


def sanitizer(bench: Workbench) -> Iterator[dict[str, Any]]:
    """Memory and race checks of the kernels section in a process of its own; says so where there is no such tool."""
    program = shutil.which("compute-sanitizer")
    if program is None or bench.choice != "cuda":
        why = f"it watches GPUs, not the {bench.choice} device" if program else "compute-sanitizer is not on PATH"
        yield {"name": "compute-sanitizer", "finding": f"not run: {why}"}
        return
    for tool in TOOLS:
        yield {"name": tool} | checked(program, tool, bench.choice)


def checked(program: str, tool: str, choice: str) -> dict[str, Any]:
    """Run one tool; ``ok`` is absent if its time was over before it was done."""
    inner = [sys.executable, "-m", "moe_cupy", "gpu-check", "--backend", choice, "--only", "kernels", "--few", "--here"]
    command = [program, "--tool", tool, "--error-exitcode", "9", *inner]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""
        return {"finding": f"stopped after {SECONDS:.0f} s: {str(said)[-KEPT:]}"}
    return {"finding": (done.stdout + done.stderr).strip()[-KEPT:], "ok": done.returncode == 0}
