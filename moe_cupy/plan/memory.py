"""What a placement takes of each device: weights, the past, and what computing needs beside them."""

from __future__ import annotations

from dataclasses import dataclass

from moe_cupy.plan.rules import CPU, Placement
from moe_cupy.plan.shapes import Model, Past
from moe_cupy.plan.tables import KV_TYPES, PlanError, table
from moe_ref.quants import BY_NAME

PAD = 256  # positions are kept in whole multiples of it
MIB = 1 << 20
ACTIVATIONS = 12  # vectors of the model's width that live at once for each token of a batch
SYSTEM_RAM = 4 * 10**9  # what the system and other programs keep of host memory


@dataclass(frozen=True, slots=True)
class Settings:
    """What a person sets: context, types of the past, tokens of a prompt at a time."""

    ctx: int
    ctk: str = "f16"
    ctv: str = "f16"
    ubatch: int = 512
    pageable: bool = False  # host weights are memory-mapped: copies to the card do not come from page-locked memory

    def __post_init__(self) -> None:
        for flag, value in (("-ctk", self.ctk), ("-ctv", self.ctv)):
            if value not in KV_TYPES:
                raise PlanError(f"{flag} {value}: unknown; use one of {', '.join(KV_TYPES)}")
        if self.ctx < 1 or self.ubatch < 1:
            raise PlanError(f"-c {self.ctx} -ub {self.ubatch}: both must be at least 1")


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes on one device."""

    weights: int
    past: int
    compute: int
    fixed: int

    @property
    def total(self) -> int:
        return self.weights + self.past + self.compute + self.fixed


def element_bytes(kind: str) -> float:
    """Bytes of one cached number: 2 for f16, 34/32 for q8_0."""
    t = BY_NAME[kind.upper()]
    return t.block_bytes / t.block_elements


def past_bytes(past: Past, positions: int, settings: Settings, read: bool = False) -> int:
    """Bytes that a layer keeps for ``positions``; with ``read``, those that computing one token reads."""
    if past.window:
        positions = min(positions, past.window if read else past.window + settings.ubatch)
    if not read:
        positions = -(-positions // PAD) * PAD
    per_position = past.keys * element_bytes(settings.ctk) + past.values * element_bytes(settings.ctv)
    return int(positions * per_position) + past.state_bytes


def all_pasts(model: Model, settings: Settings) -> int:
    """Bytes of the whole context in all layers."""
    return sum(past_bytes(past, settings.ctx, settings) for past in model.pasts)


def compute_bytes(model: Model, settings: Settings, streamed: int) -> int:
    """Logits, mask and activations of a batch, and a copy of the largest tensor that is streamed for a prompt."""
    logits = 4 * model.vocab_size
    mask = 2 * settings.ctx
    activations = 4 * ACTIVATIONS * model.embedding_length
    return settings.ubatch * (logits + mask + activations) + streamed


def use_of(model: Model, placement: Placement, settings: Settings, device: str) -> Use:
    """What ``device`` holds under a placement."""
    there = placement.on(device, model.tensors)
    weights = sum(t.nbytes for t in there)
    past = sum(past_bytes(p, settings.ctx, settings) for p, at in zip(model.pasts, placement.pasts, strict=True)
               if at == device)  # fmt: skip
    if device == CPU:
        return Use(weights, past, 0, 0)
    weights += placement.tied_copy * model.tied_bytes
    fixed = table("engines")["gpu"]["context_mib"] * MIB
    return Use(weights, past, compute_bytes(model, settings, streamed_bytes(model, placement)), fixed)


def streamed_bytes(model: Model, placement: Placement) -> int:
    """The largest expert tensor in host memory: a prompt needs a copy of it on the card."""
    away = placement.on(CPU, (t for t in model.tensors if t.part == "routed"))
    return max((t.nbytes for t in away), default=0)
