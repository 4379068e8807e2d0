"""``doctor --write``: this machine as a profile for ``plan``, measured with the engine itself on made-up models.

Three runs, none of them on a model that anybody plans: a tiny model tells what a layer costs whatever its size, one
that is resident how fast matrices are read by the kernels, one with next to no cache how fast experts are read from
disk while the engine runs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_cupy.device.memory import free_and_total
from moe_cupy.lab.synth import Plan, synthesise
from moe_cupy.lab.trace import RouteTrace
from moe_cupy.plan.cost import waiting
from moe_cupy.plan.shapes import Model, from_file
from moe_cupy.plan.tables import table
from moe_ref.command import note, whole_file
from moe_ref.split import open_model

TOKENS, WARM = 96, 16  # decoded, and of these not timed
EXPERTS, USED = 32, 4
TINY = {"layers": 12, "hidden": 256, "ffn": 256}
LARGE = {"layers": 4, "hidden": 2048, "ffn": 768}


@dataclass(frozen=True, slots=True)
class Run:
    """One decoding run: seconds a token, experts missed a token, and the model's bytes read a token."""

    model: Model
    seconds: float
    misses: float

    @property
    def read(self) -> float:
        return sum(self.model.read_per_token(t) for t in self.model.tensors)


def made_up(path: Path, layers: int, hidden: int, ffn: int) -> None:
    """A model whose routers choose at random, the same each time."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((TOKENS, layers, EXPERTS)), axis=2)[:, :, :USED].astype(np.uint8)
    trace = RouteTrace(experts, EXPERTS, np.zeros(1, np.int64))
    with open(path, "wb") as out:
        synthesise(out, trace, Plan(TOKENS, layers, EXPERTS, USED, hidden, ffn, "Q4_K"), 0)


def decode(path: Path, cache: str) -> Run:
    """Decode all tokens with the engine's defaults."""
    from moe_cupy.engine import Engine

    with open_model(path) as file:
        model = from_file(file)
    with Engine(path, device="host", cache=cache) as engine:
        for token in range(WARM):
            engine.decode(token)
        engine.reset_stats()
        for token in range(WARM, TOKENS):
            engine.decode(token)
        stats = engine.stats
    return Run(model, stats.generated_seconds / stats.generated_tokens, stats.misses / stats.generated_tokens)


def measure(folder: str) -> dict[str, Any]:
    """Seconds a layer, and bytes/s of weights from memory and of experts from disk."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".moe-profile-") as scratch:
        tiny, large = Path(scratch) / "tiny.gguf", Path(scratch) / "large.gguf"
        made_up(tiny, **TINY)
        made_up(large, **LARGE)
        small = min((decode(tiny, "100%") for _ in range(3)), key=lambda run: run.seconds)
        resident = min((decode(large, "100%") for _ in range(3)), key=lambda run: run.seconds)
        missing = min((decode(large, f"slots:{2 * USED}") for _ in range(2)), key=lambda run: run.seconds)
    layers = resident.model.layers
    # Two equations for the seconds of a layer and of a byte, both resident:
    per_byte = (resident.seconds - small.seconds * layers / small.model.layers) / (
        resident.read - small.read * layers / small.model.layers
    )
    layer_s = (small.seconds - small.read * per_byte) / small.model.layers
    expert = missing.model.expert_bytes
    waited = missing.seconds - missing.model.layers * layer_s - missing.read * per_byte
    missed = missing.misses / (missing.model.layers * USED)
    read_s = solve(lambda read: missing.model.layers * waiting(missed, USED, read, expert * per_byte), waited)
    rates = {"weights_gbps": 1e-9 / per_byte, "experts_from_disk_gbps": 1e-9 * expert / read_s}
    return {"layer_us": 1e6 * layer_s, **rates}


def solve(rising: Callable[[float], float], target: float) -> float:
    """x > 0 with rising(x) = target, by halving."""
    low, high = 1e-7, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high


def profile_text(measured: dict[str, Any]) -> str:
    """The profile as TOML, as ``plan --hardware`` reads it."""
    memory = free_and_total()[1] / 1e9
    rows = [
        "# Measured by `python -m moe_cupy doctor --write`; see docs/planner.md.",
        'what = "this machine, measured"',
        f"ram_gb = {memory:.1f}",
        f"ram_bandwidth = {measured['weights_gbps'] / efficiency('cpu', 'bandwidth_efficiency'):.2f} # see measured",
        f"cores = {os.cpu_count() or 1}",
        f"disk_read = {measured['experts_from_disk_gbps'] / efficiency('disk', 'efficiency'):.3f}",
        "",
        "[measured] # by this runtime's host device, Q4_K",
        *(f"{name} = {value:.4g}" for name, value in measured.items()),
    ]
    return "\n".join(rows) + "\n"


def efficiency(part: str, name: str) -> float:
    """What the planner takes of a rate: the profile states rates such that this share of them is what was measured."""
    return float(table("engines")[part][name])


def write_profile(path: str, folder: str) -> None:
    """Measure and write; some ten seconds and 400 MB of ``folder`` while it runs."""
    note("measuring with made-up models (some ten seconds)…")
    text = profile_text(measure(folder))
    with whole_file(path) as out:
        out.write(text.encode())
    note(f"{path}: profile of this machine; use it with `plan --hardware {path}`")
