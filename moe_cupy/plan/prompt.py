"""Seconds a batch of a prompt takes, class by class: what is multiplied where, and what is copied for it.

A batch multiplies each matrix with many vectors at once, so a class of matrices takes the longer of two times:
operations over throughput, or bytes over bandwidth. Attention grows with what came before. An expert gets n k / E of
the n tokens, and kernels compute whole tiles of them. Weights in host memory cross the link once a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, prod

from moe_cupy.plan.cost import Term, bytes_over, kernel_count, share_text
from moe_cupy.plan.hardware import Machine
from moe_cupy.plan.hits import spread_of
from moe_cupy.plan.memory import Settings
from moe_cupy.plan.rules import CPU, GPU, Placement
from moe_cupy.plan.shapes import Model, Tensor
from moe_cupy.plan.tables import table

DENSE = ("dense", "shared")  # parts of which every token uses all


def prefill(model: Model, machine: Machine, placement: Placement, settings: Settings, threshold: int, depth: int = 0,
            on_disk: int = 0) -> list[Term]:  # fmt: skip
    """One batch of ``ubatch`` tokens of a prompt of ``depth`` tokens (at least that batch).

    From ``threshold`` tokens on weights in host memory are copied to the card, below it the CPU multiplies them.
    ``on_disk`` bytes of them are read from disk for each batch.
    """
    n, past = settings.ubatch, max(depth, settings.ubatch) / 2
    away = placement.on(CPU, (t for t in model.tensors if t.part != "embedding"))
    streamed = machine.gpu is not None and n >= threshold
    by_gpu = [*placement.on(GPU, model.tensors), *(away if streamed else ())]
    terms = []
    if machine.gpu is not None:
        terms += gpu_products(model, machine, placement, by_gpu, n, past)
    if streamed:
        terms += copies(model, machine, away, n, settings.pageable)
    else:
        terms += cpu_products(model, machine, placement, away, n, past)
    if on_disk:
        terms.append(bytes_over(f"from disk, once a batch of {n}", on_disk, machine.disk_practical))
    return terms


def gpu_products(
    model: Model, machine: Machine, placement: Placement, there: Sequence[Tensor], n: int, past: float
) -> list[Term]:
    """Products, attention and launches on the card; copied weights are among ``there``."""
    assert machine.gpu is not None
    e = table("engines")["gpu"]
    rate, bandwidth = machine.gpu.tensor * e["tensor_efficiency"], machine.gpu.bandwidth * e["bandwidth_efficiency"]
    terms = products(model, there, n, rate, bandwidth, e["tile"], "on the GPU")
    work = attention_operations(model, placement, n, past, GPU)
    if work:
        terms.append(_work_over(f"attention on the GPU over {past:.0f} tokens", work,
                                machine.gpu.tensor * e["attention_efficiency"]))  # fmt: skip
    kernels, layers = kernel_count(model, placement)
    if layers:
        terms.append(Term("kernels of a batch", kernels * e["kernel_us"] * 1e-6,
                          f"{kernels} kernels x {e['kernel_us']} us (in {layers} layers)"))  # fmt: skip
    return terms


def cpu_products(
    model: Model, machine: Machine, placement: Placement, there: Sequence[Tensor], n: int, past: float
) -> list[Term]:
    """The same by the CPU."""
    rate = machine.cores * table("engines")["cpu"]["gflops_per_core"] * 1e9
    terms = products(model, there, n, rate, machine.ram_practical, 1, "by the CPU")
    work = attention_operations(model, placement, n, past, CPU)
    return [*terms, _work_over(f"attention by the CPU over {past:.0f} tokens", work, rate)] if work else terms


def products(
    model: Model, there: Sequence[Tensor], n: int, rate: float, bandwidth: float, tile: int, where: str
) -> list[Term]:
    """Projections and shared networks, then routed experts: each the longer of its operations and its bytes."""
    dense = [t for t in there if t.part in DENSE and len(t.shape) > 1]
    routed = [t for t in there if t.part == "routed"]
    terms = []
    if dense:
        name = f"projections and shared networks {where}"
        terms.append(_longer(name, 2.0 * n * _numbers(dense), sum(t.nbytes for t in dense), rate, bandwidth))
    if routed:
        used = used_experts(model, n)
        rows = n * model.used_share / used  # tokens of an expert that is used
        padded = ceil(rows / tile) * tile * used
        read = used * sum(t.nbytes for t in routed)
        name = f"routed experts {where}, {rows:.3g} tokens each"
        name += f" in tiles of {tile}" if tile > 1 else ""
        terms.append(_longer(name, 2.0 * padded * _numbers(routed), read, rate, bandwidth))
    return terms


def copies(model: Model, machine: Machine, away: Sequence[Tensor], n: int, pageable: bool) -> list[Term]:
    """Host weights to the card, once a batch: of the experts those that some token uses."""
    link = machine.gpu.link_practical if machine.gpu else 0.0
    note = ""
    if pageable:
        link *= table("engines")["link"]["pageable"]
        note = ", out of memory-mapped pages"
    dense = sum(t.nbytes for t in away if t.part != "routed")
    routed = [t for t in away if t.part == "routed"]
    terms = []
    if dense:
        terms.append(bytes_over(f"dense host weights to the GPU, once a batch of {n}{note}", dense, link))
    if routed:
        used, layers = used_experts(model, n), len({t.layer for t in routed})
        name = f"host experts to the GPU, once a batch of {n}, {share_text(used)} of {layers} layers{note}"
        terms.append(bytes_over(name, used * sum(t.nbytes for t in routed), link))
    return terms


def used_experts(model: Model, n: int) -> float:
    """The share of a layer's experts that at least one of n tokens uses.

    Popularities differ: as a gamma distribution of shape c they leave (1 + n k / (E c))^-c of the experts unused.
    """
    c = spread_of(model)
    return float(1 - (1 + n * model.used_share / c) ** -c)


def attention_operations(model: Model, placement: Placement, n: int, past: float, device: str) -> float:
    """Multiplications and additions of scores and weighted values, and of a delta net's state, on one device."""
    widths = score_widths(model)
    total = 0.0
    for layer, kept in enumerate(model.pasts):
        if placement.pasts[layer] != device:
            continue
        if kept.mixer == "delta":
            total += 6.0 * n * kept.state_bytes / 4  # decay, read, write back of each number
            continue
        seen = min(past, kept.window) if kept.window else past
        total += 2.0 * n * seen * widths.get(layer, 0)
    return total


def score_widths(model: Model) -> dict[int, int]:
    """Layer -> numbers of all heads' keys and values that a query meets for each position."""
    found = {}
    for tensor in model.tensors:
        layer = tensor.layer
        if layer is None:
            continue
        if tensor.name.endswith("attn_output.weight") and model.pasts[layer].mixer == "gqa":
            found[layer] = 2 * tensor.shape[-1]
        elif tensor.name.endswith("attn_k_b.weight") and len(tensor.shape) == 3:
            found[layer] = tensor.shape[0] * (model.pasts[layer].keys + tensor.shape[1])
        elif tensor.name.endswith("attn_kv_b.weight"):  # of old files, which expand keys and values
            found[layer] = tensor.shape[0]
    return found


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(prod(t.shape) for t in tensors)


def _longer(name: str, operations: float, nbytes: float, rate: float, bandwidth: float) -> Term:
    work, read = _work_over(name, operations, rate), bytes_over(name, nbytes, bandwidth)
    return work if work.seconds >= read.seconds else read


def _work_over(name: str, operations: float, rate: float) -> Term:
    return Term(name, operations / rate, f"{operations / 1e12:.4g} T operations / {rate / 1e12:.4g} T/s")
