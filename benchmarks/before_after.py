"""Two versions of this runtime on one model, in turn: is the second slower?

    git worktree add ../before COMMIT
    python benchmarks/before_after.py ../before . MODEL.gguf -t 1,2 -p 128,512 -n 48 --pairs 10

Each version is a process with the model open; they take turns of a second or so (A B B A A B …), so that what else the
machine does meets both alike. Printed is, for each test, the median of the pairs' ratios (before over after, above 1:
the second is faster) and the quartiles. MODEL is a route-replay model (`moe_cupy synth`): the ids 0, 1, 2, … are fed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


def serve(options: dict[str, Any]) -> None:
    """A version: reads "prompt N" or "decode N" line by line, answers with the seconds it took."""
    from moe_cupy.engine import Engine

    with Engine(options.pop("model"), **options) as engine:
        print("ready", flush=True)
        for line in sys.stdin:
            kind, count = line.split()
            engine.reset()
            tokens = list(range(int(count)))
            if kind == "decode":
                engine.prefill([0])
            start = time.perf_counter()
            if kind == "prompt":
                engine.prefill(tokens)
            else:
                for token in tokens:
                    engine.decode(token)
            print(time.perf_counter() - start, flush=True)


@dataclass(slots=True)
class Version:
    """A checkout with the model open in a process of its own."""

    process: subprocess.Popen

    @classmethod
    def of(cls, checkout: str, options: dict[str, Any]) -> Version:
        """Start it; waits until the model is open."""
        command = [sys.executable, str(HERE), "--serve", json.dumps(options)]
        place = str(Path(checkout).resolve())
        pipe = subprocess.PIPE
        environment = {"PYTHONPATH": place, "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=place, env=environment)
        version = cls(process)
        if version.answer() != "ready":
            raise SystemExit(f"{checkout}: did not start")
        return version

    def answer(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def seconds(self, test: str) -> float:
        """Run "prompt N" or "decode N" once."""
        assert self.process.stdin is not None
        self.process.stdin.write(test + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(before: Version, after: Version, test: str, pairs: int) -> list[float]:
    """Seconds of the first over those of the second, pair by pair; who begins alternates."""
    ratios = []
    for version in (before, after):
        version.seconds(test)
    for i in range(pairs):
        order = (before, after) if i % 2 == 0 else (after, before)
        times = {id(version): version.seconds(test) for version in order}
        ratios.append(times[id(before)] / times[id(after)])
    return ratios


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="checkout of the version before")
    parser.add_argument("after", help="checkout of the version after")
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("-t", "--threads", default="1,2")
    parser.add_argument("-p", "--n-prompt", default="128,512")
    parser.add_argument("-n", "--n-gen", default="48")
    parser.add_argument("--cache", default="100%")
    parser.add_argument("--act", default="q8")
    parser.add_argument("--pairs", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    """Print one row a test."""
    args = parse()
    tests = [f"prompt {n}" for n in args.n_prompt.split(",")] + [f"decode {n}" for n in args.n_gen.split(",")]
    print("| threads | test | before / after | quartiles |\n|---|---|---|---|", flush=True)
    for threads in map(int, args.threads.split(",")):
        model = str(Path(args.model).resolve())
        options = {"model": model, "cache": args.cache, "act": args.act, "threads": threads, "device": "host"}
        before, after = (Version.of(checkout, dict(options)) for checkout in (args.before, args.after))
        for test in tests:
            ratios = compare(before, after, test, args.pairs)
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"| {threads} | {test} | {middle:.4f} | {low:.4f} to {high:.4f} |", flush=True)
        before.close()
        after.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(json.loads(sys.argv[2]))
    else:
        main()
