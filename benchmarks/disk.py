"""What the disk gives to direct reads, by size and depth, and how much of that the engine gets while it decodes.

    python benchmarks/disk.py MODEL.gguf [-n TOKENS] [--sweep] [engine flags]

The engine decodes the ids 0, 1, 2, … from a cold start; each of its reads is noted. Its rate is bytes over the time in
which at least one read was under way. The disk's rate is that of threads that do nothing but read pieces of the same
size at random places of the same file, as many as the engine had under way on average, rounded up; measured in slices
before, after and between passes of the engine, since a shared disk is not the same from minute to minute.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_cupy.cli import add_engine
from moe_cupy.engine import Engine, Options
from moe_cupy.store.experts import piece_bytes

SIZES = tuple(1 << i for i in range(16, 23))  # 64 KiB to 4 MiB
DEPTHS = (1, 2, 4, 8, 16)
Span = tuple[float, float, int]  # begin, end, bytes


def raw_rate(path: Path, size: int, depth: int, seconds: float) -> float:
    """Bytes a second that ``depth`` threads get from O_DIRECT reads of ``size`` bytes at random places."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    places, done = os.fstat(fd).st_size // size - 1, [0] * depth
    begin = time.perf_counter()

    def reader(index: int) -> None:
        where = random.Random(time.time_ns() + index)
        with mmap.mmap(-1, size) as memory:
            while time.perf_counter() < begin + seconds:
                done[index] += os.preadv(fd, [memory], where.randrange(places) * size)

    threads = [threading.Thread(target=reader, args=(i,)) for i in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    return sum(done) / (time.perf_counter() - begin)


def noted_reads(engine: Engine) -> list[Span]:
    """A list that every read of the engine's from now on is added to."""
    spans: list[Span] = []

    def noting(read: Any) -> Any:
        def read_into(memory: Any, offset: int, nbytes: int) -> int:
            begin = time.perf_counter()
            skip = read(memory, offset, nbytes)
            spans.append((begin, time.perf_counter(), nbytes))
            return skip

        return read_into

    for file in engine.mover.store.files:
        file.read_into = noting(file.read_into)  # type: ignore[method-assign]
    return spans


def busy_seconds(spans: list[Span]) -> float:
    """Time in which at least one read was under way."""
    total, until = 0.0, float("-inf")
    for begin, end, _ in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def sweep(path: Path) -> None:
    """Print a table of rates by size and depth."""
    print("O_DIRECT reads, GB/s | " + " | ".join(f"depth {d}" for d in DEPTHS))
    for size in SIZES:
        rates = [raw_rate(path, size, depth, 0.7) / 1e9 for depth in DEPTHS]
        print(f"{size >> 10} KiB | " + " | ".join(f"{rate:.2f}" for rate in rates), flush=True)


def engine_pass(engine: Engine, spans: list[Span], tokens: int) -> dict[str, float]:
    """Decode from a cold start; what was read and how."""
    engine.empty_cache()
    engine.reset()
    spans.clear()
    begin = time.perf_counter()
    for token in range(tokens):
        engine.decode(token)
    seconds, stats = time.perf_counter() - begin, engine.stats
    busy, nbytes = busy_seconds(spans), sum(n for _, _, n in spans)
    wanted = stats.bytes_demand + stats.bytes_prefetch
    return {
        "tok_s": tokens / seconds, "rate": nbytes / busy, "depth": sum(e - b for b, e, _ in spans) / busy,
        "busy": busy / seconds, "bytes_per_token": nbytes / tokens, "read_more": nbytes / wanted,
        "hit_rate": stats.hit_rate, "stall": stats.stall_us * 1e-6 / seconds,
    }  # fmt: skip


def compare(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Passes of the engine between slices of plain reading."""
    with Engine(args.model, **options) as engine:
        store = engine.mover.store
        path, spans = store.files[0].path, noted_reads(engine)
        engine_pass(engine, spans, 4)  # compile, and learn size and depth
        size = piece_bytes(max(n for _, _, n in spans))
        rows, raw, depth = [], [], 2
        for _ in range(args.passes):
            raw.append(raw_rate(path, size, depth, 2.0))
            rows.append(engine_pass(engine, spans, args.n_gen))
            depth = max(1, -(-int(100 * rows[-1]["depth"]) // 100))
            raw.append(raw_rate(path, size, depth, 2.0))
    disk = statistics.median(raw)
    ratios = [2 * row["rate"] / (raw[2 * i] + raw[2 * i + 1]) for i, row in enumerate(rows)]
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(f"{store.how}; {args.passes} passes of {args.n_gen} tokens, cold, cache {options['cache']}")
    print(
        f"decode {medians['tok_s']:.2f} tok/s, hit rate {medians['hit_rate']:.3f}, "
        f"{medians['bytes_per_token'] / 1e6:.1f} MB a token ({medians['read_more']:.4f} of the experts' bytes)"
    )
    print(
        f"reads under way {medians['busy']:.0%} of the time, {medians['depth']:.2f} at once, of {size >> 10} KiB at "
        f"most; compute waits for them {medians['stall']:.0%} of the time"
    )
    print(
        f"the engine's reads {medians['rate'] / 1e9:.2f} GB/s; the disk at that size and depth {disk / 1e9:.2f} "
        f"GB/s; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    )


def main() -> None:
    """Print what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_engine(parser, "q8")
    parser.add_argument("-n", "--n-gen", type=int, default=48)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="also a table of sizes and depths")
    args = parser.parse_args()
    args.ctx_size = args.ctx_size or max(512, args.n_gen)
    if args.sweep:
        sweep(Path(args.store or args.model))
    compare(args, {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__})


if __name__ == "__main__":
    main()
