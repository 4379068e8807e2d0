"""What an engine counts: tokens and seconds of its passes, and what its caches did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_cupy.cache import Counters
from moe_cupy.device.base import Device
from moe_cupy.engine.driven import DrivenForward
from moe_cupy.engine.experts import ExpertMover
from moe_cupy.engine.forward import WAIT_EXPERTS
from moe_cupy.engine.options import Options
from moe_cupy.engine.placement import Placement
from moe_cupy.engine.split import Split
from moe_cupy.engine.stats import Stats
from moe_cupy.plan.rules import CPU


class Counted:
    """The counters of an ``Engine``, which has these parts."""

    device: Device
    split: Split
    options: Options
    placement: Placement
    mover: ExpertMover | None  # of the device with the output
    movers: dict[str, ExpertMover]
    forward: Any
    _stats: Stats
    _stalled_before: float

    @property
    def stats(self) -> Stats:
        """The counters so far."""
        if isinstance(self.forward, DrivenForward):
            self.forward.pools.to_host()
        stalled = self._stalled() - self._stalled_before
        moved: dict[str, Any] = self.mover.counters() if self.mover is not None else {}
        if self.split.is_divided and CPU in self.movers:
            cpu = self.movers[CPU].counters()
            moved |= {"cpu_experts": cpu["hits"] + cpu["misses"], "cpu_misses": cpu["misses"]}
        return replace(self._stats, stall_us=int(1e6 * stalled), **moved)

    def reset_stats(self) -> None:
        """Start counting from zero; what is resident stays."""
        self._stalled_before = self._stalled()
        if isinstance(self.forward, DrivenForward):
            self.forward.pools.to_host()
        for mover in self.movers.values():
            mover.late = mover.bytes_demand = mover.bytes_prefetch = 0
            for pool in (*mover.cache.pools, *mover.transport.pools):
                pool.counters = Counters()
        self._stats = Stats(
            device=self.device.name,
            policy=self.options.policy,
            prefetch=self.options.prefetch,
            decode=self.options.decode if isinstance(self.forward, DrivenForward) else "host",
            cache_slots=self.placement.slots,
            cache_bytes=self.placement.cache_bytes,
            experts=self.placement.experts,
        )

    def _stalled(self) -> float:
        return sum(device.stalls().get(WAIT_EXPERTS, 0.0) for device in self.split.devices.values())

    def _count(self, tokens: int, seconds: float, once: float, is_prompt: bool) -> None:
        """``seconds`` that a pass took, ``once`` of them for kernels that were used for the first time."""
        s, seconds = replace(self._stats, warmup_seconds=self._stats.warmup_seconds + once), seconds - once
        if is_prompt:
            self._stats = replace(s, prompt_tokens=s.prompt_tokens + tokens, prompt_seconds=s.prompt_seconds + seconds)
        else:
            self._stats = replace(
                s, decoded_tokens=s.decoded_tokens + tokens, decoded_seconds=s.decoded_seconds + seconds
            )

    def _count_generated(self) -> None:
        self._stats = replace(self._stats, generated_tokens=self._stats.generated_tokens + 1)
