"""Many replays: every policy x predictor x capacity on every trace, in parallel, as rows for JSON, tables, pictures."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_cupy.cache import POLICIES, Geometry, Policy
from moe_cupy.lab.belady import knowing
from moe_cupy.lab.machine import Machine, expert_size
from moe_cupy.lab.replay import make_caches, slots_of
from moe_cupy.lab.simulator import Outcome, simulate
from moe_cupy.lab.trace import RouteTrace, read_trace
from moe_cupy.prefetch import PREFETCHERS, NextGate, Prefetcher
from moe_cupy.prefetch.routes import ScoreDepth
from moe_ref.interrupts import undoing

ADMIT = "-admit"  # after a policy's name: newcomers need not stay
OFFLINE = ("static", "belady", "belady-admit")  # know more than a cache can
LIMITS = ("belady", "belady-admit")  # always in the results
ORACLE = "oracle"  # the predictor that is always right
ALL_POLICIES = (*POLICIES, "echo-admit", *OFFLINE)
ALL_PREFETCHERS = (*PREFETCHERS, ORACLE)
Policies = Mapping[str, Callable[[Geometry], Policy]]


@dataclass(frozen=True, slots=True)
class Job:
    """One replay."""

    routes: str
    policy: str
    prefetch: str
    capacity: float
    scope: str = "global"
    machine: Machine = field(default_factory=Machine)
    expert_bytes: int | None = None
    tokens: int | None = None  # replay the first ones only
    profile: str | None = None  # trace whose use counts the static set is chosen by


@lru_cache(maxsize=4)
def _trace(path: str, tokens: int | None) -> RouteTrace:
    trace = read_trace(path)
    return trace if tokens is None else trace.part(0, min(tokens, len(trace.experts)))


@lru_cache(maxsize=4)
def _knowing(path: str, tokens: int | None, profile: str | None) -> dict[str, Callable[[Geometry], Policy]]:
    return knowing(_trace(path, tokens), read_trace(profile) if profile else None)


def policy_of(job: Job, policies: Policies) -> Callable[[Geometry], Policy]:
    """What makes the job's policy. Raises ValueError, listing the names, for one that is unknown."""
    table = {**policies, **_knowing(job.routes, job.tokens, job.profile)}
    for name in (job.policy, job.policy.removesuffix(ADMIT)):
        if name in table:
            return table[name]
    raise ValueError(f"--policy {job.policy}: unknown; use all or some of {', '.join(ALL_POLICIES)}")


def predictor_of(job: Job, trace: RouteTrace, expert_bytes: int) -> tuple[Prefetcher, np.ndarray | None]:
    """The job's predictor, and what it may be told of the next layer's router."""
    if job.prefetch == ORACLE:
        return NextGate(), trace.experts
    if job.prefetch not in PREFETCHERS:
        raise ValueError(f"--prefetch {job.prefetch}: unknown; use all or some of {', '.join(ALL_PREFETCHERS)}")
    if job.prefetch == "score-depth":
        return ScoreDepth(job.machine.fetched_meanwhile(expert_bytes, trace.shape[2])), None
    return PREFETCHERS[job.prefetch](), trace.ahead


def run(job: Job, policies: Policies = POLICIES) -> dict[str, Any]:
    """One row of results; ``policies`` are the causal ones by name."""
    trace = _trace(job.routes, job.tokens)
    size = job.expert_bytes or expert_size(trace.meta, trace.n_experts).nbytes
    slots = slots_of(trace, job.capacity)
    caches = make_caches(trace, policy_of(job, policies), slots, job.scope, job.policy.endswith(ADMIT))
    predictor, early = predictor_of(job, trace, size)
    return row_of(job, slots, size, simulate(trace, caches, predictor, job.machine, size, early))


def row_of(job: Job, slots: int, size: int, out: Outcome) -> dict[str, Any]:
    """An outcome under the names of the JSON contract."""
    tokens = max(1, out.tokens)
    return {
        "routes": Path(job.routes).name,
        "policy": job.policy,
        "prefetch": job.prefetch,
        "capacity": job.capacity,
        "slots": slots,
        "hit_rate": out.hit_rate,
        "demand_bytes": out.misses * size,
        "prefetch_bytes": (out.prefetched - out.cancelled) * size,
        "wasted_bytes": (out.wasted - out.cancelled) * size,
        "late": out.late,
        "stall_ms_per_token": 1e3 * out.stall_s / tokens,
        "hits": out.hits,
        "misses": out.misses,
        "evictions": out.evictions,
        "collisions": out.collisions,
        "prefetched": out.prefetched,
        "wasted": out.wasted,
        "cancelled": out.cancelled,
        "precision": out.predicted_right / out.predicted if out.predicted else None,
        "recall": out.predicted_right / out.predictable if out.predictable else None,
        "tokens": out.tokens,
        "tok_s": out.tokens / out.total_s if out.total_s else None,
        "disk_reads": out.disk_reads,
        "expert_bytes": size,
        "scope": job.scope,
        "offline": job.policy in OFFLINE,
    }


def names(text: str, everything: Sequence[str]) -> list[str]:
    """``a,b`` or ``all`` -> names, each once."""
    return list(everything) if text == "all" else list(dict.fromkeys(word for word in text.split(",") if word))


def jobs(routes: Sequence[str], policy: str, prefetch: str, capacities: Sequence[float], **same: Any) -> list[Job]:
    """Every combination that the traces allow; Belady always, alone and with the oracle where it is asked for."""
    made = []
    for path in routes:
        predictors = names(prefetch, ALL_PREFETCHERS)
        if prefetch == "all" and _trace(path, same.get("tokens")).ahead is None:
            predictors.remove("next-gate")
        for capacity in capacities:
            chosen = names(policy, ALL_POLICIES)
            knowing_all = [f for f in predictors if f == ORACLE]
            wanted = [(p, f) for p in chosen for f in (["none", *knowing_all] if p in OFFLINE else predictors)]
            wanted += [(limit, f) for limit in LIMITS for f in ("none", *knowing_all)]
            made += [Job(path, p, f, capacity, **same) for p, f in dict.fromkeys(wanted)]
    return made


def assumed_sizes(routes: Sequence[str]) -> Iterator[str]:
    """A line for each trace: how many bytes an expert is taken to have, where --expert-bytes does not say it."""
    for path in routes:
        trace = _trace(path, None)
        size = expert_size(trace.meta, trace.n_experts)
        line = f"{Path(path).name}: {size.nbytes / 2**20:.2f} MiB an expert, {size.source}"
        yield line if size.is_known else f"warning: {line}: bytes and stalls follow from it; --expert-bytes N says it"


def run_all(
    todo: Sequence[Job], processes: int | None = None, policies: Policies = POLICIES
) -> Iterator[dict[str, Any]]:
    """Rows in the order of the jobs; unknown names and impossible capacities are told before anything long begins."""
    for job in todo:
        trace = _trace(job.routes, job.tokens)
        make_caches(trace, policy_of(job, policies), slots_of(trace, job.capacity), job.scope, False)
        predictor_of(job, trace, 1)
    processes = processes or os.cpu_count() or 1
    if processes == 1 or len(todo) < 4:
        yield from (run(job, policies) for job in todo)
        return
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process
    with ProcessPoolExecutor(processes, initializer=ignore) as pool, undoing(_end_workers):
        yield from pool.map(partial(run, policies=policies), todo)


def _end_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
