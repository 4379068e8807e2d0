"""The command line of gpu-check."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_ref.command import RequestError, check_writable
from moe_ref.console import note


def cmd_gpu_check(args: argparse.Namespace) -> int:
    """Test kernels, models, copies and speeds on this GPU in under eight minutes; write a JSON file and a page."""
    from moe_cupy.device import DeviceError, missing_for_cuda, open_device
    from moe_cupy.tools.gpu_check import page, runner
    from moe_cupy.tools.gpu_check.sections import SECTIONS

    if unknown := [name for name in args.only or () if name not in SECTIONS]:
        raise RequestError(f"--only {','.join(unknown)}: unknown; the sections are {', '.join(SECTIONS)}")
    request = runner.Request(args.backend, tuple(args.only or ()), args.small, args.few, args.here)
    if args.rows:
        runner.write_rows(request.only[0], request, Path(args.rows))
        return 0
    check_writable(Path(args.output).with_suffix(".json"))
    if args.backend == "cuda" and (reason := missing_for_cuda()):
        raise DeviceError(f"gpu-check: {reason}; --backend emulated --small tries the command itself on the CPU")
    open_device(args.backend)[0].close()  # says in one line what is missing
    report = runner.run_all(request, note)
    found = list(runner.wrongs(report))
    for path in page.write(report, Path(args.output)):
        note(f"wrote {path}")
    if args.write:
        page.write_between_marks(report, Path(args.write))
    print("\n".join(found) if found else "nothing was wrong")
    return 1 if found else 0


def add_gpu_check(command: Callable[..., argparse.ArgumentParser]) -> None:
    """``command`` makes the parser of a command."""
    parser: Any = command("gpu-check", cmd_gpu_check, engine=False)
    add = parser.add_argument
    add("--backend", choices=["cuda", "emulated"], default="cuda", help="where to run (default cuda)")
    add("-o", "--output", default="gpu-check", help="files to write, without .json and .md (default gpu-check)")
    add("--only", type=lambda text: text.split(","), help="these sections, separated by commas (default: all)")
    add("--write", metavar="PAGE", help="replace the kernels' table between the marks of this page")
    add("--few", action="store_true", help="kernels of a few formats only")
    add("--small", action="store_true", help="small sizes, for trying the command itself")
    add("--here", action="store_true", help="all in one process")
    add("--rows", help=argparse.SUPPRESS)  # one section, its rows to this file: what each section's process is given
