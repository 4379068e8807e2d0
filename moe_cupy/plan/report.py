"""A plan as people and scripts read it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from moe_cupy.plan.advice import Advice
from moe_cupy.plan.cost import Term, offload_threshold, share_text, size_text
from moe_cupy.plan.emit import command, that_fits, without_cache
from moe_cupy.plan.explain import memory_formulas, term_lines, threshold_lines
from moe_cupy.plan.hardware import Machine
from moe_cupy.plan.planner import READ, WRITTEN, Plan
from moe_cupy.plan.rules import CPU
from moe_cupy.plan.shapes import Model, types_held
from moe_cupy.plan.tables import ENGINES, OWN

PLACES = {CPU: "RAM", "CUDA0": "VRAM"}


def as_json(plan: Plan, windows: bool = False) -> dict[str, Any]:
    """The JSON contract, and the terms behind its figures."""
    return {
        "model": plan.model.name, "quant": plan.model.quant, "hardware": plan.machine.name, "fits": not plan.too_full,
        "decode_tok_s": plan.decode_tok_s, "prefill_tok_s": plan.prefill_tok_s, "vram_bytes": plan.vram_bytes,
        "ram_bytes": plan.ram_bytes, "disk_bytes": plan.disk_bytes, "cache_slots": plan.cache_slots,
        "cache_bytes": plan.cache_bytes, "hit_rate": plan.hit_rate,
        "types": types_held(plan.model.tensors), "tensors": tensor_rows(plan),
        "commands": {engine: command(plan, engine, windows) for engine in ENGINES[:3]},
        "warnings": [*filter(None, [plan.too_full]), *plan.warnings], "turn_s": plan.turn_s,
        "ctx": plan.settings.ctx, "n_cpu_moe": plan.n_cpu_moe, "ngl": plan.ngl,
        "offload_threshold": offload_threshold(plan.model, plan.request.engine, plan.request.threshold),
        "terms": [term_row(term) for term in plan.terms], "prefill_terms": [term_row(t) for t in plan.prompt_terms],
    }  # fmt: skip


def no_plan(model: Model, machine: Machine, why: str) -> dict[str, Any]:
    """The same contract where nothing fits."""
    nothing = dict.fromkeys(("decode_tok_s", "prefill_tok_s", "hit_rate"), 0.0)
    empty = dict.fromkeys(("vram_bytes", "ram_bytes", "disk_bytes", "cache_slots"), 0)
    return {"model": model.name, "quant": model.quant, "hardware": machine.name, "fits": False, **nothing, **empty,
            "tensors": [], "commands": {}, "warnings": [why]}  # fmt: skip


def term_row(term: Term) -> dict[str, Any]:
    return {"name": term.name, "ms": 1e3 * term.seconds, "formula": term.formula}


def tensor_rows(plan: Plan) -> list[dict[str, Any]]:
    """Tensors of one kind in one place are one row; its pattern finds exactly these among the model's."""
    groups: dict[tuple[str, str], list] = {}
    for tensor in plan.model.tensors:
        stem = re.sub(r"^blk\.\d+\.", "", tensor.name)
        groups.setdefault((stem, plan.placement.device[tensor.name]), []).append(tensor)
    rows = []
    for (stem, device), tensors in groups.items():
        layers = sorted({t.layer for t in tensors if t.layer is not None})
        where = PLACES.get(device, device)
        if plan.cache_slots and tensors[0].part == "routed":
            where = "RAM, cached in VRAM"
        rows.append({"pattern": pattern_of(stem, layers, plan.model.layers), "where": where, "tensors": len(tensors),
                     "bytes": sum(t.nbytes for t in tensors)})  # fmt: skip
    return rows


def pattern_of(stem: str, layers: Sequence[int], count: int) -> str:
    """A regular expression for a tensor of some layers."""
    name = re.escape(stem)
    if not layers:
        return f"^{name}$"
    every = len(layers) == count
    return rf"^blk\.\d+\.{name}$" if every else rf"^blk\.({'|'.join(map(str, layers))})\.{name}$"


def machine_line(machine: Machine) -> str:
    gpu = machine.gpu
    card = (
        f"{gpu.name}, {round(gpu.vram_bytes / 2**30, 2):g} GiB at {gpu.bandwidth / 1e9:.0f} GB/s, PCIe {gpu.pcie} "
        f"({gpu.link_practical / 1e9:.0f} GB/s)" if gpu else "no GPU"
    )  # fmt: skip
    return (f"{machine.name}: {card}; {machine.ram_bytes / 1e9:.0f} GB RAM at {machine.ram_bandwidth / 1e9:.1f} GB/s "
            f"({machine.ram_kind}); disk {machine.disk_read / 1e9:.1f} GB/s")  # fmt: skip


def text(plan: Plan, advice: Sequence[Advice] = (), explain: bool = False, engines: Iterable[str] = ENGINES[1:3],
         windows: bool = False) -> str:  # fmt: skip
    """The plan as lines."""
    lines = [*what_lines(plan), "", *plan.steps, *memory_lines(plan), *(memory_formulas(plan) if explain else ()), ""]
    lines += [*speed_lines(plan, explain), "", *advice_lines(plan, advice)]
    if not plan.too_full:
        lines += [f"\n{OWN}:\n  {command(plan, OWN, windows)}"]
    if plan.cache_slots and plan.machine.gpu:
        still = without_cache(plan)
        lines += ["", f"without a cache, as the commands below: {still.decode_tok_s:.1f} tok/s predicted, prompts "
                      f"{still.prefill_tok_s:.1f}"]  # fmt: skip
    fits = that_fits(plan) if plan.too_full else plan
    if plan.too_full and fits:
        speeds = f"{fits.decode_tok_s:.1f} tok/s predicted, prompts {fits.prefill_tok_s:.1f}"
        lines += ["", f"a line that fits, at {speeds}:"]
    lines += [f"\n{engine}:\n  {command(fits, engine, windows)}" for engine in engines if fits]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def what_lines(plan: Plan) -> list[str]:
    """The model, its types, the machine."""
    m = plan.model
    experts = f", {m.expert_count} experts of {size_text(m.expert_bytes)}, {m.expert_used_count} used"
    size = f"{count_text(m.parameters)} parameters, {size_text(m.nbytes)}, {m.layers} layers"
    return [f"{m.name} {m.quant}: {size}{experts if m.experts else ''}", f"types: {mix_text(m)}",
            machine_line(plan.machine)]  # fmt: skip


def speed_lines(plan: Plan, explain: bool) -> list[str]:
    """Decoding, prompts, a turn, the hit rate; with ``explain`` the arithmetic of each."""
    batch, depth = plan.settings.ubatch, min(plan.request.depth, plan.settings.ctx)
    lines = [
        f"decode   {plan.decode_tok_s:8.1f} tok/s  predicted at {depth} tokens of context",
        *(term_lines(plan.terms, 1) if explain else ()),
        f"prompt   {plan.prefill_tok_s:8.1f} tok/s  predicted in batches of {batch}",
        *(term_lines(plan.prompt_terms, batch) if explain else ()),
        f"turn     {plan.turn_s:8.1f} s      {READ} tokens read and {WRITTEN} written: what placements are compared by",
    ]
    if explain:
        lines.append(f"    {READ} / {plan.prefill_tok_s:.4g} + {WRITTEN} / {plan.decode_tok_s:.4g} s")
    if plan.cache_slots:
        share = plan.cache_slots / plan.model.experts
        held = f"of a cache of {plan.cache_slots} experts ({share_text(share)})"
        lines.append(f"hit rate {plan.hit_rate:8.1%}         {plan.curve.formula(share) if explain else held}")
    return lines + (threshold_lines(plan) if plan.model.experts and explain else [])


def advice_lines(plan: Plan, advice: Sequence[Advice]) -> list[str]:
    if plan.too_full:
        return [f"does not fit: {plan.too_full}", "the speeds above are those of a card that had the room"]
    head = "what would help most:" if advice else "nothing that was tried helps by 2 %"
    return [head, *(f"  {a.gain:5.2f}x  {a.decode_tok_s:6.1f} tok/s  {a.change}" for a in advice)]


def mix_text(model: Model) -> str:
    """Q4_K 16.4 GB (88%), Q6_K 2.1 GB (11%), …: what the file is made of, not only its name."""
    held = types_held(model.tensors)
    return ", ".join(f"{kind} {size_text(n)} ({share_text(n / model.nbytes)})" for kind, n in held.items())


def count_text(number: int) -> str:
    """30.5 B, 40 M."""
    return f"{number / 1e9:.1f} B" if number >= 10**9 else f"{number / 1e6:.3g} M"


def memory_lines(plan: Plan) -> list[str]:
    lines = []
    if plan.use:
        u = plan.use
        lines.append(f"VRAM {plan.vram_bytes / 2**30:7.2f} GiB  weights {size_text(u.weights)}, KV of "
                     f"{plan.settings.ctx} tokens {size_text(u.past)} ({plan.settings.ctk}/{plan.settings.ctv}), "
                     f"buffers {size_text(u.compute)}, CUDA {size_text(u.fixed)}"
                     + (f", expert cache {size_text(plan.cache_bytes)}" if plan.cache_slots else ""))  # fmt: skip
    lines.append(f"RAM  {plan.ram_bytes / 2**30:7.2f} GiB")
    if plan.disk_bytes:
        lines.append(f"disk {plan.disk_bytes / 2**30:7.2f} GiB  of weights find no room in memory")
    return lines


def tensor_lines(plan: Plan) -> list[str]:
    """Every tensor, its bytes, place and the rule that put it there."""
    width = max(len(t.name) for t in plan.model.tensors)
    where = plan.placement
    return [f"{t.name:{width}}  {t.type:8} {t.nbytes:>14,}  {PLACES.get(where.device[t.name], where.device[t.name]):5} "
            f"{where.reason[t.name]}" for t in plan.model.tensors]  # fmt: skip
