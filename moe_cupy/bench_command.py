"""``bench``: every test with every model, cache, policy, prefetcher and number of threads, in one table."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

from moe_cupy.engine_flags import add_engine
from moe_cupy.opening import open_engine
from moe_ref.command import RequestError, number
from moe_ref.console import note, print_json, with_progress

SWEPT = ("model", "cache", "policy", "prefetch", "threads")  # the last changes first


def cmd_bench(args: argparse.Namespace) -> None:
    """Measure tokens per second: llama-bench's tests and columns, and what the expert cache did.

    Lists, such as --cache 25%,50% or -m A.gguf,B.gguf, are measured in all combinations.
    """
    from moe_cupy.tools import bench, bench_output

    tests = bench.tests_of(args.n_prompt, args.n_gen, [bench.Test(*pair) for pair in args.pg], args.n_depth)
    if not tests or [0, 0] in args.pg:
        raise RequestError("nothing to measure: give -p N, -n N or -pg N,N above 0")
    args.ctx_size = args.ctx_size or max(test.context for test in tests)
    given = None if args.tokens is None else bench.given_tokens(args.tokens)
    records = []
    wanted = list(combinations(args))
    for each in with_progress(wanted, "combinations", len(wanted)):
        with open_engine(each) as engine:
            for test in tests:
                result = bench.run_test(engine, test, args.repetitions, args.warmup, given)
                records.append(bench.as_record(engine, result, args.warmup))
                note(f"{test.name}: {records[-1]['avg_ts']:.2f} tok/s")
                if args.output == "jsonl":
                    print_json(records[-1])
    if args.output != "jsonl":
        print(bench_output.FORMATS[args.output](records))


def combinations(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The flags of one engine each. Loading shows how far it is, prompts do not: they are timed."""
    lists = [getattr(args, name) or [None] for name in SWEPT]
    for values in itertools.product(*lists):
        yield argparse.Namespace(**vars(args) | dict(zip(SWEPT, values, strict=True)), progress=False)


def _counts(text: str) -> list[int]:
    return [number(0)(word) for word in text.split(",")]


def _pair(text: str) -> list[int]:
    pair = _counts(text)
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected a prompt and a generation length, such as 512,128")
    return pair


def add_bench(bench: argparse.ArgumentParser) -> None:
    """The flags of ``bench``."""
    add = bench.add_argument_group("tests").add_argument
    add("-p", "--n-prompt", type=_counts, default=[512], metavar="N,…", help="prompt tests, e.g. 128,512 (default 512)")
    add("-n", "--n-gen", type=_counts, default=[128], metavar="N,…", help="generation tests (default 128)")
    add("-pg", type=_pair, default=[], action="append", metavar="PP,TG", help="prompt, then generation")
    add("-d", "--n-depth", type=_counts, default=[0], metavar="N,…", help="tokens in the context before (default 0)")
    add("-r", "--repetitions", type=number(1, 10**6), default=5, metavar="N", help="repetitions of a test")
    add("--tokens", metavar="IDS", help="feed these ids: a file, or 1,2,3")
    add("--no-warmup", dest="warmup", action="store_false", help="cold: no expert resident at the start")
    add("-o", "--output", choices=["csv", "json", "jsonl", "md", "sql"], default="md", help="form of the results")
    add_engine(bench, "q8", threads=_counts, several=True)
