"""``bench``: llama-bench's tests and columns, plus what the expert cache did."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from moe_cupy.engine import Engine
from moe_cupy.engine.stats import Stats
from moe_cupy.tools.machine import cpu_name
from moe_ref import __version__
from moe_ref.inspect import describe


@dataclass(frozen=True, slots=True)
class Result:
    """One test: samples in tokens per second, and the counters over all its repetitions."""

    test: str
    n_prompt: int
    n_gen: int
    samples_ns: tuple[int, ...]
    stats: Stats

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [1e9 * (self.n_prompt + self.n_gen) / ns for ns in self.samples_ns]


def _prompt(engine: Engine, tokens: np.ndarray) -> None:
    engine.reset()
    engine.prefill(tokens)


def _generate(engine: Engine, tokens: np.ndarray) -> None:
    engine.reset()
    for token in tokens:
        engine.decode(int(token))


def forced_tokens(engine: Engine, count: int, given: Sequence[int] | None) -> np.ndarray:
    """The tokens to feed: those given, or seeded random ones as llama-bench feeds."""
    if given is not None:
        if len(given) < count:
            raise ValueError(f"--tokens: {len(given)} ids, but the test needs {count}")
        return np.asarray(given[:count], np.int64)
    return np.random.default_rng(0).integers(0, engine.config.vocab_size, count)


def run_test(engine: Engine, n_prompt: int, n_gen: int, repeat: int, warmup: bool, given: Any) -> Result:
    """pp (prompt in one go) or tg (token by token from an empty context); tokenising and sampling not timed."""
    count = n_prompt or n_gen
    tokens = forced_tokens(engine, count, given)
    work: Callable[[Engine, np.ndarray], None] = _prompt if n_prompt else _generate
    if warmup:
        work(engine, tokens[: max(1, count // 4)])
    engine.reset_stats()
    samples = []
    for _ in range(repeat):
        start = time.perf_counter_ns()
        work(engine, tokens)
        samples.append(time.perf_counter_ns() - start)
    name = f"pp{n_prompt}" if n_prompt else f"tg{n_gen}"
    return Result(name, n_prompt, n_gen, tuple(samples), engine.stats)


def as_record(engine: Engine, result: Result, warm: bool) -> dict[str, Any]:
    """llama-bench's JSON fields and ours."""
    facts, o, ts = describe(engine.file), engine.options, result.samples_ts
    return {
        "build_commit": __version__,
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": "",
        "backends": engine.device.name,
        "model_filename": str(engine.file.path),
        "model_type": f"{facts['architecture']} {facts['parameters'] / 1e6:.0f}M",
        "model_size": facts["bytes"]["total"],
        "model_n_params": facts["parameters"],
        "n_batch": o.ubatch_size,
        "n_ubatch": o.ubatch_size,
        "n_threads": getattr(engine.device, "threads", 1),
        "type_k": o.cache_type_k,
        "type_v": o.cache_type_v,
        "n_gpu_layers": 0,
        "n_prompt": result.n_prompt,
        "n_gen": result.n_gen,
        "n_depth": 0,
        "test_time": datetime.now(UTC).isoformat(timespec="seconds"),
        "avg_ns": int(statistics.mean(result.samples_ns)),
        "stddev_ns": int(_deviation(result.samples_ns)),
        "avg_ts": statistics.mean(ts),
        "stddev_ts": _deviation(ts),
        "samples_ns": list(result.samples_ns),
        "samples_ts": ts,
        "warm": warm,
        "os": platform.platform(),
        "direct_io": engine.placement.how_read,
    } | engine_fields(result.stats)


def engine_fields(stats: Stats) -> dict[str, Any]:
    """Counters under the names of the JSON contract."""
    return stats.to_dict()


def _deviation(samples: Sequence[float]) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """llama-bench's table with cache columns; which columns are aligned how is Markdown's business."""
    head = ["model", "size", "params", "backend", "threads", "cache", "policy", "prefetch", "test", "t/s", "hit rate",
            "MiB/token", "stall ms/token"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] * len(head)) + "|"]
    for r in records:
        tokens = max(1, r["prompt_tokens"] + r["generated_tokens"])
        cells = [
            r["model_type"],
            f"{r['model_size'] / 2**20:.2f} MiB",
            f"{r['model_n_params'] / 1e6:.2f} M",
            r["backends"],
            str(r["n_threads"]),
            f"{r['cache_slots']} slots, {r['cache_bytes'] / 2**20:.0f} MiB",
            r["policy"],
            r["prefetch"],
            ("pp" if r["n_prompt"] else "tg") + str(r["n_prompt"] or r["n_gen"]),
            f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}",
            f"{r['hit_rate']:.3f}",
            f"{r['bytes_per_token'] / 2**20:.2f}",
            f"{r['stall_us'] / 1000 / tokens:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    state = "warm" if records and records[0]["warm"] else "cold"
    return "\n".join([*lines, "", f"{state} cache at the start of each test; {cpu_name()}, {os.cpu_count()} cores"])
