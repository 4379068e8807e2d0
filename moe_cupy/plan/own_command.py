"""The plan as a command of this program."""

from __future__ import annotations

from moe_cupy.plan.planner import Plan

KV_TYPES = ("f32", "f16", "q8_0")  # that every device takes, the largest first
PROMPT = "Once upon a time"  # ``run`` needs one


def own_words(plan: Plan, model: str, placement: list[str]) -> list[str]:
    """``moe-cupy run`` as planned; ``placement`` are llama.cpp's flags of a plan whose tensors stay where they are."""
    s, on_gpu = plan.settings, plan.machine.gpu is not None and plan.vram_bytes > 0
    words = ["moe-cupy", "run", "-m", model, "--device", "cuda" if on_gpu else "host"]
    if on_gpu and not plan.cache_slots:
        words += ["-ngl", str(plan.ngl) if plan.ngl <= plan.model.layers else "all", *placement]
    if plan.model.experts and (plan.cache_slots or on_gpu):
        everything = plan.cache_slots in (0, plan.model.experts)
        words += ["--cache", "100%" if everything else f"slots:{plan.cache_slots}"]
    kind = kv_type(s.ctk, s.ctv)
    words += ["-c", str(s.ctx), "-ub", str(s.ubatch), "-ctk", kind, "-ctv", kind, "-t", str(plan.machine.cores)]
    return [*words, "-p", PROMPT]


def kv_type(keys: str, values: str) -> str:
    """One type for both, as a GPU takes them, that keeps as many bits as the planned ones."""
    least = [{"bf16": "f16"}.get(kind, kind) for kind in (keys, values)]
    return min((kind if kind in KV_TYPES else "q8_0" for kind in least), key=KV_TYPES.index)
