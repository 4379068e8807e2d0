"""Do the tests say the same each time? Runs them again and again beside busy loops and prints a table of verdicts.

    python benchmarks/flakiness.py                                   # `make test` 20 times under two busy loops: hours
    python benchmarks/flakiness.py --runs 5 --ways usual,two-at-once
    python benchmarks/flakiness.py -- .venv/bin/python -m pytest -q tests/moe_cupy/test_threads.py

The runs take turns in how they are started: as usual, with standard input closed, with interrupts ignored (as in the
background of a shell), in a session without a terminal, and two at once. Exit code 1 if any run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)


def ignore_interrupts() -> None:
    """As a shell does for what it starts in its background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def close_input() -> None:
    """As ``<&-`` does."""
    os.close(0)


# How a run is started -> arguments of Popen, and how many runs begin together.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "usual": ({}, 1),
    "closed-input": ({"preexec_fn": close_input}, 1),
    "no-interrupts": ({"preexec_fn": ignore_interrupts}, 1),
    "no-terminal": ({"start_new_session": True, "stdin": subprocess.DEVNULL}, 1),
    "two-at-once": ({}, 2),
}


class Verdict(NamedTuple):
    """How one run ended."""

    way: str
    code: int
    last: str  # its last line
    failed: list[str]  # tests
    seconds: float


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Meanwhile, so many processes compute without a pause."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def verdicts(command: list[str], way: str) -> list[Verdict]:
    """Run ``command`` in one of the WAYS: a verdict for each of the runs that began together."""
    how, count = WAYS[way]
    begun = time.monotonic()
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT} | how
    runs = [subprocess.Popen(command, **how) for _ in range(count)]
    said = [run.communicate()[0] for run in runs]
    seconds = time.monotonic() - begun
    return [
        Verdict(way, run.returncode, (text.strip().splitlines() or [""])[-1], FAILED.findall(text), seconds)
        for run, text in zip(runs, said, strict=True)
    ]


def measure(command: list[str], ways: list[str], runs: int, say: Callable[[str], None]) -> list[Verdict]:
    """At least ``runs`` runs, the ways in turn; a row of the table as each ends."""
    found: list[Verdict] = []
    say("| run | how | exit code | minutes | last line | failed |\n|--:|---|--:|--:|---|---|")
    for way in itertools.cycle(ways):
        for one in verdicts(command, way):
            found.append(one)
            row = [len(found), way, one.code, f"{one.seconds / 60:.1f}", one.last, ", ".join(one.failed)]
            say(f"| {' | '.join(map(str, row))} |")
        if len(found) >= runs:
            return found
    return found


def main(words: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="how many at least (default: 20)")
    parser.add_argument("--busy", type=int, default=2, help="busy loops beside them (default: 2)")
    parser.add_argument("--ways", default=",".join(WAYS), help="how they are started, in turn (default: all of them)")
    parser.add_argument("command", nargs="*", help="what is run (default: sh scripts/test.sh)")
    given = parser.parse_args(words)
    ways = given.ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--ways: {unknown[0]!r} is none of {', '.join(WAYS)}")
    with busy_loops(given.busy):
        command = given.command or ["sh", "scripts/test.sh"]
        found = measure(command, ways, given.runs, lambda line: print(line, flush=True))
    bad = [one for one in found if one.code]
    beside = f"{given.busy} busy loop{'s' * (given.busy != 1)}"
    print(f"\n{len(found)} run{'s' * (len(found) != 1)} beside {beside}, {len(bad)} failed")
    for test, count in Counter(test for one in bad for test in one.failed).most_common():
        print(f"{count} of {len(found)}: {test}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
