"""Sentences for what cannot be done, each with the nearest that works, and for what is odd about a placement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moe_cupy.plan import fit as fitting
from moe_cupy.plan.cost import size_text
from moe_cupy.plan.hardware import GIB, Machine
from moe_cupy.plan.memory import MIB, PAD, SYSTEM_RAM, Settings, Use, use_of
from moe_cupy.plan.rules import CPU, GPU, Override, Placement, cpu_moe, place
from moe_cupy.plan.shapes import ROUTED, Model
from moe_cupy.plan.tables import DoesNotFit

LEAST_CONTEXT = 1024  # a smaller one is no advice


def check_fits_at_all(model: Model, machine: Machine) -> None:
    """Raise PlanError where a machine cannot even hold what every token needs."""
    memory = machine.ram_bytes + (machine.gpu.vram_bytes if machine.gpu else 0)
    dense = model.nbytes - model.routed_bytes
    if dense + SYSTEM_RAM > memory:
        raise DoesNotFit(
            f"{model.name} {model.quant}: the part that every token needs takes {size_text(dense)}, and {machine.name} "
            f"has {size_text(memory)} of memory in all: it fits nowhere; use a smaller quantization or model, or at "
            f"least {size_text(dense + SYSTEM_RAM)} of RAM"
        )


def too_full(model: Model, machine: Machine, settings: Settings, placement: Placement, use: Use) -> str:
    """What is wrong where the flags put more on the card than it has, and what works; "" where nothing is wrong."""
    assert machine.gpu is not None
    vram = machine.gpu.vram_bytes
    over = use.total - vram
    if over <= 0:
        return ""
    near = " or ".join(list(remedies(model, vram, settings, placement, use))[:3])
    near = near or "leave the placement to --fit on, or take a smaller quantization or model"
    if use.past > vram // 2:
        return (f"-c {settings.ctx}: the context alone takes {size_text(use.past)} of the card's {size_text(vram)} "
                f"({-(-over // MIB)} MiB too many in all); nearest that works: {near}")  # fmt: skip
    return (f"these flags put {use.total / GIB:.1f} GiB on a card of {vram / GIB:.3g} GiB: {-(-over // MIB)} MiB "
            f"({size_text(over)}) too many; nearest that works: {near}")  # fmt: skip


def remedies(model: Model, vram: int, settings: Settings, placement: Placement, use: Use) -> Iterator[str]:
    """Changes each of which alone makes it fit, the likeliest first."""

    def fits(changed: Settings) -> bool:
        return use_of(model, placement, changed, GPU).total <= vram

    context = fitting.longest(model, placement, vram, settings)
    if context and use.past > vram // 2:
        yield f"-c {context}"
    sparse = fitting.most_full(model, vram, settings) if model.experts else None
    if sparse is not None:
        instead = " instead of -ot" if any("-ot " in reason for reason in placement.reason.values()) else ""
        yield f"--n-cpu-moe {sparse}{instead}"
    if context >= LEAST_CONTEXT and use.past <= vram // 2:
        yield f"-c {context}"
    quantized = replace(settings, ctk="q8_0", ctv="q8_0")
    if settings.ctk == settings.ctv == "f16" and fits(quantized):
        yield "-ctk q8_0 -ctv q8_0"
    smaller = next((n for n in (1024, 512, 256, 128) if n < settings.ubatch and fits(replace(settings, ubatch=n))), 0)
    if smaller:
        yield f"-ub {smaller}"
    rules = cpu_moe() if model.experts else []
    layers = fitting.most(0, model.layers, lambda n: use_of(model, place(model, n, rules), settings, GPU).total <= vram)
    if layers is not None and sparse is None:
        yield f"-ngl {layers}" + " --cpu-moe" * bool(layers and rules)


def past_in_host(settings: Settings, past: int, room: int) -> str:
    """The context finds no room in host memory: it cannot be read from a file again."""
    near = int(room / (past / settings.ctx)) // PAD * PAD
    hint = f"-c {near}" if near else "a smaller -c with -ctk q8_0 -ctv q8_0, or more memory"
    return (f"-c {settings.ctx}: {size_text(past)} of the context stay in host memory, which has "
            f"{size_text(room)} for it; nearest that works: {hint}")  # fmt: skip


def no_cache(model: Model, machine: Machine, settings: Settings, use: Use, budget: int) -> str:
    least = model.expert_used_count * model.expert_bytes
    return (
        f"{model.name}: dense part, KV of {settings.ctx} tokens and buffers take {size_text(use.total)}, the card has "
        f"{size_text(max(0, budget))} to spend, and a cache needs {size_text(least)}; "
        f"use a smaller -c or -ub, -ctk q8_0 -ctv q8_0, or --fit-target below {max(0, budget) // MIB} MiB"
    )


def warnings_on(model: Model, placement: Placement, overrides: Sequence[Override]) -> Sequence[str]:
    """What is odd about a placement by hand."""
    told = []
    by_hand = [rule for rule in overrides if rule.flag == "-ot"]  # the other flags count dense layers too
    unused = [rule for rule in by_hand if not any(rule.found_in(t.name) for t in model.tensors)]
    if unused:
        patterns = ", ".join(sorted({f"{r.flag} {r.pattern}" for r in unused})[:3])
        told.append(f"{len(unused)} of {len(by_hand)} rules find no tensor of this model: {patterns}")
    dense = [t for t in placement.on(CPU, model.tensors) if t.part == "dense" and not ROUTED.search(t.name)]  # no bias
    split = {t.layer for t in dense if t.layer is not None}
    on_gpu = {i for i, at in enumerate(placement.pasts) if at == GPU}
    if split & on_gpu:
        told.append(f"dense tensors of layers {_few(split & on_gpu)} are in host memory though their attention is on "
                    "the GPU: each token crosses the link for them")  # fmt: skip
    experts = {t.layer for t in placement.on(GPU, model.tensors) if t.part == "routed"}
    if experts - on_gpu - {None}:
        told.append(
            f"experts of layers {_few(experts - on_gpu)} are on the GPU though their attention is not: raise -ngl"
        )
    return told


def _few(layers: set) -> str:
    numbers = sorted(layers)
    return ", ".join(map(str, numbers[:4])) + (f" … ({len(numbers)} layers)" if len(numbers) > 4 else "")
