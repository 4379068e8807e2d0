"""What a simulated machine takes for everything, in seconds and bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_cupy.plan.names import model_named, quantization_in
from moe_cupy.plan.shapes import preset
from moe_cupy.plan.tables import PlanError

MIB = 1 << 20
# Bytes of one routed expert in the format that people run: what 3 x D x F weights take. Others: the planner's shapes.
EXPERT_BYTES: dict[str, int] = {
    "gpt-oss-20b": 3 * 2880 * 2880 * 17 // 32,  # MXFP4: 4.25 bits a weight
    "qwen3-30b-a3b": 3 * 2048 * 768 * 9 // 16,  # Q4_K: 4.5 bits
    "deepseek-v2-lite": 3 * 2048 * 1408 * 9 // 16,
    "mixtral-8x7b": 3 * 4096 * 14336 * 9 // 16,
    "qwen1.5-moe": 3 * 2048 * 1408 * 9 // 16,
}
DEFAULT_EXPERT_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU behind a link; host memory that may hold only a share of the experts, the rest on disk.

    The defaults are a 16 GB card on PCIe 5.0 x16: 50 GB/s of its 63 are reached, 960 GB/s of device memory.
    """

    link_bytes_s: float = 50e9
    link_latency_s: float = 10e-6
    device_bytes_s: float = 960e9  # an expert's compute takes its bytes over this
    attention_s: float = 60e-6  # a layer without its experts, launches included
    head_s: float = 500e-6  # once a token
    host_share: float = 1.0  # of all experts that host memory holds
    disk_bytes_s: float = 6e9
    disk_latency_s: float = 100e-6

    def expert_s(self, expert_bytes: int) -> float:
        """Compute of one expert for one token."""
        return expert_bytes / self.device_bytes_s

    def fetched_meanwhile(self, expert_bytes: int, used: int) -> int:
        """How many experts the link brings while a layer computes, at least one."""
        layer_s = self.attention_s + used * self.expert_s(expert_bytes)
        return max(1, int(layer_s / (self.link_latency_s + expert_bytes / self.link_bytes_s)))


class ExpertSize(NamedTuple):
    """Bytes of one routed expert, where that comes from, and whether anything says so."""

    nbytes: int
    source: str
    is_known: bool = True


def expert_bytes_of(meta: Mapping[str, Any]) -> int:
    """What ``expert_size`` says."""
    return expert_size(meta).nbytes


def expert_size(meta: Mapping[str, Any], n_experts: int | None = None) -> ExpertSize:
    """As the trace says; else by the model that it names, if that has ``n_experts``; else DEFAULT_EXPERT_BYTES."""
    if isinstance(size := meta.get("expert_bytes"), int) and size > 0:
        return ExpertSize(size, "as the trace says")
    name = str(meta.get("model", ""))
    for known, size in EXPERT_BYTES.items():
        if re.search(rf"{re.escape(known)}(?![a-z0-9])", name.lower()):
            return ExpertSize(size, f"{known} in the format that people run")
    plain = re.sub(r"\(.*?\)", "", name)  # "Qwen/Qwen3-30B-A3B (Q4_K_M GGUF)"
    try:
        found, quant = model_named(plain)
        model = preset(found, quant or quantization_in(name))
    except PlanError:
        return ExpertSize(DEFAULT_EXPERT_BYTES, f"its model, {name[:60]!r}, is not known", is_known=False)
    if n_experts not in (None, model.expert_count):
        told = f"{found} has {model.expert_count} experts a layer, the trace {n_experts}"
        return ExpertSize(DEFAULT_EXPERT_BYTES, told, is_known=False)
    return ExpertSize(round(model.expert_bytes), f"{found} {model.quant}")
