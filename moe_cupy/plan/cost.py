"""Seconds a token takes, term by term, each with the arithmetic it came from.

A product of a matrix with one vector reads every byte of the matrix once, so decoding costs bytes over bandwidth, plus
what every layer costs whatever its size: kernels to launch, threads to meet, copies to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb

from moe_cupy.plan.hardware import Machine
from moe_cupy.plan.memory import SYSTEM_RAM, Settings, past_bytes
from moe_cupy.plan.rules import CPU, GPU, Placement
from moe_cupy.plan.shapes import Model, Tensor
from moe_cupy.plan.tables import table

THRESHOLD = 32  # tokens from which a batch over weights in host memory goes to the GPU (GGML_OP_OFFLOAD_MIN_BATCH)
NEVER = 10**9  # the threshold where no batch is large enough (--no-op-offload)


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a token's (or a batch's) time."""

    name: str
    seconds: float
    formula: str


def total(terms: Iterable[Term]) -> float:
    return sum(term.seconds for term in terms)


def offload_threshold(model: Model, engine: str, least: int = THRESHOLD) -> int:
    """Tokens of a batch from which host weights are copied to the GPU: llama.cpp asks the batch, ik_llama.cpp what an
    expert gets of it, 32 E / k."""
    if engine == "ik_llama.cpp" and model.experts:
        return -(-least * model.expert_count // model.expert_used_count)
    return least


# Decoding


def gpu_terms(model: Model, machine: Machine, placement: Placement, settings: Settings, depth: int) -> list[Term]:
    """What the card reads and launches for one token, routed experts included where they are there for good."""
    if machine.gpu is None:
        return []
    e = table("engines")["gpu"]
    there = placement.on(GPU, model.tensors)
    nbytes = sum(model.read_per_token(t) for t in there) + placement.tied_copy * model.tied_bytes
    rate = machine.gpu.bandwidth * e["bandwidth_efficiency"]
    past = _past(model, placement, settings, depth, GPU)
    kernels, layers = kernel_count(model, placement)
    return [
        bytes_over("weights on the GPU", nbytes, rate),
        bytes_over(f"KV on the GPU at {depth} tokens", past, rate),
        Term(
            "kernels",
            kernels * e["kernel_us"] * 1e-6,
            f"{kernels} kernels x {e['kernel_us']} us (in {layers} layers)",
        ),
    ]


def kernel_count(model: Model, placement: Placement) -> tuple[int, int]:
    """Kernels of all layers on the GPU, and the number of those layers."""
    kinds: dict[str, int] = table("engines")["gpu"]["kernels"]
    moe = set(model.moe_layers)
    layers = [i for i, at in enumerate(placement.homes) if at == GPU]
    return sum(kinds[model.pasts[i].mixer] + kinds["moe" if i in moe else "dense"] for i in layers), len(layers)


def cpu_terms(model: Model, machine: Machine, placement: Placement, settings: Settings, depth: int) -> list[Term]:
    """What the CPU reads and computes for one token under a fixed placement."""
    e = table("engines")["cpu"]
    there = placement.on(CPU, model.tensors)
    nbytes = sum(model.read_per_token(t) for t in there) + (not placement.tied_copy) * model.tied_bytes
    past = _past(model, placement, settings, depth, CPU)
    terms = [bytes_over("weights in host memory, by the CPU", nbytes, machine.ram_practical)]
    if past:
        terms.append(bytes_over(f"KV in host memory at {depth} tokens", past, machine.ram_practical))
    by_cpu = {t.layer for t in there if t.layer is not None}
    steps = len(by_cpu)
    terms.append(Term("threads meet", steps * e["step_us"] * 1e-6, f"{steps} layers x {e['step_us']} us"))
    handed = sum(1 for layer in by_cpu if placement.homes[layer] == GPU)
    handed += sum(h != p for h, p in zip(placement.homes, placement.pasts, strict=True))  # -nkvo: attention there too
    if handed:
        terms.append(
            Term("GPU to CPU and back", handed * e["split_us"] * 1e-6, f"{handed} layers x {e['split_us']} us")
        )
    return terms


def disk_term(model: Model, machine: Machine, there: Sequence[Tensor], hit: Callable[[float], float]) -> Term | None:
    """What a memory-mapped file reads from disk for one token, where host memory is too small; None where it is not."""
    routed = sum(t.nbytes for t in there if t.part == "routed")
    others = [t for t in there if t.part != "routed"]
    rest = sum(t.nbytes for t in others)
    room = machine.ram_bytes - SYSTEM_RAM - rest
    if room >= routed:
        return None
    share = max(0.0, room / routed) if routed else 0.0
    missed = 1 - hit(share)
    away = min(1.0, max(0, -room) / rest) if rest else 0.0  # of what every token needs
    read = missed * routed * model.used_share + away * sum(map(model.read_per_token, others))
    rate = machine.disk_read * table("engines")["disk"]["page_cache_efficiency"]
    name = f"from disk (host memory holds {share:.0%} of these experts, {missed:.0%} of a token's are missing)"
    return bytes_over(name, read, rate)


def static_decode(
    model: Model, machine: Machine, placement: Placement, settings: Settings, depth: int, hit: Callable[[float], float]
) -> list[Term]:
    """One token where every tensor stays where it is (llama.cpp)."""
    terms = gpu_terms(model, machine, placement, settings, depth)
    there = placement.on(CPU, model.tensors)
    terms += cpu_terms(model, machine, placement, settings, depth)
    disk = disk_term(model, machine, there, hit)
    return [*terms, disk] if disk else terms


@dataclass(frozen=True, slots=True)
class Cache:
    """An expert cache on the card: which share of all experts it holds, its hit rate, how misses get there."""

    share: float
    hit_rate: float
    way: str = "slabs"  # a table cache.* of engines.toml
    misses: str = "best"  # "load", "cpu", or the quicker of both


def cached_decode(
    model: Model, machine: Machine, placement: Placement, settings: Settings, depth: int, cache: Cache,
    hit: Callable[[float], float],
) -> list[Term]:  # fmt: skip
    """One token where the card holds the dense part and a cache of experts; ``placement`` has the experts in RAM."""
    assert machine.gpu is not None
    e = table("engines")
    terms = gpu_terms(model, machine, placement, settings, depth)
    active = sum(model.read_per_token(t) for t in model.tensors if t.part == "routed")
    rate = machine.gpu.bandwidth * e["gpu"]["bandwidth_efficiency"]
    terms.append(bytes_over(f"resident experts, {cache.hit_rate:.1%} of a token's", active * cache.hit_rate, rate))
    ways = {"load": _loaded, "cpu": _computed_by_cpu}
    chosen = ways if cache.misses == "best" else {cache.misses: ways[cache.misses]}
    options = [way(model, machine, active * (1 - cache.hit_rate), cache) for way in chosen.values()]
    terms += min(options, key=lambda option: total(option))
    disk = cache_disk_term(model, machine, cache, hit)
    return [*terms, disk] if disk else terms


def _loaded(model: Model, machine: Machine, missing: float, cache: Cache) -> list[Term]:
    assert machine.gpu is not None
    way = table("engines")["cache"][cache.way]
    link = machine.gpu.link_practical
    layers = len(model.moe_layers)
    copies = way["copies"] * missing / model.expert_bytes
    return [
        bytes_over("missing experts over PCIe", missing, link),
        Term("copies begin", copies * way["copy_us"] * 1e-6, f"{copies:.4g} copies x {way['copy_us']} us"),
        Term("decisions", layers * way["round_trip_us"] * 1e-6, f"{layers} layers x {way['round_trip_us']} us"),
    ]


def _computed_by_cpu(model: Model, machine: Machine, missing: float, cache: Cache) -> list[Term]:
    e = table("engines")["cpu"]
    way = table("engines")["cache"][cache.way]
    layers = len(model.moe_layers)
    missed = layers * (1 - cache.hit_rate**model.expert_used_count)  # layers of which at least one expert is missing
    each = e["step_us"] + e["split_us"]
    return [
        bytes_over("missing experts, by the CPU", missing, machine.ram_practical),
        Term("GPU to CPU and back", missed * each * 1e-6, f"{missed:.4g} layers with a miss x {each} us"),
        Term("decisions", layers * way["round_trip_us"] * 1e-6, f"{layers} layers x {way['round_trip_us']} us"),
    ]


def cache_disk_term(model: Model, machine: Machine, cache: Cache, hit: Callable[[float], float]) -> Term | None:
    """Misses that host memory does not have either; it keeps what was used last, the card's included."""
    room = machine.ram_bytes - SYSTEM_RAM
    if room >= model.routed_bytes:
        return None
    missed = min(1 - cache.hit_rate, 1 - hit(max(0.0, room / model.routed_bytes)))
    read = missed * model.routed_bytes * model.used_share
    return bytes_over(f"from disk, {missed:.0%} of a token's experts", read, machine.disk_practical)


def waiting(missed: float, used: int, read_s: float, compute_s: float) -> float:
    """Expected seconds that a layer waits for experts from disk: of its ``used`` experts each is missing with
    probability ``missed``, reads follow one another, and meanwhile all but the last expert are computed."""
    seconds = 0.0
    for m in range(1, used + 1):
        chance = comb(used, m) * missed**m * (1 - missed) ** (used - m)
        seconds += chance * max(0.0, m * read_s - (used - 1) * compute_s)
    return seconds


def stops(missed: float, used: int) -> float:
    """The chance that a layer misses at least one of its ``used`` experts, each with probability ``missed``."""
    return 1 - (1 - missed) ** used


def host_decode(model: Model, machine: Machine, hit_rate: float, threads: int | None = None, act: str = "q8",
                past: float = 0.0) -> list[Term]:  # fmt: skip
    """One token on this runtime's host device: weights in RAM, experts in a cache there or read from disk.

    From a profile that ``doctor --write`` measured, otherwise from the CPU's table. ``past``: bytes of the context.
    """
    host = host_rates(machine, act, threads or machine.cores)
    held = {t.type: 0.0 for t in model.tensors}
    for tensor in model.tensors:
        held[tensor.type] += model.read_per_token(tensor) + (tensor.part == "embedding") * model.tied_bytes
    terms = [
        bytes_over(f"{kind} weights, by the CPU", nbytes, host.of(kind)) for kind, nbytes in held.items() if nbytes
    ]
    if past:
        terms.append(bytes_over("KV, by the CPU", past, host.of("F32")))
    text = f"{model.layers} layers x {host.layer_us:.4g} us"
    terms.append(Term("layers", model.layers * host.layer_us * 1e-6, text))
    if model.experts and hit_rate < 1:
        stopped = len(model.moe_layers) * stops(1 - hit_rate, model.expert_used_count)
        if host.stop_us:
            text = f"{stopped:.4g} layers with a miss x {host.stop_us:.4g} us"
            terms.append(Term("stops in Python", stopped * host.stop_us * 1e-6, text))
        terms.append(disk_wait(model, machine, hit_rate, host))
    return terms


@dataclass(frozen=True, slots=True)
class HostRates:
    """What a host measured: microseconds of a layer, what it takes more where it stops, bytes/s of formats and disk."""

    layer_us: float
    stop_us: float
    rate: float  # of Q4_K, in the engine
    disk: float
    rows: Mapping[str, float]  # GB/s of the row kernels alone, by format

    def of(self, kind: str) -> float:
        """The engine's rate, for a format as much faster or slower as its row kernel is."""
        return self.rate * self.rows[kind] / self.rows["Q4_K"] if kind in self.rows else self.rate


def host_rates(machine: Machine, act: str, threads: int) -> HostRates:
    """Of the profile's measurements those with these threads, or the next fewer; of the table without a profile."""
    measured, e = machine.measured, table("engines")["cpu"]
    by_threads = measured.get(act, {})
    counts = sorted((int(name[1:]) for name in by_threads), key=lambda n: (n > threads, -n))
    found = by_threads[f"t{counts[0]}"] if counts else measured
    rate = 1e9 * found["weights_gbps"] if "weights_gbps" in found else machine.ram_practical
    disk = 1e9 * found["experts_from_disk_gbps"] if "experts_from_disk_gbps" in found else machine.disk_practical
    return HostRates(found.get("layer_us", e["step_us"]), found.get("stop_us", 0.0), rate, disk, found.get("rows", {}))


def disk_wait(model: Model, machine: Machine, hit_rate: float, host: HostRates) -> Term:
    layers, k, expert = len(model.moe_layers), model.expert_used_count, model.expert_bytes
    compute = expert / host.rate
    wait = waiting(1 - hit_rate, k, expert / host.disk, compute)
    text = (
        f"{layers} layers x {1e6 * wait:.4g} us, the mean of max(0, m x {size_text(expert, 4)} / {host.disk / 1e9:.4g} "
        f"GB/s - {k - 1} x {1e6 * compute:.4g} us), m of {k} missing, each with {1 - hit_rate:.3%}"
    )
    return Term("waiting for experts from disk", layers * wait, text)


def _past(model: Model, placement: Placement, settings: Settings, depth: int, device: str) -> float:
    pairs = zip(model.pasts, placement.pasts, strict=True)
    return sum(past_bytes(past, depth, settings, read=True) for past, at in pairs if at == device)


def bytes_over(name: str, nbytes: float, rate: float) -> Term:
    return Term(name, nbytes / rate, f"{size_text(nbytes, 4)} / {rate / 1e9:.4g} GB/s")


def size_text(nbytes: float, digits: int = 3) -> str:
    """2.5 GB, 310 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{digits}g} {unit}" if nbytes < 1000 * scale else f"{nbytes / scale:.0f} {unit}"
    return f"{nbytes:.0f} B"


def share_text(share: float) -> str:
    """11%, 0.2%, <0.1%."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.0%}" if share >= 0.01 or not share else f"{share:.1%}"
