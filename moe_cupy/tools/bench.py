"""``bench``: llama-bench's tests and columns, plus what the expert cache did."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from moe_cupy.engine import Engine
from moe_cupy.engine.stats import Stats
from moe_cupy.plan.rules import CPU
from moe_cupy.tools.machine import cpu_name
from moe_ref import __version__
from moe_ref.command import RequestError, token_list
from moe_ref.inspect import describe

COUNTED = ("prompt_tokens", "prompt_seconds", "generated_tokens", "decoded_tokens", "decoded_seconds", "hits", "misses",
           "late", "evictions", "bytes_demand", "bytes_prefetch", "bytes_wasted", "stall_us", "host_hits",
           "host_misses", "cpu_experts", "cpu_misses", "warmup_seconds")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Test:
    """What is timed: a prompt in one go, then tokens one by one, after ``n_depth`` tokens that are not timed."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        """llama-bench's name: pp512, tg128, pp512+tg128, pp512 @ d4096."""
        parts = [f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n]
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def context(self) -> int:
        """Tokens that the context must hold."""
        return self.n_depth + self.n_prompt + self.n_gen


@dataclass(frozen=True, slots=True)
class Result:
    """One test: the time of each repetition, and the counters over all of them."""

    test: Test
    samples_ns: tuple[int, ...]
    stats: Stats

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [1e9 * (self.test.n_prompt + self.test.n_gen) / ns for ns in self.samples_ns]


def tests_of(prompts: Sequence[int], gens: Sequence[int], pairs: Sequence[Test], depths: Sequence[int]) -> list[Test]:
    """llama-bench's order: prompts, generations, pairs; each at all depths."""
    plain = [Test(n, 0) for n in prompts if n] + [Test(0, n) for n in gens if n]
    return [replace(test, n_depth=depth) for test in [*plain, *pairs] for depth in depths if test.context]


def given_tokens(text: str) -> list[int]:
    """Ids of --tokens: a file, or 1,2,3. Raises RequestError for neither."""
    named = text.removeprefix("@")
    if os.path.isfile(named) or text != named:
        return token_list("@" + named)
    if not text.replace(",", " ").strip().isdecimal() and "," not in text:
        raise RequestError(f"--tokens {text[:60]}: no such file, and no ids such as 1,2,3")
    return token_list(text)


def forced_tokens(engine: Engine, count: int, given: Sequence[int] | None) -> np.ndarray:
    """The tokens to feed: those given, or seeded random ones as llama-bench feeds."""
    if given is not None:
        if len(given) < count:
            raise ValueError(f"--tokens: {len(given)} ids, but the test needs {count}")
        return np.asarray(given[:count], np.int64)
    return np.random.default_rng(0).integers(0, engine.config.vocab_size, count)


def run_test(engine: Engine, test: Test, repeat: int, warmup: bool, given: Any) -> Result:
    """Time ``repeat`` repetitions from an empty context; tokenising and sampling are not part of it.

    Without ``warmup`` each repetition finds no expert resident; otherwise it finds what the one before left.
    """
    tokens = forced_tokens(engine, test.context, given)
    if warmup:
        _repetition(engine, replace(test, n_prompt=-(-test.n_prompt // 4), n_gen=-(-test.n_gen // 4)), tokens)
    runs = []
    for _ in range(repeat):
        if not warmup:
            engine.empty_cache()
        runs.append(_repetition(engine, test, tokens))
    return Result(test, tuple(ns for ns, _ in runs), _sum([stats for _, stats in runs]))


def _repetition(engine: Engine, test: Test, tokens: np.ndarray) -> tuple[int, Stats]:
    """Nanoseconds and counters of one repetition, without those of the depth."""
    depth, prompt, gen = np.split(tokens[: test.context], [test.n_depth, test.n_depth + test.n_prompt])
    engine.reset()
    if len(depth):
        engine.prefill(depth)
    engine.reset_stats()
    start = time.perf_counter_ns()
    if len(prompt):
        engine.prefill(prompt)
    for token in gen:
        engine.decode(int(token))
    return time.perf_counter_ns() - start, engine.stats


def _sum(runs: Sequence[Stats]) -> Stats:
    return replace(runs[0], **{name: sum(getattr(stats, name) for stats in runs) for name in COUNTED})


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
        "n_threads": getattr(engine.split.devices.get(CPU, engine.device), "threads", 1),
        "type_k": o.cache_type_k,
        "type_v": o.cache_type_v,
        "kv_cache_bytes": engine.kv.nbytes,
        "n_gpu_layers": engine.split.n_gpu_layers,
        "n_cpu_moe": len(engine.placement.cpu.layers) if engine.placement.cpu else 0,
        "n_prompt": result.test.n_prompt,
        "n_gen": result.test.n_gen,
        "n_depth": result.test.n_depth,
        "test_time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
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
