"""Ctrl-C at random moments of a command: exit code, time to the end, what was said, and whether the next run works.

``python benchmarks/interrupts.py [-n 200] [--which warm cold reference]``. *Cold* begins each time with an empty cache
of compiled kernels, *warm* with a full one; *reference* is ``moe_ref``. The moments are even from --first to the time
that a whole run takes. A moment counts as *early* if Python had not yet reached the package's first line: what
Python does then (a traceback, or death by the signal) no program can change.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "data" / "moe-40m-Q4_K_M.gguf")
RUN = ["moe_cupy", "run", MODEL, "-p", "Once", "-n", "64", "--cache", "25%"]
COMMANDS = {"warm": RUN, "cold": RUN, "reference": ["moe_ref", "generate", MODEL, "-p", "Once", "-n", "8"]}
BOUND = 1.0  # seconds from the signal to the end


class Ended(NamedTuple):
    """One process that was interrupted."""

    moment: float
    code: int
    seconds: float  # from the signal to the end
    errors: str
    next_code: int  # of a run after it, with the cache that it left

    def fault(self) -> str:
        """What is wrong with it, in a word; empty if nothing is."""
        if "Traceback" in self.errors or "Fatal Python error" in self.errors:
            return "early" if str(ROOT) not in self.errors and "moe_ref" not in self.errors else "traceback"
        if self.code != 130:
            return "early" if self.code == -signal.SIGINT and not self.errors else f"exit code {self.code}"
        return "next run failed" if self.next_code else "late" if self.seconds > BOUND else ""


def begin(which: str, cache: str) -> subprocess.Popen[str]:
    """The command as a shell starts it in the foreground."""
    env = os.environ | ({"NUMBA_CACHE_DIR": cache} if which != "reference" else {})
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *COMMANDS[which]], cwd=ROOT, env=env, **listen, **pipes)


def whole(which: str, cache: str) -> tuple[float, int]:
    """Seconds and exit code of a run that nobody interrupts."""
    start = time.monotonic()
    process = begin(which, cache)
    errors = process.communicate()[1]
    if process.returncode:
        print(errors, file=sys.stderr)
    return time.monotonic() - start, process.returncode


def interrupted(which: str, cache: str, moment: float, check_next: bool) -> Ended:
    """Interrupt one run after ``moment`` seconds; it may have ended by itself before."""
    process = begin(which, cache)
    time.sleep(moment)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    seconds = time.monotonic() - begun
    return Ended(moment, process.returncode, seconds, errors, whole(which, cache)[1] if check_next else 0)


def tried(which: str, args: argparse.Namespace) -> list[Ended]:
    """All moments of one kind; a run that had ended by itself is left out."""
    found, draw = [], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as warm:
        lasts = whole(which, warm)[0]
        if which != "cold":
            lasts = whole(which, warm)[0]
        moments = [args.first + (lasts - args.first) * (i + draw.random()) / args.number for i in range(args.number)]
        for i, moment in enumerate(moments):
            with tempfile.TemporaryDirectory() as empty:
                last = which != "cold" or i % args.next_every == 0
                found.append(interrupted(which, empty if which == "cold" else warm, moment, last))
            print(f"\r{which} {i + 1}/{len(moments)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [one for one in found if one.code or "interrupted" in one.errors]


def row(which: str, ended: list[Ended]) -> str:
    """One line of the table."""
    faults = Counter(one.fault() for one in ended)
    early, fine = faults.pop("early", 0), faults.pop("", 0)
    times = sorted(one.seconds for one in ended)
    wrong = ", ".join(f"{count} {name}" for name, count in faults.items()) or "none"
    return (f"| {which} | {len(ended)} | {fine} | {early} | {wrong} | {1e3 * times[len(times) // 2]:.0f} ms "
            f"| {1e3 * times[-1]:.0f} ms |")  # fmt: skip


def main() -> int:
    """Print the table, then what is wrong in full; exit code 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--number", type=int, default=200, help="moments of each kind (default 200)")
    parser.add_argument("--which", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--first", type=float, default=0.05, help="the first moment, in seconds (default 0.05)")
    parser.add_argument("--next-every", type=int, default=10, help="cold: run again after each N-th (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = {which: tried(which, args) for which in args.which}
    print("| command | interrupted | right | early | wrong | median to the end | longest |\n|" + " --- |" * 7)
    for which, ended in found.items():
        print(row(which, ended))
    wrong = [(which, one) for which, ended in found.items() for one in ended if one.fault() not in ("", "early")]
    for which, one in wrong:
        print(f"\n{which} at {one.moment:.3f} s: {one.fault()} ({one.seconds:.2f} s, code {one.code})\n{one.errors}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
