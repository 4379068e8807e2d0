"""The plan: where everything goes, how fast that is, and what else could have been done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_cupy.plan import fit as fitting
from moe_cupy.plan.cost import (
    THRESHOLD,
    Cache,
    Term,
    cached_decode,
    host_decode,
    offload_threshold,
    prefill,
    share_text,
    size_text,
    static_decode,
    total,
)
from moe_cupy.plan.hardware import GIB, Machine
from moe_cupy.plan.hits import Curve, curve_of
from moe_cupy.plan.memory import MIB, PAD, SYSTEM_RAM, Settings, Use, all_pasts, use_of
from moe_cupy.plan.rules import CPU, GPU, Override, Placement, cpu_moe, gpu_layers, place
from moe_cupy.plan.shapes import Model
from moe_cupy.plan.tables import DoesNotFit, PlanError

DEFAULT_CONTEXT = 16384  # planned for where neither -c nor the model asks for less
DEFAULT_DEPTH = 1024  # tokens already there when the predicted one is made


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asked; None where they did not."""

    ctx: int | None = None
    ctk: str = "f16"
    ctv: str = "f16"
    ubatch: int = 512
    depth: int = DEFAULT_DEPTH
    ngl: str | None = None
    overrides: tuple[Override, ...] = ()
    fit: bool = True
    fit_target: int = fitting.DEFAULT_TARGET
    fit_ctx: int = fitting.DEFAULT_LEAST_CONTEXT
    engine: str = "llama.cpp"
    threshold: int = THRESHOLD

    @property
    def is_manual(self) -> bool:
        return self.ngl not in (None, "auto") or bool(self.overrides)


@dataclass(frozen=True)
class Choice:
    """A placement and what decoding with it costs."""

    settings: Settings
    placement: Placement
    n_cpu_moe: int | None
    ngl: int
    use: Use | None
    terms: Sequence[Term]
    steps: Sequence[str]
    warnings: Sequence[str]
    slots: int = 0
    hit_rate: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The answer. ``cache_slots`` 0: tensors stay where they are; ``terms`` add up to a token's seconds."""

    model: Model
    machine: Machine
    request: Request
    settings: Settings
    placement: Placement
    n_cpu_moe: int | None
    ngl: int
    use: Use | None
    cache_slots: int
    hit_rate: float
    curve: Curve
    terms: tuple[Term, ...]
    prompt_terms: tuple[Term, ...]
    ram_bytes: int
    disk_bytes: int
    steps: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def decode_tok_s(self) -> float:
        return 1 / total(self.terms)

    @property
    def prefill_tok_s(self) -> float:
        return self.settings.ubatch / total(self.prompt_terms)

    @property
    def vram_bytes(self) -> int:
        return (self.use.total if self.use else 0) + self.cache_bytes

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_slots * self.model.expert_bytes)

    @property
    def budget(self) -> int:
        return vram_budget(self.machine, self.request)


def vram_budget(machine: Machine, request: Request) -> int:
    """Bytes of the card that may be used: all but the margin."""
    return machine.gpu.vram_bytes - request.fit_target if machine.gpu else 0


def settings_of(model: Model, request: Request) -> tuple[Settings, bool]:
    """Context, types and batch; and whether the context was asked for."""
    asked = request.ctx is not None
    wanted = max(DEFAULT_CONTEXT, request.fit_ctx)
    ctx = (request.ctx or model.context_length) if asked else min(model.context_length, wanted)
    return Settings(ctx, request.ctk, request.ctv, request.ubatch), asked


def static_plan(model: Model, machine: Machine, request: Request, curve: Curve | None = None) -> Plan:
    """Tensors stay where they are: what llama.cpp does with these flags, or with ``--fit``."""
    curve = curve or curve_of(model)
    settings, asked = settings_of(model, request)
    warnings = list(model.remarks)
    if machine.gpu is None:
        placement, ngl, sparse, use = place(model, 0, [], None), 0, None, None
        steps: tuple[str, ...] = ("there is no GPU: everything is in host memory",)
        if request.is_manual:
            warnings.append("there is no GPU here: -ngl and overrides place nothing")
    elif request.is_manual or not request.fit:
        ngl, sparse = gpu_layers(request.ngl, model.layers, model.layers_behind), None
        placement = place(model, ngl, request.overrides)
        use = use_of(model, placement, settings, GPU)
        steps = ("placed by the flags given; --fit is off",) if request.is_manual else ("placed with --fit off",)
        check_card(model, machine, settings, placement, use)
        warnings += warnings_on(model, placement, request)
    else:
        fitted = fitting.fit(model, vram_budget(machine, request), settings, asked, request.fit_ctx)
        ngl, sparse, settings, placement, use, steps = (
            fitted.ngl, fitted.n_cpu_moe, fitted.settings, fitted.placement, fitted.use, fitted.steps,
        )  # fmt: skip
    terms = static_decode(model, machine, placement, settings, min(request.depth, settings.ctx), curve)
    choice = Choice(settings, placement, sparse, ngl, use, terms, steps, warnings)
    return _finished(model, machine, request, curve, choice)


def cached_plan(model: Model, machine: Machine, request: Request, curve: Curve | None = None,
                slots: int | None = None, way: str = "slabs", misses: str = "best") -> Plan:  # fmt: skip
    """The dense part and a cache of experts on the card, all experts in host memory: what this runtime does."""
    if machine.gpu is None or not model.experts:
        raise PlanError("an expert cache needs a GPU and a model with experts")
    curve = curve or curve_of(model)
    wanted, asked = settings_of(model, request)
    settings = wanted
    budget = vram_budget(machine, request)
    every = model.layers + 1
    placement = place(model, every, cpu_moe())
    use = use_of(model, placement, settings, GPU)
    if use.total > budget and not asked:
        settings = replace(settings, ctx=min(settings.ctx, request.fit_ctx))
        use = use_of(model, placement, settings, GPU)
    room = int(max(0, budget - use.total) // model.expert_bytes)
    most = min(model.experts, room) if slots is None else slots
    least = model.expert_used_count
    if (slots is None and most < least) or use.total > budget:
        raise DoesNotFit(_no_cache(model, machine, settings, use, budget))
    share = most / model.experts
    cache = Cache(share, curve(share), way, misses)
    depth = min(request.depth, settings.ctx)
    terms = cached_decode(model, machine, placement, settings, depth, cache, curve)
    held = f"{most} of {model.experts} experts ({share_text(share)})"
    steps: tuple[str, ...] = (f"dense part, KV and {held} on the card",)
    if settings.ctx < wanted.ctx:
        steps += (f"a context of {settings.ctx}: {wanted.ctx} leaves no room for the dense part",)
    choice = Choice(settings, placement, None, every, use, terms, steps, model.remarks, most, cache.hit_rate)
    return _finished(model, machine, request, curve, choice)


def _finished(model: Model, machine: Machine, request: Request, curve: Curve, chosen: Choice) -> Plan:
    """The choice with what it does to host memory, the disk and prompts."""
    host = use_of(model, chosen.placement, chosen.settings, CPU)
    room = max(0, machine.ram_bytes - SYSTEM_RAM)
    if host.past > room:  # weights can be read from a file again, the past cannot
        ctx = chosen.settings.ctx
        near = int(room / (host.past / ctx)) // PAD * PAD
        hint = f"-c {near}" if near else "a smaller -c with -ctk q8_0 -ctv q8_0, or more memory"
        raise DoesNotFit(f"-c {ctx}: {size_text(host.past)} of the context stay in host memory, which has "
                         f"{size_text(room)} for it; nearest that works: {hint}")  # fmt: skip
    over = max(0, host.total - room)
    threshold = offload_threshold(model, request.engine, request.threshold)
    warnings = [*chosen.warnings]
    if chosen.settings.ctx > model.context_length:
        warnings.append(f"-c {chosen.settings.ctx}: more than the {model.context_length} tokens that {model.name} "
                        "states; such a context needs rope scaling or a later version of the model")  # fmt: skip
    if over:
        warnings.append(f"host memory is short by {size_text(over)}: that much is read from disk again and again")
    prompt = prefill(model, machine, chosen.placement, chosen.settings, threshold, over)
    return Plan(
        model=model, machine=machine, request=request, settings=chosen.settings, placement=chosen.placement,
        n_cpu_moe=chosen.n_cpu_moe, ngl=chosen.ngl, use=chosen.use, cache_slots=chosen.slots,
        hit_rate=chosen.hit_rate, curve=curve, terms=tuple(chosen.terms), prompt_terms=tuple(prompt),
        ram_bytes=host.total - over, disk_bytes=over, steps=tuple(chosen.steps), warnings=tuple(warnings),
    )  # fmt: skip


def host_plan(model: Model, machine: Machine, request: Request, curve: Curve | None = None) -> Plan:
    """This runtime's host device, on a machine that ``doctor --write`` measured: experts in RAM as far as they go."""
    curve = curve or curve_of(model)
    settings, _ = settings_of(model, request)
    placement = place(model, 0, [], None)
    past = all_pasts(model, settings)
    room = machine.ram_bytes - SYSTEM_RAM - (model.nbytes - model.routed_bytes) - past
    slots = min(model.experts, int(max(0, room) // model.expert_bytes)) if model.experts else 0
    share = slots / model.experts if model.experts else 1.0
    terms = host_decode(model, machine, curve(share))
    steps = (f"dense part, KV and {slots} of {model.experts} experts ({share_text(share)}) in host memory",)
    choice = Choice(settings, placement, None, 0, None, terms, steps, model.remarks, slots, curve(share))
    return _finished(model, machine, request, curve, choice)


def make_plan(model: Model, machine: Machine, request: Request, curve: Curve | None = None) -> Plan:
    """The quicker of an expert cache and a fixed placement; the latter where flags fix it.

    Raises PlanError with the nearest that works for what fits nowhere.
    """
    check_fits_at_all(model, machine)
    if machine.gpu is None and machine.measured:
        return host_plan(model, machine, request, curve)
    if request.is_manual or not request.fit or machine.gpu is None or not model.experts:
        return static_plan(model, machine, request, curve)
    plans = []
    errors = []
    for way in (static_plan, cached_plan):
        try:
            plans.append(way(model, machine, request, curve))
        except PlanError as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    return max(plans, key=lambda plan: plan.decode_tok_s)


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


def check_card(model: Model, machine: Machine, settings: Settings, placement: Placement, use: Use) -> None:
    """Raise PlanError where the flags put more on the card than it has."""
    assert machine.gpu is not None
    over = use.total - machine.gpu.vram_bytes
    if over <= 0:
        return
    past = all_pasts(model, settings)
    if use.past > machine.gpu.vram_bytes // 2:
        room = fitting.longest(model, placement, machine.gpu.vram_bytes, settings)
        near = f"-c {room}" if room else "a quantized cache (-ctk q8_0 -ctv q8_0) and a smaller -c"
        raise DoesNotFit(f"-c {settings.ctx}: the context alone takes {size_text(past)} of the card's "
                        f"{size_text(machine.gpu.vram_bytes)}; nearest that works: {near}")  # fmt: skip
    instead = " instead of -ot" if any("-ot " in reason for reason in placement.reason.values()) else ""
    sparse = fitting.most_full(model, machine.gpu.vram_bytes, settings) if model.experts else None
    near = f"--n-cpu-moe {sparse}{instead}" if sparse is not None else "fewer layers (-ngl), or leave it to --fit on"
    raise DoesNotFit(
        f"these flags put {use.total / GIB:.1f} GiB on a card of {machine.gpu.vram_bytes / GIB:.3g} GiB: "
        f"{size_text(over)} too many; nearest that works: {near}"
    )


def _no_cache(model: Model, machine: Machine, settings: Settings, use: Use, budget: int) -> str:
    least = model.expert_used_count * model.expert_bytes
    return (
        f"{model.name}: dense part, KV of {settings.ctx} tokens and buffers take {size_text(use.total)}, the card has "
        f"{size_text(max(0, budget))} to spend, and a cache needs {size_text(least)}; "
        f"use a smaller -c or -ub, -ctk q8_0 -ctv q8_0, or --fit-target below {budget // MIB} MiB"
    )


def warnings_on(model: Model, placement: Placement, request: Request) -> Sequence[str]:
    """What is odd about a placement by hand."""
    told = []
    by_hand = [rule for rule in request.overrides if rule.flag == "-ot"]  # the other flags count dense layers too
    unused = [rule for rule in by_hand if not any(rule.found_in(t.name) for t in model.tensors)]
    if unused:
        patterns = ", ".join(sorted({f"{r.flag} {r.pattern}" for r in unused})[:3])
        told.append(f"{len(unused)} of {len(by_hand)} rules find no tensor of this model: {patterns}")
    split = {t.layer for t in placement.on(CPU, model.tensors) if t.part == "dense" and t.layer is not None}
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
