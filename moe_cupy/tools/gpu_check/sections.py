"""What gpu-check finds out: each section yields rows, findings by name. ``ok`` in a row says whether it is right."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_cupy.cache import POLICIES, BudgetError, ExpertCache, Geometry
from moe_cupy.cache.ranked import POWERS
from moe_cupy.cache.tabled import RULES
from moe_cupy.engine.echo_memory import first_parts
from moe_cupy.kernels.cuda import launches, sources
from moe_cupy.kernels.cuda.check import all_cases
from moe_cupy.kernels.cuda.launches import BY_KEY, STATE, Pointers, Residency
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.samples import normal
from moe_cupy.tools.gpu_check import speed
from moe_cupy.tools.gpu_check.sanitizer import sanitizer
from moe_cupy.tools.gpu_check.workbench import Workbench
from moe_ref.interrupts import undoing

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[3]
CASE_BLOCKS = (128, 256)
TOLERANCE = 1e-3  # times max(1, std of the logits), as for the reference against llama.cpp
EVENTS, POOL = 60, 9  # of the check of the pools on the device
GEOMETRY = Geometry(POOL, 3, 12)
WAYS = ("host", "device")  # who drives the decoding, in the route-replay section


def machine(bench: Workbench) -> Iterator[Row]:
    """What this is measured on."""
    from moe_cupy.tools.machine import facts_of_gpu

    yield {"name": "device", "finding": f"{bench.choice}: {bench.device.name}"}
    free, total = bench.device.memory()
    yield {"name": "device memory", "finding": f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free"}
    yield from ({"name": name, "finding": finding} for name, finding in facts_of_gpu())


def kernels(bench: Workbench) -> Iterator[Row]:
    """Every case of every kernel against its float64 reference: the error as a share of what is allowed."""
    yield from pool_rows(bench)
    for block in CASE_BLOCKS:
        for case in all_cases(block, bench.sizes.formats or sources.FORMATS):
            share = case.run(bench.run)
            names = sorted({one.kernel for one in case.launches})
            yield {"name": f"{case.label}, blocks of {block}", "kernels": names, "share": share, "ok": share <= 1}


def pool_rows(bench: Workbench) -> Iterator[Row]:
    """resolve, resolve_ahead and fill against the caches of moe_cupy/cache, event by event: slots, loads and bytes."""
    for name in (*RULES, "echo"):
        wrong, label = wrong_events(bench, name), f"{EVENTS} events of a pool of {POOL} under {name}"
        kind = "resolve_echo" if name == "echo" else "resolve"
        names = ["fill", kind, f"{kind}_ahead"]
        yield {"name": label, "kernels": names, "share": float(wrong), "ok": not wrong}


def empty_pool(policy: str) -> Residency:
    """A pool on the device as it begins."""
    by_key, state = np.zeros((36, len(BY_KEY)), np.int64), np.zeros(len(STATE), np.int64)
    by_key[:, 0], state[2] = -1, -1
    number, echo = (0, first_parts(GEOMETRY)) if policy == "echo" else (RULES[policy].number, None)
    return Residency(state, by_key, np.full(POOL, -1, np.int32), np.array(POWERS, np.int64), number, echo)


def wrong_events(bench: Workbench, policy: str) -> int:
    """How many of some events of 4 of 12 experts in 3 layers, with 4 fetched ahead, are not as the cache says."""
    rng, r = np.random.default_rng(7), empty_pool(policy)
    cache = ExpertCache(12, (0, 0, 0), (POOL,), POLICIES[policy])
    experts = [rng.integers(0, 256, 80, dtype=np.uint8) for _ in range(36)]
    held = [np.zeros(80, np.uint8) for _ in range(POOL)]
    wrong = 0
    for event in range(EVENTS):
        layer, (ids, guess) = event % 3, [rng.choice(12, 4, replace=False).astype(np.int32) for _ in range(2)]
        got, loads = np.zeros(4, np.int32), np.zeros(13, np.int32)
        bench.run(launches.resolve(got, loads, ids, r, layer, 12))
        bench.run(launches.fill(Pointers(held), Pointers(experts), loads, 80))
        plan = cache.access(layer, ids.tolist())
        where = dict(plan.hits) | {load.key: load.slot for load in plan.loads}
        keys = [12 * layer + int(e) for e in ids]
        right = got.tolist() == [where[key] for key in keys]
        right &= all(np.array_equal(held[s], experts[key]) for s, key in zip(got, keys, strict=True))
        if layer < 2:
            bench.run(launches.resolve_ahead(loads, guess, r, 12 * layer + 12, 4))
            bench.run(launches.fill(Pointers(held), Pointers(experts), loads, 80))
            ahead = cache.prefetch(layer + 1, guess.tolist(), set(keys))
            right &= loads[1 : 1 + loads[0]].tolist() == [load.key for load in ahead]
        wrong += not right
    return wrong


# ---------------------------------------------------------------------------------------------------------
# whole models


def model_files() -> list[tuple[Path, Path]]:
    """(model, its logits by llama.cpp) of the tiny models that come with the tests."""
    folder = ROOT / "tests" / "data" / "archs"
    pairs = [(path, path.with_name(path.name.split(".")[0] + ".npz")) for path in sorted(folder.glob("*.gguf"))]
    return [pair for pair in pairs if pair[1].exists()]


def fewest_slots(path: Path, **options: Any) -> Any:
    """An engine with as few slots as it accepts."""
    from moe_cupy import Engine

    try:
        return Engine(path, cache="slots:0", **options)
    except BudgetError as error:
        return Engine(path, cache=f"slots:{str(error).split('slots:')[2].split()[0]}", **options)


def models(bench: Workbench) -> Iterator[Row]:
    """Tiny models: logits against llama.cpp's, and the same bits with all experts resident as with the fewest."""
    from moe_cupy import Engine

    for path, golden in model_files()[: bench.sizes.models]:
        with np.load(golden) as arrays:
            tokens, want = arrays["tokens"], arrays["logits"]
        with Engine(path, device=bench.choice, cache="100%") as engine:
            full = engine.logits(tokens)
        with fewest_slots(path, device=bench.choice) as engine:
            small, evicted = engine.logits(tokens), engine.stats.evictions
        share = float(np.abs(full - want).max() / (TOLERANCE * max(1.0, float(want.std()))))
        top, same = bool(np.array_equal(full.argmax(1), want.argmax(1))), bool(np.array_equal(small, full))
        yield {
            "name": path.name.split(".")[0], "share": share, "top-1 equal": top, "same with fewest slots": same,
            "evictions": evicted, "ok": share <= 1 and top and same,
        }  # fmt: skip


def replay(bench: Workbench) -> Iterator[Row]:
    """Tokens per second of a route-replay model of 2 GB at several cache sizes, whoever drives the decoding."""
    from moe_cupy import Engine
    from moe_cupy.lab.synth import Plan, synthesise
    from moe_cupy.lab.trace import read_trace

    trace, sizes = read_trace(ROOT / "data" / "moe-40m-routes.npz"), bench.sizes
    tokens = min(trace.shape[0], sizes.hidden)
    plan = Plan(tokens, trace.shape[1], trace.n_experts, trace.shape[2], sizes.hidden, sizes.ffn, "Q4_K")
    folder = tempfile.TemporaryDirectory()
    with folder, undoing(folder.cleanup):
        path = Path(folder.name, "replay.gguf")
        with path.open("wb") as out:
            written = synthesise(out, trace, plan, 0)
        yield {"name": "model", "GB": written / 1e9}
        for way, share in itertools.product(WAYS, sizes.shares):
            how: Any = {"device": bench.choice, "cache": f"{share:.1%}", "ctx_size": sizes.tokens, "decode": way,
                        "act": "q8"}  # fmt: skip
            with Engine(path, **how) as engine:
                yield {"name": f"cache {share:.1%}, decoding driven by the {way}"} | decoded(engine, sizes.tokens)


def decoded(engine: Any, count: int) -> Row:
    """Decode the first ``count`` ids; the rate, the hits and the stalls of the second half."""
    half = count // 2
    for token in range(half):
        engine.decode(token)
    before, start = engine.stats.to_dict(), time.perf_counter()
    for token in range(half, count):
        engine.decode(token)
    seconds, after = time.perf_counter() - start, engine.stats.to_dict()
    hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
    row = {"tok/s": (count - half) / seconds, "hit rate": hits / max(1, hits + misses)}
    if after["decode"] == "host":  # copies inside a graph are not timed
        row["stall ms/token"] = (after["stall_us"] - before["stall_us"]) / 1e3 / (count - half)
    return row


# ---------------------------------------------------------------------------------------------------------
# copies beside work


def bandwidth(bench: Workbench) -> Iterator[Row]:
    """Copies: within device memory (bytes read plus written), and from host memory, pinned and pageable."""
    n, device = bench.sizes.copy_bytes, bench.device
    a, b, pinned, plain = device.alloc(n), device.alloc(n), device.pinned(n), np.zeros(n, np.uint8)
    pinned[...] = 1
    yield {"name": "device to device, read + write", "GB/s": 2 * bench.copy_gbps(b, a)}
    yield {"name": "pinned host to device", "GB/s": bench.copy_gbps(a, pinned)}
    yield {"name": "device to pinned host", "GB/s": bench.copy_gbps(pinned, a)}
    yield {"name": "pageable host to device", "GB/s": n / bench.seconds(lambda: device.upload(plain)) / 1e9}


def overlap(bench: Workbench) -> Iterator[Row]:
    """A synthetic schedule of misses: experts of one slab arrive in two slots in turn while kernels use the other.

    Ideal is what the longer of the two takes alone, and one step of the other. The work of a step is a number of
    launches that is chosen so that work takes about as long as the copy, half as long, and twice.
    """
    schedule = MissSchedule(bench)
    copy = schedule.milliseconds(copies=True, launches_each=0)
    one = schedule.milliseconds(copies=False, launches_each=4) / 4
    for factor in (0.5, 1.0, 2.0):
        each = max(1, round(factor * copy / max(one, 1e-9)))
        work = schedule.milliseconds(copies=False, launches_each=each)
        achieved = schedule.milliseconds(copies=True, launches_each=each)
        ideal = max(copy, work) + min(copy, work) / schedule.steps
        yield {
            "name": f"work {factor:g} x copy", "copies alone ms": copy, "work alone ms": work, "ideal ms": ideal,
            "achieved ms": achieved, "efficiency": ideal / achieved,
        }  # fmt: skip


class MissSchedule:
    """Steps of one copy and some launches each, on two streams that events order."""

    def __init__(self, bench: Workbench, steps: int = 16):
        self.bench, self.steps, n = bench, steps, bench.sizes.slab_bytes
        self.slots = [bench.device.alloc(n) for _ in range(2)]
        self.source = bench.device.pinned(n)
        self.source[...] = 0
        self.copies = bench.device.stream("copies")
        cols = 256
        self.x = bench.send(normal(np.random.default_rng(0), 1, cols))
        rows = n // (cols // 32 * 34)
        self.matrices = [Matrix("Q8_0", rows, cols, slot) for slot in self.slots]
        self.out = bench.unset(1, rows)

    def milliseconds(self, copies: bool, launches_each: int) -> float:
        """The whole schedule, best of three, after one that is not counted."""
        return 1e3 * min([self._once(copies, launches_each) for _ in range(4)][1:])

    def _once(self, copies: bool, launches_each: int) -> float:
        bench, used = self.bench, list[Any]([None, None])  # when the slots' last launches were over
        start = time.perf_counter()
        for step in range(self.steps):
            slot = step % 2
            if copies:
                if used[slot] is not None:
                    self.copies.wait(used[slot], "slot in use")
                bench.device.copy_async(self.slots[slot], self.source, self.copies)
                bench.stream.wait(self.copies.record(), "copy")
            for _ in range(launches_each):
                bench.device.run(launches.gemv(self.out, self.matrices[slot], self.x), bench.stream)
            used[slot] = bench.stream.record()
        bench.finish()
        self.copies.record().synchronize()
        return time.perf_counter() - start


Section = Callable[[Workbench], Iterator[Row]]
# In order, with the seconds that each may take; together below eight minutes, as a test says.
SECTIONS: dict[str, tuple[Section, float]] = {
    "machine": (machine, 20),
    "bandwidth": (bandwidth, 20),
    "kernels": (kernels, 100),
    "speed": (speed.speed, 50),
    "overlap": (overlap, 20),
    "models": (models, 60),
    "replay": (replay, 100),
    "sanitizer": (sanitizer, 90),
}
