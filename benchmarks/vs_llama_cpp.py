"""This runtime against llama.cpp: the same file, threads and tokens, in turn (A B A B).

    python benchmarks/vs_llama_cpp.py MODEL.gguf -t 2 -p 128,512 -n 128              # all in memory
    python benchmarks/vs_llama_cpp.py MODEL.gguf -t 2 -n 128 --memory-limit 25%      # beyond it, cold (as root)

MODEL is a route-replay model (`moe_cupy synth`): both engines are fed the ids 0, 1, 2, … and take the recorded routes.
llama.cpp is built from llama-cpp-python's sources on PyPI into a cache folder, or taken from --build and --source.
Settings of llama.cpp, of which --llama lists those to compare with:

    installed   as it comes: it maps the file and repacks weights for speed
    plain       without repacking (with it, it is killed for memory under a limit)
    best        in memory as installed; under a limit plain, on an ext4 image behind a loop device with direct I/O and
                128 KiB of read-ahead, instead of whatever the disk has

OpenMP threads wait actively or passively, whichever is faster in a trial before. In memory a run goes through all tests
once untimed, then times them. Under a limit it is one pass in a control group of that size, the page cache dropped
before it, with the cache that the limit leaves. Results can be gathered over several calls in --results FILE; the table
is made of all that is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import limits
from benchmarks.llama_cpp_build import LlamaCpp, driver, from_pypi
from moe_cupy.tools.machine import cpu_name
from moe_ref.inspect import describe
from moe_ref.split import open_model

HERE = Path(__file__).resolve().parent
BEST_READ_AHEAD = 128 << 10
BESIDE_CACHE = 200 << 20  # what the interpreter, its libraries and the engine may take beside the model's memory
KV_BYTES = {"f32": 4, "f16": 2, "q8_0": 34 / 32}  # of a number
MMAP, CHOOSES = 1, -1  # load modes of llama.cpp
Record = dict[str, Any]


@dataclass(slots=True)
class Bench:
    """What all runs have in common."""

    args: argparse.Namespace
    program: Path
    limit: int  # bytes; 0: none
    group: limits.MemoryGroup | None
    best_copy: Path  # of the model, where llama.cpp reads it best
    cache: str
    waits: dict[str, str] = field(default_factory=dict)  # setting -> OMP_WAIT_POLICY

    def ours(self) -> Record:
        """One run of this runtime."""
        a = self.args
        command = [sys.executable, HERE / "forced_decode.py", "-m", a.model, "-t", a.threads, "-p", a.prompts,
                   "-n", a.n_gen, "-r", a.repeat, "--cache", self.cache, *a.ours.split()]  # fmt: skip
        return self._run(command + (["--cold"] if self.limit else []), {"OPENBLAS_NUM_THREADS": "1"}, a.model)

    def theirs(self, setting: str, wait: str | None = None) -> Record:
        """One run of llama.cpp; ``setting`` is explained above."""
        a = self.args
        best = setting == "best" and self.limit
        model = self.best_copy if best else a.model
        repack = 0 if setting == "plain" or best else 1
        command = [self.program, model, a.threads, MMAP if self.limit else CHOOSES, repack, a.prompts, a.n_gen,
                   a.repeat, 0 if self.limit else 1, a.max_seconds]  # fmt: skip
        return self._run(command, {"OMP_WAIT_POLICY": wait or self.waits.get(setting, "active")}, model)

    def choose_wait(self, setting: str) -> None:
        """Try both ways for OpenMP's threads to wait."""
        test = tests(self.args)[-1]
        tried = {wait: speed(self.theirs(setting, wait), test) for wait in ("active", "passive")}
        self.waits[setting] = max(tried, key=lambda wait: tried[wait])
        told = ", ".join(f"{wait} {rate:.2f}" for wait, rate in tried.items())
        print(f"llama.cpp {setting}: OpenMP waits: {told} tok/s; {self.waits[setting]} it is", file=sys.stderr)

    def _run(self, command: list[Any], env: dict[str, str], model: Path) -> Record:
        if self.limit:
            limits.drop_page_cache(model)
        if self.group:
            self.group.begin()
        start = time.monotonic()
        outcome = limits.run(command, self.group, env, self.args.timeout)
        record: Record = {"code": outcome.code, "peak_rss": outcome.peak_rss}
        if self.group:
            record["peak_group"] = self.group.peak()
        if outcome.code:
            return record | {"error": outcome.err.strip().splitlines()[-1:] or ["killed"]}
        answer = json.loads(outcome.out.splitlines()[-1])
        return record | answer | {"first_token_s": answer["first_token_at"] - start}


def speed(record: Record, test: str) -> float:
    """Of one test, in tokens per second; 0 for a run that failed."""
    return statistics.median(record.get(test) or [0.0])


def tests(args: argparse.Namespace) -> list[str]:
    """llama-bench's names of what is measured; decode is last."""
    return [f"pp{n}" for n in args.n_prompt if n] + ([f"tg{args.n_gen}"] if args.n_gen else [])


def memory_limit(text: str, size: int) -> int:
    """Bytes of ``25%`` of ``size``, or of a plain number."""
    return int(float(text[:-1]) / 100 * size) if text.endswith("%") else int(text)


def cache_for(limit: int, args: argparse.Namespace) -> str:
    """What a limit leaves for experts: less the dense part, keys and values, and what surrounds them."""
    if not limit:
        return "100%"
    with open_model(args.model) as file:
        sizes = describe(file)["bytes"]
        arch = file.metadata["general.architecture"]
        layers, groups, k, v = (
            file.metadata[f"{arch}.{key}"]
            for key in ("block_count", "attention.head_count_kv", "attention.key_length", "attention.value_length")
        )
    size_k, size_v = (KV_BYTES[_flag(args.ours, flag, "f32")] for flag in ("-ctk", "-ctv"))
    kv = layers * groups * (size_k * k + size_v * v) * max(512, args.n_gen)
    return str(int(limit - (sizes["total"] - sizes["routed"]) - kv - BESIDE_CACHE))


def _flag(words: str, name: str, default: str) -> str:
    """What follows ``name`` among ``words``."""
    given = words.split()
    return given[given.index(name) + 1] if name in given else default


@contextlib.contextmanager
def opened(args: argparse.Namespace) -> Iterator[Bench]:
    """The programs, the limit and the disks that the arguments ask for."""
    llama = LlamaCpp(args.source, args.build) if args.build else from_pypi()
    program = driver(llama)
    limit = memory_limit(args.memory_limit, args.model.stat().st_size) if args.memory_limit else 0
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(contextlib.closing(limits.MemoryGroup(limit))) if limit else None
        copy = args.model
        if limit and "best" in args.llama:
            copy = stack.enter_context(limits.on_disk_with_read_ahead(args.model, BEST_READ_AHEAD))
        yield Bench(args, program, limit, group, copy, args.cache or cache_for(limit, args))


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """Pairs of runs, as they are done; a pair has one record a test."""
    with opened(args) as bench:
        for setting in args.llama if args.threads > 1 else ():
            if args.wait:
                bench.waits[setting] = args.wait
            else:
                bench.choose_wait(setting)
        for pair in range(args.pairs):
            for setting in args.llama:
                both = {"ours": bench.ours(), "theirs": bench.theirs(setting)}
                for test in tests(args):
                    yield {
                        "test": test, "llama": setting, "threads": args.threads, "limit": args.memory_limit or "",
                        "pair": pair, "model": args.model.name, "cpu": cpu_name(), "flags": args.ours,
                        "read_ahead": limits.read_ahead_bytes(args.model), "cache": bench.cache,
                        "wait": bench.waits.get(setting, ""), **both,
                    }  # fmt: skip


def table(records: list[Record]) -> str:
    """Medians and ratios of each combination, in Markdown."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for r in records:
        groups[tuple(r[key] for key in ("model", "limit", "threads", "flags", "test", "llama"))].append(r)
    lines = [
        "| memory | threads | test | ours, tok/s | llama.cpp | its tok/s | ratio (least–most) | pairs | "
        "peak RSS, MiB: ours, its | first token, s: ours, its |",
        "|" + " --- |" * 10,
    ]
    for (_, limit, threads, flags, test, llama), rows in groups.items():
        ours, theirs = ([speed(r[who], test) for r in rows] for who in ("ours", "theirs"))
        failed = [r["theirs"]["code"] for r in rows if r["theirs"]["code"]]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"
        cells = [
            limit or "all", threads, test + (f" {flags}" if flags else ""), f"{statistics.median(ours):.2f}", llama,
            f"killed ({failed[0]})" if len(failed) == len(rows) else f"{statistics.median(theirs):.2f}",
            ratio, len(rows), ", ".join(_peak(rows, who) for who in ("ours", "theirs")),
            ", ".join(_first(rows, who) for who in ("ours", "theirs")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _peak(rows: list[Record], who: str) -> str:
    return f"{max(r[who]['peak_rss'] for r in rows) / 2**20:.0f}"


def _first(rows: list[Record], who: str) -> str:
    times = [r[who]["first_token_s"] for r in rows if r[who].get("first_token_at")]
    return f"{statistics.median(times):.2f}" if times else "–"


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path)
    add("-t", "--threads", type=int, default=1)
    add("-p", "--n-prompt", type=_counts, default=[])
    add("-n", "--n-gen", type=int, default=0)
    add("-r", "--repeat", type=int, default=1, help="samples in a run; its median counts (default 1)")
    add("--pairs", type=int, default=5)
    add("--memory-limit", help="25%% of the file, or bytes")
    add("--llama", type=lambda text: text.split(","), default=["best"], help="installed, plain, best (default)")
    add("--wait", choices=("active", "passive"), help="OpenMP's way to wait with several threads (default: try both)")
    add("--ours", default="", help="more flags for this runtime, such as '--prefetch echo --store S'")
    add("--cache", default="", help="expert memory (default: all, or what the limit leaves)")
    add("--build", type=Path, help="folder of an existing libllama.so")
    add("--source", type=Path, help="its sources, with include/llama.h")
    add("--timeout", type=float, default=600, help="seconds after which a run is killed (default 600)")
    add("--max-seconds", type=float, default=60, help="llama.cpp stops generating after this (default 60)")
    add("--results", type=Path, help="append pairs to this file, one JSON object a line")
    args = parser.parse_args()
    args.prompts = ",".join(map(str, args.n_prompt or [0]))
    if bool(args.build) != bool(args.source):
        parser.error("--build and --source go together")
    if not tests(args):
        parser.error("nothing to measure: give -p N or -n N")
    if args.memory_limit and len(tests(args)) > 1:
        parser.error("under a limit a run is one cold pass: give one -p, or -n")
    return args


def main() -> None:
    """Measure, keep, print."""
    args = parse()
    records = []
    if args.results and args.results.exists():
        records = [json.loads(line) for line in args.results.read_text().splitlines()]
    for record in measure(args):
        records.append(record)
        ours, theirs = record["ours"], record["theirs"]
        test = record["test"]
        print(
            f"{test} pair {record['pair']}: ours {speed(ours, test):.2f}, llama.cpp {record['llama']} "
            f"{speed(theirs, test):.2f} tok/s",
            ours.get("error", ""),
            theirs.get("error", ""),
            file=sys.stderr,
        )
        if args.results:
            with open(args.results, "a") as file:
                file.write(json.dumps(record) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
