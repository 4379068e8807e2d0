"""What would help most: each change is planned in full and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from moe_cupy.plan.choose import make_plan
from moe_cupy.plan.hardware import GB, GIB, Machine, gpu_called, pcie_bytes_s
from moe_cupy.plan.hits import Curve
from moe_cupy.plan.planner import Plan, Request
from moe_cupy.plan.shapes import Model, preset
from moe_cupy.plan.tables import PlanError, table

LOWER_QUANT = {"Q8_0": "Q6_K", "Q6_K": "Q5_K_M", "Q5_K_M": "Q4_K_M", "Q4_K_M": "IQ4_XS", "IQ4_XS": "IQ3_S",
               "IQ3_S": "IQ2_M", "Q4_0": "IQ3_S", "Q4_K_S": "IQ3_S", "BF16": "Q8_0", "F16": "Q8_0"}  # fmt: skip
WORTH = 1.02  # a change below 2 % is none
FIRST_CARD = "RTX 5060 Ti 16G"  # for a machine that has none


@dataclass(frozen=True, slots=True)
class Advice:
    """One change and the tokens a second that it predicts."""

    change: str
    decode_tok_s: float
    gain: float  # times as fast


Way = Callable[[Model, Machine, Request, Curve | None], Plan]
Change = tuple[str, Callable[[], tuple[Model, Machine, Request]]]


def advise(plan: Plan, curve: Curve | None = None, count: int = 3, way: Way = make_plan) -> list[Advice]:
    """The ``count`` changes that help decoding most, best first; ``way`` plans each, as the plan itself was made."""
    found = []
    for text, changed in changes(plan):
        try:
            other = way(*changed(), curve)
        except PlanError:
            continue
        gain = other.decode_tok_s / plan.decode_tok_s
        if gain >= WORTH:
            found.append(Advice(text, other.decode_tok_s, gain))
    return sorted(found, key=lambda advice: -advice.gain)[:count]


def changes(plan: Plan) -> Iterator[Change]:
    """Everything that is tried, each alone."""
    model, machine, request = plan.model, plan.machine, plan.request
    if request.is_manual or not request.fit:
        free = replace(request, ngl=None, overrides=(), fit=True)
        yield (
            "leave the placement to the planner (drop -ngl, -ot, --cpu-moe, --n-cpu-moe)",
            lambda: (model, machine, free),
        )
    if (request.ctk, request.ctv) == ("f16", "f16"):
        yield "-ctk q8_0 -ctv q8_0", lambda: (model, machine, replace(request, ctk="q8_0", ctv="q8_0"))
    if plan.settings.ctx >= 8192:
        half = plan.settings.ctx // 2
        yield f"-c {half}: half the context", lambda: (model, machine, replace(request, ctx=half))
    if request.ubatch > 128:
        small = request.ubatch // 4
        yield (f"-ub {small}: smaller buffers, more room for experts (prompts slow down)",
               lambda: (model, machine, replace(request, ubatch=small)))  # fmt: skip
    lower = LOWER_QUANT.get(model.quant)
    if lower and model.name in table("models"):
        yield f"{lower} instead of {model.quant}", lambda: (requantized(model, lower), machine, request)
    yield from hardware_changes(plan)


def requantized(model: Model, quant: str) -> Model:
    """The same preset in other types; a line may have changed how many experts a token uses."""
    return replace(preset(model.name, quant), expert_used_count=model.expert_used_count)


def hardware_changes(plan: Plan) -> Iterator[Change]:
    """More or faster of each part."""
    model, machine, request = plan.model, plan.machine, plan.request
    faster = "DDR5-6400" if "DDR5" in machine.ram_kind else "DDR4-3600"
    wanted = table("hardware")["ram"][faster] * 1e6 * 8 * 2
    if machine.ram_bandwidth < wanted and machine.sockets == 1:
        yield f"{faster} in two channels", lambda: (model, replace(machine, ram_bandwidth=wanted), request)
    if plan.disk_bytes:
        more = (plan.disk_bytes // (32 * GB) + 1) * 32 * GB
        yield (f"{more // GB} GB more RAM: nothing is read from disk any more",
               lambda: (model, replace(machine, ram_bytes=machine.ram_bytes + more), request))  # fmt: skip
    gpu = machine.gpu
    if gpu is None:
        card = gpu_called(FIRST_CARD)
        yield f"a card, such as an {FIRST_CARD}", lambda: (model, replace(machine, gpu=card, measured={}), request)
        return
    best = gpu.pcie.partition("x")[0] + "x16"
    if pcie_bytes_s(gpu.pcie) < pcie_bytes_s(best) and not gpu.link_measured:
        yield f"PCIe slot {best}", lambda: (model, replace(machine, gpu=replace(gpu, pcie=best)), request)
    more_vram = replace(machine, gpu=replace(gpu, vram_bytes=gpu.vram_bytes + 8 * GIB))
    yield "8 GiB more VRAM (another card of the same speed)", lambda: (model, more_vram, request)
