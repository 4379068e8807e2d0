"""Predicted speed against cache size, as a picture (needs matplotlib)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_cupy.plan.hardware import Machine
from moe_cupy.plan.hits import Curve
from moe_cupy.plan.planner import Request, cached_plan
from moe_cupy.plan.shapes import Model
from moe_cupy.plan.tables import PlanError


def speeds(model: Model, machine: Machine, request: Request, curve: Curve | None = None,
           misses: str = "best", count: int = 40) -> list[tuple[float, float]]:  # fmt: skip
    """(share of all experts that is resident, tokens a second) from one token's experts to all."""
    wide = replace(request, ctx=request.ctx or 4096)
    if machine.gpu is None or not model.experts:
        raise PlanError("--plot: needs a GPU and a model with experts; there is no cache to plot otherwise")
    roomy = replace(machine, gpu=replace(machine.gpu, vram_bytes=2**50))
    least = model.expert_used_count
    counts = sorted({least + (model.experts - least) * i // count for i in range(count + 1)})
    plans = [(slots / model.experts, cached_plan(model, roomy, wide, curve, slots, misses=misses)) for slots in counts]
    return [(share, plan.decode_tok_s) for share, plan in plans]


def plot_sizes(model: Model, machine: Machine, request: Request, path: str, curve: Curve | None = None) -> None:
    """Write the picture. Raises PlanError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError("--plot: needs matplotlib (pip install matplotlib)") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    draw(figure.subplots(), model, machine, request, curve)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise PlanError(f"--plot {path}: cannot be written: {error.strerror}") from error
    except ValueError as error:  # an ending that is no format
        raise PlanError(f"--plot {path}: {error}") from error


def draw(axes: Any, model: Model, machine: Machine, request: Request, curve: Curve | None = None) -> None:
    """Both ways of a miss, and where the card's memory ends."""
    for misses, label in (("load", "misses copied over PCIe"), ("cpu", "misses computed by the CPU")):
        points = speeds(model, machine, request, curve, misses)
        axes.plot([100 * share for share, _ in points], [tok_s for _, tok_s in points], label=label)
    try:
        plan = cached_plan(model, machine, request, curve)
        axes.axvline(100 * plan.cache_slots / model.experts, color="grey", linestyle=":", label="what fits this card")
    except PlanError:
        pass
    axes.set(xlabel="experts in the cache, % of all", ylabel="predicted decode, tokens/s",
             title=f"{model.name} {model.quant} on {machine.name}", ylim=(0, None), xlim=(0, 100))  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)
