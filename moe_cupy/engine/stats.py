"""What a run did, as numbers: the report, the JSON and the bench row all read this."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the engine was made or ``reset_stats`` was called. ``late`` hits are among ``hits``."""

    device: str
    policy: str
    prefetch: str
    cache_slots: int  # slots of all size classes
    cache_bytes: int  # memory of those slots
    experts: int  # routed experts of all layers
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0  # by ``generate``, or given to ``decode``
    decoded_tokens: int = 0  # passes of one token; the first that ``generate`` yields comes from the prompt's pass
    decoded_seconds: float = 0.0
    hits: int = 0  # an expert wanted by an event was resident, or on its way by prefetch
    misses: int = 0
    late: int = 0  # hits whose copy had not arrived yet
    evictions: int = 0
    bytes_demand: int = 0  # loaded because an event wanted it
    bytes_prefetch: int = 0  # loaded ahead of use
    bytes_wasted: int = 0  # of those, evicted unused
    stall_us: int = 0  # compute waited for expert loads
    host_hits: int = 0  # of loads to a device with memory of its own: the expert was in page-locked memory
    host_misses: int = 0  # or had to be read from the file first
    decode: str = "host"  # who decided what is loaded; of what the device decides, the stall is not known
    cpu_experts: int = 0  # experts that the CPU computed beside a device with memory of its own; not among the hits
    cpu_misses: int = 0  # of those, not in memory: read from the file first
    warmup_seconds: float = 0.0  # kernels compiled, or read from disk, at their first use; not in the seconds above

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return self.prompt_tokens + self.decoded_tokens

    @property
    def hit_rate(self) -> float:
        """Hits over accesses; 1 where there were none."""
        total = self.hits + self.misses
        return self.hits / total if total else 1.0

    @property
    def bytes_per_token(self) -> float:
        """Expert bytes read per token, demand and prefetch."""
        return (self.bytes_demand + self.bytes_prefetch) / max(1, self.tokens)

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens per second; 0 before any."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Passes of one token per second; 0 before any."""
        return self.decoded_tokens / self.decoded_seconds if self.decoded_seconds else 0.0

    def __str__(self) -> str:
        """The table that ``run`` prints."""
        from moe_cupy.engine.figures import side_by_side

        return side_by_side([("", self)])

    def to_dict(self) -> dict[str, Any]:
        """All fields and the derived figures, ready for JSON."""
        derived = ("hit_rate", "bytes_per_token", "prompt_tok_s", "decode_tok_s")
        return asdict(self) | {name: getattr(self, name) for name in derived}
