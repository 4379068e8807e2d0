"""How much memory the experts get: from the request to slots, store and cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_cupy.cache import BudgetError, ExpertCache, Geometry, Policy, Request, SizeClass, allot, parse_cache
from moe_cupy.compiled import POLICIES
from moe_cupy.device.base import Device, DeviceError
from moe_cupy.device.memory import free_and_total
from moe_cupy.engine.experts import ExpertMover
from moe_cupy.engine.transport import Direct, HostTier, Transport, TwoTiers, page_locked
from moe_cupy.store import ExpertStore, Layout, open_repacked
from moe_ref.gguf import GGUFFile

AUTO_SHARE_OF_FREE = 0.6  # of free memory that --cache auto takes for experts


@dataclass(frozen=True, slots=True)
class Placement:
    """What was decided, for the report."""

    dense_bytes: int  # resident for good
    routed_bytes: int  # all routed experts, as they stand in the file
    experts: int
    slots: int
    cache_bytes: int
    how_read: str
    reason: str  # where the cache size came from
    host_slots: int = 0  # experts in page-locked memory before the device's

    @classmethod
    def of(cls, dense_bytes: int, mover: ExpertMover | None, reason: str) -> Placement:
        """The placement of a loaded model; ``mover`` is None in a dense one."""
        if mover is None:
            return cls(dense_bytes, 0, 0, 0, 0, "", "no routed experts")
        layout = mover.layout
        return cls(
            dense_bytes=dense_bytes,
            routed_bytes=layout.routed_bytes(),
            experts=layout.expert_total(),
            slots=sum(pool.slots for pool in mover.cache.pools),
            cache_bytes=mover.cache_bytes,
            how_read=mover.store.how,
            reason=reason,
            host_slots=sum(pool.slots for pool in mover.transport.pools),
        )

    def lines(self) -> list[str]:
        """The placement as a person reads it."""
        mib = 1 / 2**20
        share = 100 * self.slots / self.experts if self.experts else 0
        lines = [f"dense part   {self.dense_bytes * mib:9.1f} MiB  resident"]
        if self.experts:
            lines += [
                f"experts      {self.routed_bytes * mib:9.1f} MiB  {self.experts} on disk, {self.how_read}",
                f"expert cache {self.cache_bytes * mib:9.1f} MiB  {self.slots} slots = {share:.0f}% ({self.reason})",
            ]
        if self.host_slots:
            lines.append(f"page-locked  {'':9}      {self.host_slots} of {self.experts} experts, between the two")
        return lines


def size_classes(store: ExpertStore) -> list[SizeClass]:
    """The store's size classes as the budget sees them."""
    layout = store.layout
    return [
        SizeClass(layout.expert_count * layout.class_of_layer.count(i), store.slot_bytes(i))
        for i in range(len(layout.classes))
    ]


def cache_request(
    text: str, classes: list[SizeClass], free_bytes: int, flag: str = "--cache"
) -> tuple[Request, str]:
    """A ``--cache`` value as a request, and a sentence about it; "auto" takes what free memory allows."""
    if text != "auto":
        return parse_cache(text), f"{flag} {text}"
    wanted = sum(c.experts * c.slot_bytes for c in classes)
    allowed = int(free_bytes * AUTO_SHARE_OF_FREE)
    why = f"auto: {AUTO_SHARE_OF_FREE:.0%} of {free_bytes / 2**30:.1f} GiB free"
    return (Request(nbytes=allowed), why) if wanted > allowed else (Request(nbytes=wanted), f"{why} holds all")


def open_store(file: GGUFFile, layout: Layout, repacked: str | None, direct_io: bool) -> ExpertStore:
    """The experts where they lie in ``file``, or in a repacked store, which must have been made from it."""
    if repacked is None:
        return ExpertStore(layout, direct_io)
    store, checksums = open_repacked(repacked, file, layout)
    return ExpertStore(store.full, direct_io, checksums[0])


def place_experts(
    device: Device, store: ExpertStore, used: int, cache: str, policy: str, in_flight: int, host_cache: str = "auto",
    *, make: Callable[[Geometry], Policy] | None = None,
) -> tuple[ExpertMover, str]:  # fmt: skip
    """Allocate the slots; a token uses ``used`` experts of a layer. Closes the store if that fails.

    ``host_cache`` bounds the page-locked experts before a device with memory of its own. Raises BudgetError if a budget
    cannot hold one token's experts, DeviceError if so much cannot be page-locked. ``make`` makes the policy of
    slots, where another object than the usual one decides by its rule.
    """
    layout = store.layout
    try:
        classes = size_classes(store)
        request, reason = cache_request(cache, classes, device.memory()[0])
        slots = allot(request, classes, used)
        experts = ExpertCache(layout.expert_count, layout.class_of_layer, slots, make or POLICIES[policy])
        transport: Transport = Direct(device, store, in_flight)
        if not device.is_unified:
            transport = TwoTiers(device, host_tier(device, store, used, host_cache, policy, in_flight))
        return ExpertMover(device, store, experts, transport), reason
    except (BudgetError, MemoryError, DeviceError):
        store.close()
        raise


def host_tier(
    device: Device, store: ExpertStore, used: int, cache: str, policy: str, in_flight: int
) -> HostTier:
    """Page-locked memory for experts, as much as was asked for and the system gives."""
    classes, layout = size_classes(store), store.layout
    request, _ = cache_request(cache, classes, free_and_total()[0], "--host-cache")
    wanted = allot(request, classes, used)
    slabs = [page_locked(device, c.slot_bytes, n, min(used, c.experts)) for c, n in zip(classes, wanted, strict=True)]
    held = ExpertCache(layout.expert_count, layout.class_of_layer, list(map(len, slabs)), POLICIES[policy])
    return HostTier(device, store, [slab for of_class in slabs for slab in of_class], held, in_flight)
