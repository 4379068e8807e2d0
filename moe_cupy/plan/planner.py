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
    share_text,
    size_text,
    static_decode,
    total,
)
from moe_cupy.plan.hardware import Machine
from moe_cupy.plan.hits import Curve, curve_of
from moe_cupy.plan.memory import SYSTEM_RAM, Settings, Use, all_pasts, past_bytes, use_of
from moe_cupy.plan.prompt import prefill
from moe_cupy.plan.refuse import no_cache, past_in_host, too_full, warnings_on
from moe_cupy.plan.rules import CPU, GPU, Override, Placement, cpu_moe, gpu_layers, n_cpu_moe, place
from moe_cupy.plan.shapes import Model
from moe_cupy.plan.tables import DoesNotFit, PlanError

DEFAULT_CONTEXT = 16384  # planned for where neither -c nor the model asks for less
DEFAULT_DEPTH = 1024  # tokens already there when the predicted one is made
READ, WRITTEN = 1024, 512  # tokens of the turn by whose time placements are compared


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
    pageable: bool = False  # host weights stay memory-mapped
    kv_on_host: bool = False  # -nkvo
    used: int | None = None  # experts a token uses, where a line changes that
    overfull: bool = False  # plan flags that put too much on the card, and say so, instead of refusing

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
    prompt_placement: Placement | None = None  # of prompts, where it is not the same


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
    too_full: str = ""  # the sentence where the flags put more on the card than it has

    @property
    def turn_s(self) -> float:
        """Seconds to read a prompt and write an answer."""
        return READ / self.prefill_tok_s + WRITTEN / self.decode_tok_s

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
    return Settings(ctx, request.ctk, request.ctv, request.ubatch, request.pageable), asked


def static_plan(model: Model, machine: Machine, request: Request, curve: Curve | None = None) -> Plan:
    """Tensors stay where they are: what llama.cpp does with these flags, or with ``--fit``."""
    settings, asked = settings_of(model, request)
    if machine.gpu is None:
        return no_gpu_plan(model, machine, request, curve)
    if request.is_manual or not request.fit:
        return manual_plan(model, machine, request, curve)
    fitted = fitting.fit(model, vram_budget(machine, request), settings, asked, request.fit_ctx)
    return placed(model, machine, request, curve, fitted)


def placed(model: Model, machine: Machine, request: Request, curve: Curve | None, fitted: fitting.Fitted) -> Plan:
    """What decoding and prompts cost where ``fitted`` puts everything."""
    curve, settings = curve or curve_of(model), fitted.settings
    terms = static_decode(model, machine, fitted.placement, settings, min(request.depth, settings.ctx), curve)
    choice = Choice(settings, fitted.placement, fitted.n_cpu_moe, fitted.ngl, fitted.use, terms, fitted.steps,
                    model.remarks)  # fmt: skip
    return _finished(model, machine, request, curve, choice)


def no_gpu_plan(model: Model, machine: Machine, request: Request, curve: Curve | None) -> Plan:
    curve = curve or curve_of(model)
    settings, _ = settings_of(model, request)
    placement = place(model, 0, [], None)
    terms = static_decode(model, machine, placement, settings, min(request.depth, settings.ctx), curve)
    warnings = [*model.remarks]
    if request.is_manual:
        warnings.append("there is no GPU here: -ngl and overrides place nothing")
    steps = ("there is no GPU: everything is in host memory",)
    return _finished(model, machine, request, curve, Choice(settings, placement, None, 0, None, terms, steps, warnings))


def manual_plan(model: Model, machine: Machine, request: Request, curve: Curve | None) -> Plan:
    """As the flags say. Raises DoesNotFit where the card is too small, unless the request is to be shown anyway."""
    assert machine.gpu is not None
    curve = curve or curve_of(model)
    settings, _ = settings_of(model, request)
    ngl = gpu_layers(request.ngl, model.layers, model.layers_behind)
    placement = place(model, ngl, request.overrides, kv_on_host=request.kv_on_host)
    use = use_of(model, placement, settings, GPU)
    problem = too_full(model, machine, settings, placement, use)
    if problem and not request.overfull:
        raise DoesNotFit(problem)
    terms = static_decode(model, machine, placement, settings, min(request.depth, settings.ctx), curve)
    steps = ("placed by the flags given; --fit is off",) if request.is_manual else ("placed with --fit off",)
    warnings = [*model.remarks, *warnings_on(model, placement, request.overrides)]
    choice = Choice(settings, placement, None, ngl, use, terms, steps, warnings)
    return replace(_finished(model, machine, request, curve, choice), too_full=problem)


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
        raise DoesNotFit(no_cache(model, machine, settings, use, budget))
    share = most / model.experts
    cache = Cache(share, curve(share), way, misses)
    depth = min(request.depth, settings.ctx)
    terms = cached_decode(model, machine, placement, settings, depth, cache, curve)
    held = f"{most} of {model.experts} experts ({share_text(share)})"
    steps: tuple[str, ...] = (f"dense part, KV and {held} on the card",)
    if settings.ctx < wanted.ctx:
        steps += (f"a context of {settings.ctx}: {wanted.ctx} leaves no room for the dense part",)
    whole = fitting.most_full(model, budget, settings)  # of prompts whole layers count, whatever the cache holds
    prompt = place(model, every, n_cpu_moe(whole)) if whole is not None else placement
    choice = Choice(settings, placement, None, every, use, terms, steps, model.remarks, most, cache.hit_rate, prompt)
    return _finished(model, machine, request, curve, choice)


def _finished(model: Model, machine: Machine, request: Request, curve: Curve, chosen: Choice) -> Plan:
    """The choice with what it does to host memory, the disk and prompts."""
    host = use_of(model, chosen.placement, chosen.settings, CPU)
    room = max(0, machine.ram_bytes - SYSTEM_RAM)
    if host.past > room:  # weights can be read from a file again, the past cannot
        raise DoesNotFit(past_in_host(chosen.settings, host.past, room))
    over = max(0, host.total - room)
    threshold = offload_threshold(model, request.engine, request.threshold)
    warnings = [*chosen.warnings]
    if chosen.settings.ctx > model.context_length:
        warnings.append(f"-c {chosen.settings.ctx}: more than the {model.context_length} tokens that {model.name} "
                        "states; such a context needs rope scaling or a later version of the model")  # fmt: skip
    if over:
        warnings.append(f"host memory is short by {size_text(over)}: that much is read from disk again and again")
        if not machine.disk_is_known:
            warnings.append(f"{machine.name} names no disk: one of {machine.disk_read / 1e9:g} GB/s is assumed; give "
                            "disk or disk_read in the profile")  # fmt: skip
    batch = chosen.prompt_placement or chosen.placement
    missing = max(0, use_of(model, batch, chosen.settings, CPU).total - room)
    depth = min(request.depth, chosen.settings.ctx)
    prompt = prefill(model, machine, batch, chosen.settings, threshold, depth, missing)
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
    read = sum(past_bytes(p, min(request.depth, settings.ctx), settings, read=True) for p in model.pasts)
    terms = host_decode(model, machine, curve(share), past=read)
    steps = (f"dense part, KV and {slots} of {model.experts} experts ({share_text(share)}) in host memory",)
    choice = Choice(settings, placement, None, 0, None, terms, steps, model.remarks, slots, curve(share))
    return _finished(model, machine, request, curve, choice)
