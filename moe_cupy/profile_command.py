"""``doctor --write``: this machine as a profile for ``plan``, measured with the engine itself on made-up models.

For exact activations and for rounded ones, with one thread and with all: how fast the row kernels read each format out
of memory; then four runs of the engine, none of them on a model that anybody plans. A tiny model tells what a layer
costs whatever its size, one that is resident how fast the engine reads matrices, the same watched layer by layer what a
layer costs more that stops for a missing expert, one with next to no cache how fast experts are read from disk, with
several reads in flight, while the engine runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_cupy.device.host import HostDevice, usable_cores
from moe_cupy.device.memory import free_and_total
from moe_cupy.kernels.host import ops
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.samples import random_matrix
from moe_cupy.lab.synth import Plan, synthesise
from moe_cupy.lab.trace import RouteTrace
from moe_cupy.plan.cost import stops, waiting
from moe_cupy.plan.shapes import Model, from_file
from moe_cupy.plan.tables import PlanError, table
from moe_ref.command import check_writable, whole_file
from moe_ref.console import note, with_progress
from moe_ref.interrupts import undoing
from moe_ref.split import open_model

TOKENS, WARM = 64, 16  # decoded, and of these not timed
EXPERTS, USED = 16, 4
TINY = {"layers": 12, "hidden": 256, "ffn": 256}
LARGE = {"layers": 8, "hidden": 2048, "ffn": 768}  # 48 MB of dense weights, more than a cache keeps
ACTS = ("q8", "f32")
FORMATS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "IQ4_XS", "IQ3_XXS", "MXFP4", "F16", "F32")
TRIES = 3
STREAMED, COLUMNS = 64 << 20, 2048  # bytes of weights that a product reads, and its width


@dataclass(frozen=True, slots=True)
class Run:
    """One decoding run: seconds a token, experts missed a token, and the model's bytes read a token."""

    model: Model
    seconds: float
    misses: float

    @property
    def read(self) -> float:
        return sum(self.model.read_per_token(t) for t in self.model.tensors)


def row_rates(threads: int, act: str) -> dict[str, float]:
    """Format -> GB/s at which a product of rows with one vector reads weights out of memory; the best of three."""
    device = HostDevice(threads, act)
    split: Any = device.split
    rates = {}
    try:
        for kind in FORMATS:
            matrix = long_matrix(kind)
            x, y = np.ones((1, COLUMNS), np.float32), np.empty((1, matrix.rows), np.float32)
            times = []
            for _ in range(3):
                begun = time.perf_counter()
                ops.linear(split, x, matrix, y)
                times.append(time.perf_counter() - begun)
            rates[kind] = 1e-9 * matrix.data.nbytes / min(times[1:])
    finally:
        device.close()
    return rates


def long_matrix(kind: str) -> Matrix:
    """Random blocks, repeated to a size that no cache holds."""
    few = random_matrix(np.random.default_rng(0), kind, 256, COLUMNS)
    times = STREAMED // few.data.nbytes
    return Matrix(kind, 256 * times, COLUMNS, np.tile(few.data, times))


def made_up(path: Path, layers: int, hidden: int, ffn: int) -> None:
    """A model whose routers choose at random, the same each time."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((TOKENS, layers, EXPERTS)), axis=2)[:, :, :USED].astype(np.uint8)
    trace = RouteTrace(experts, EXPERTS, np.zeros(1, np.int64))
    with open(path, "wb") as out:
        synthesise(out, trace, Plan(TOKENS, layers, EXPERTS, USED, hidden, ffn, "Q4_K"), 0)


def decode(path: Path, cache: str, threads: int, act: str, watched: bool = False) -> Run:
    """Decode all tokens with the engine's defaults; ``watched``, it stops in each layer to tell the routes."""
    from moe_cupy.engine import Engine

    with open_model(path) as file:
        model = from_file(file)
    with Engine(path, device="host", cache=cache, threads=threads, act=act) as engine:
        for token in range(WARM):
            engine.decode(token)
        engine.reset_stats()
        engine.forward.observe = (lambda layer, routes: None) if watched else None
        for token in range(WARM, TOKENS):
            engine.decode(token)
        stats = engine.stats
    return Run(model, 1 / stats.decode_tok_s, stats.misses / stats.decoded_tokens)


def measure(folder: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Rounding of activations -> "tN" for N threads -> what was measured; see ``measure_with``."""
    counts = sorted({1, usable_cores()})
    scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".moe-profile-")
    with scratch, undoing(scratch.cleanup):
        tiny, large = Path(scratch.name) / "tiny.gguf", Path(scratch.name) / "large.gguf"
        made_up(tiny, **TINY)
        made_up(large, **LARGE)
        return {act: {f"t{n}": undisturbed(tiny, large, n, act) for n in counts} for act in ACTS}


def undisturbed(tiny: Path, large: Path, threads: int, act: str) -> dict[str, Any]:
    """``measure_with``, again where other work made the runs contradict each other. Raises PlanError if they go on."""
    for _ in range(TRIES):
        found = measure_with(tiny, large, threads, act)
        if found["layer_us"] > 0 and found["weights_gbps"] > 0:
            return found
    raise PlanError(f"--act {act} with {threads} threads: {found['layer_us']:.0f} us a layer and "
                    f"{found['weights_gbps']:.2f} GB/s of weights were measured, which cannot be: other work disturbs "
                    "this machine; let it end, and measure again")  # fmt: skip


def measure_with(tiny: Path, large: Path, threads: int, act: str) -> dict[str, Any]:
    """Seconds a layer, GB/s of weights from memory and of experts from disk, and of the row kernels by format."""
    kinds = (tiny, "100%", False), (large, "100%", False), (large, "100%", True), (large, f"slots:{2 * USED}", False)
    times = 3
    runs = (decode(path, cache, threads, act, watched) for path, cache, watched in kinds * times)
    done = list(with_progress(runs, f"--act {act} -t {threads}", len(kinds) * times))
    small, resident, watched, missing = (min(done[i :: len(kinds)], key=lambda run: run.seconds) for i in range(4))
    layers = resident.model.layers
    stop_s = max(0.0, (watched.seconds - resident.seconds) / layers)
    # Two equations for the seconds of a layer and of a byte, both resident:
    per_byte = (resident.seconds - small.seconds * layers / small.model.layers) / (
        resident.read - small.read * layers / small.model.layers
    )
    layer_s = (small.seconds - small.read * per_byte) / small.model.layers
    expert = missing.model.expert_bytes
    missed = missing.misses / (missing.model.layers * USED)
    waited = missing.seconds - layers * (layer_s + stops(missed, USED) * stop_s) - missing.read * per_byte
    read_s = solve(lambda read: missing.model.layers * waiting(missed, USED, read, expert * per_byte), waited)
    read_s = max(read_s, expert * per_byte * (USED - 1) / USED)  # quicker ones are never waited for, so not measured
    rates = {"weights_gbps": 1e-9 / per_byte, "experts_from_disk_gbps": 1e-9 * expert / read_s}
    return {"layer_us": 1e6 * layer_s, "stop_us": 1e6 * stop_s, **rates, "rows": row_rates(threads, act)}


def solve(rising: Callable[[float], float], target: float) -> float:
    """x > 0 with rising(x) = target, by halving."""
    low, high = 1e-7, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high


def profile_text(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The profile as TOML, as ``plan --hardware`` reads it."""
    memory = free_and_total()[1] / 1e9
    best = [one for by_threads in measured.values() for one in by_threads.values()]
    disk = max(one["experts_from_disk_gbps"] for one in best)
    rows = max(max(one["rows"].values()) for one in best)
    return "\n".join([
        "# Measured by `python -m moe_cupy doctor --write`; see docs/planner.md.",
        'what = "this machine, measured"',
        f"ram_gb = {memory:.1f}",
        f"ram_bandwidth = {rows / efficiency('cpu', 'bandwidth_efficiency'):.2f} # see measured",
        f"cores = {usable_cores()}",
        f"disk_read = {disk / efficiency('disk', 'efficiency'):.3f}",
        *measured_lines(measured),
    ]) + "\n"  # fmt: skip


def measured_lines(measured: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Tables measured.ACT.tN, and in each of them rows."""
    for act, by_threads in measured.items():
        for threads, found in by_threads.items():
            yield f"\n[measured.{act}.{threads}] # the engine, Q4_K"
            yield from (f"{name} = {value:.4g}" for name, value in found.items() if name != "rows")
            yield f"[measured.{act}.{threads}.rows] # the row kernels alone, GB/s"
            yield from (f"{name} = {value:.4g}" for name, value in found["rows"].items())


def efficiency(part: str, name: str) -> float:
    """What the planner takes of a rate: the profile states rates such that this share of them is what was measured."""
    return float(table("engines")[part][name])


def write_profile(path: str, folder: str) -> None:
    """Measure and write; about half a minute and 400 MB of ``folder`` while it runs."""
    check_writable(path)  # before minutes of measuring
    note("measuring with made-up models (half a minute; two on a busy machine)…")
    text = profile_text(measure(folder))
    with whole_file(path) as out:
        out.write(text.encode())
    note(f"{path}: profile of this machine; use it with `plan --hardware {path}`")
