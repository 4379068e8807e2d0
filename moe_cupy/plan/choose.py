"""Which of all placements: each is planned in full, and the one whose turn takes least time is the plan.

More or faster hardware leaves every placement possible and none slower, so the quickest is never slower either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from moe_cupy.plan import fit as fitting
from moe_cupy.plan.hardware import Machine
from moe_cupy.plan.hits import Curve
from moe_cupy.plan.memory import PAD, Settings, use_of
from moe_cupy.plan.planner import (
    Plan,
    Request,
    cached_plan,
    host_plan,
    no_gpu_plan,
    placed,
    static_plan,
    vram_budget,
)
from moe_cupy.plan.refuse import check_fits_at_all
from moe_cupy.plan.rules import GPU, cpu_moe, n_cpu_moe, place
from moe_cupy.plan.shapes import Model
from moe_cupy.plan.tables import DoesNotFit, PlanError, table

WORTH_SAYING = 1.01  # how much faster a smaller context must be to be mentioned
BATCHES = (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32)


def make_plan(model: Model, machine: Machine, request: Request, curve: Curve | None = None) -> Plan:
    """The quickest placement; where flags fix one, that.

    Raises PlanError with the nearest that works for what fits nowhere.
    """
    check_fits_at_all(model, machine)
    try:
        return chosen(model, machine, request, curve)
    except DoesNotFit as error:
        near = None if request.is_manual else nearest(model, machine, request, curve)
        said = str(error)
        what = said.partition("; nearest that works: ")[0]
        raise DoesNotFit(f"{what}; nearest that works: {near}" if near else said) from None


def chosen(model: Model, machine: Machine, request: Request, curve: Curve | None) -> Plan:
    """As ``make_plan``, but what does not fit is told without looking for the nearest that does."""
    if machine.gpu is None:
        return (host_plan if machine.measured else no_gpu_plan)(model, machine, request, curve)
    if request.is_manual or not request.fit:
        return static_plan(model, machine, request, curve)
    plans = []
    errors = []
    for way in (best_static, cached_plan) if model.experts else (best_static,):
        try:
            plans.append(way(model, machine, request, curve))
        except PlanError as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    return with_what_context_costs(min(plans, key=lambda plan: plan.turn_s))


def nearest(model: Model, machine: Machine, request: Request, curve: Curve | None) -> str | None:
    """The smallest change that was found to work: a shorter context, smaller batches, the CPU alone."""

    def works(changed: Request, where: Machine = machine) -> bool:
        try:
            return bool(chosen(model, where, changed, curve))
        except PlanError:
            return False

    asked = min(request.ctx or model.context_length, model.context_length)
    if request.ctx is not None:
        blocks = fitting.most(1, max(1, asked // PAD), lambda n: works(replace(request, ctx=n * PAD)))
        if blocks:
            return f"-c {blocks * PAD}"
    batches = (n for n in BATCHES if n < request.ubatch and works(replace(request, ubatch=n)))
    if ubatch := next(batches, None):
        return f"-ub {ubatch}"
    if machine.gpu and works(request, replace(machine, gpu=None)):
        return "--vram 0, the CPU alone, or a smaller --fit-target if the card is not full"
    return None


def best_static(model: Model, machine: Machine, request: Request, curve: Curve | None = None) -> Plan:
    """The quickest placement in which tensors stay where they are: ``--fit``'s, or one that uses less of the card."""
    fullest = static_plan(model, machine, request, curve)
    if machine.gpu is None or request.is_manual or not request.fit:
        return fullest

    def quickest(found: Plan, candidates: Iterator[fitting.Fitted]) -> Plan:
        budget = vram_budget(machine, request)
        plans = [found]
        for less in candidates:
            if less.use.total <= budget:
                with suppress(DoesNotFit):  # the context may find no room in host memory
                    plans.append(placed(model, machine, request, curve, less))
        return min(plans, key=lambda plan: plan.turn_s)

    best = quickest(fullest, emptier(model, machine, fullest))
    if not cpu_is_quicker(machine) and (best is fullest or best.ngl > model.layers):
        return best
    return quickest(best, fewer_layers(model, fullest, range(2, fullest.ngl)))


def emptier(model: Model, machine: Machine, full: Plan) -> Iterator[fitting.Fitted]:
    """Placements that leave more to the CPU: experts where it is quicker than the card, and all layers."""
    if full.n_cpu_moe is not None and full.ngl > model.layers and cpu_is_quicker(machine):
        for sparse in range(full.n_cpu_moe + 1, model.layers + 1):
            yield fitted(model, full.settings, full.ngl, n_cpu_moe(sparse), sparse)
    yield from fewer_layers(model, full, range(min(2, full.ngl)))


def fewer_layers(model: Model, full: Plan, counts: range) -> Iterator[fitting.Fitted]:
    """The last layers on the card, their experts in host memory; 0: nothing, 1: the output alone."""
    for ngl in counts:
        sparse = model.layers if model.experts and ngl else None
        yield fitted(model, full.settings, ngl, cpu_moe() if sparse else [], sparse)


def cpu_is_quicker(machine: Machine) -> bool:
    assert machine.gpu is not None
    return machine.ram_practical > machine.gpu.bandwidth * table("engines")["gpu"]["bandwidth_efficiency"]


def fitted(model: Model, settings: Settings, ngl: int, rules: list, sparse: int | None) -> fitting.Fitted:
    placement = place(model, ngl, rules)
    steps = (f"{ngl} of {model.layers + 1} layers on the card: more of it would be slower",)
    if sparse and ngl > model.layers:
        steps = (f"experts of the first {sparse} of {model.layers} layers stay in host memory, which is the quicker",)
    return fitting.Fitted(ngl, sparse, settings, placement, use_of(model, placement, settings, GPU), steps)


def with_what_context_costs(plan: Plan) -> Plan:
    """The plan, with a line if the context that was chosen for want of ``-c`` costs speed."""
    request, least = plan.request, plan.request.fit_ctx
    if request.ctx is not None or plan.settings.ctx <= least:
        return plan
    try:
        small = make_plan(plan.model, plan.machine, replace(request, ctx=least), plan.curve)
    except PlanError:
        return plan
    if small.decode_tok_s < WORTH_SAYING * plan.decode_tok_s:
        return plan
    line = f"a context of {plan.settings.ctx} takes memory: with -c {least} it would be {small.decode_tok_s:.1f} tok/s"
    return replace(plan, steps=(*plan.steps, line))
