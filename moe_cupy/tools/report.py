"""Where the tensors of a run are, as a person reads it."""

from __future__ import annotations

from moe_cupy.engine import Engine
from moe_cupy.engine.figures import side_by_side
from moe_cupy.plan.report import PLACES
from moe_cupy.plan.rules import GPU

__all__ = ["places", "side_by_side", "tensor_lines"]
ON_NONE = "-"  # a number that launches are given


def places(engine: Engine) -> dict[str, str]:
    """Tensor of the file -> the device that has it, by what was loaded: experts are where they are computed."""
    found = dict(engine.weights.lies)
    for at, store in engine.stores.items():
        for tensors in store.layout.layers:
            found |= {engine.views[tensor.name].stored.name: at for tensor in tensors}
    return found


def tensor_lines(engine: Engine) -> list[str]:
    """Every tensor, its bytes, place and the rule that put it there, as ``plan --tensors`` writes them."""
    found, width = places(engine), max(map(len, engine.file.tensors))
    cached = {engine.views[t.name].stored.name for s in engine.stores.values() for ts in s.layout.layers for t in ts}
    lines = []
    for t in engine.file.tensors.values():
        at = found.get(t.name, ON_NONE)
        why = engine.split.why.get(t.name, "")
        why += ", by the expert cache" if t.name in cached and at == GPU else ""
        lines.append(f"{t.name:{width}}  {t.type:8} {t.nbytes:>14,}  {PLACES.get(at, at):5} {why}".rstrip())
    return lines
