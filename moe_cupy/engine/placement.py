"""How much memory the experts get: from the request to slots, store and cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_cupy.cache import ExpertCache, Geometry, Policy, Request, SizeClass, allot, parse_cache
from moe_cupy.compiled import POLICIES
from moe_cupy.device.base import Device
from moe_cupy.device.memory import free_and_total
from moe_cupy.engine.experts import ExpertMover
from moe_cupy.engine.split import Split
from moe_cupy.engine.transport import Direct, HostTier, Transport, TwoTiers, page_locked
from moe_cupy.plan.rules import CPU, GPU
from moe_cupy.store import ExpertStore, Layout, open_repacked
from moe_ref.gguf import GGUFFile

MakePolicy = Callable[[Geometry], Policy]
HOST_CACHE = "--host-cache"
AUTO_SHARE_OF_FREE = 0.6  # of free memory that --cache auto takes for experts


@dataclass(frozen=True, slots=True)
class Placement:
    """What was decided, for the report. On a device with memory of its own, ``cpu`` is what the CPU computes."""

    dense_bytes: int  # resident for good in the device's memory
    routed_bytes: int  # routed experts that the device computes, as they stand in the file
    experts: int
    slots: int
    cache_bytes: int
    how_read: str
    reason: str  # where the cache size came from
    host_slots: int = 0  # experts in page-locked memory before the device's
    cpu: CpuPart | None = None

    @classmethod
    def of(
        cls, split: Split, dense_bytes: Mapping[str, int], movers: Mapping[str, ExpertMover], reason: str
    ) -> Placement:
        """The placement of a loaded model, whose dense part and movers are given by device."""
        mover, cpu = movers.get(split.main), CpuPart.of(split, dense_bytes, movers)
        if mover is None:
            return cls(dense_bytes[split.main], 0, 0, 0, 0, cpu.how_read if cpu else "", "no routed experts", cpu=cpu)
        layout = mover.layout
        return cls(
            dense_bytes=dense_bytes[split.main],
            routed_bytes=layout.routed_bytes(),
            experts=layout.expert_total(),
            slots=sum(pool.slots for pool in mover.cache.pools),
            cache_bytes=mover.cache_bytes,
            how_read=mover.store.how,
            reason=reason,
            host_slots=sum(pool.slots for pool in mover.transport.pools),
            cpu=cpu,
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
        if not self.experts and not (self.cpu and self.cpu.experts):
            lines.append("experts                     none in this file: what is asked of their cache has no effect")
        elif not self.experts:
            lines.append("expert cache                none: the CPU computes all experts; --cache has no effect, "
                         "--host-cache bounds them")  # fmt: skip
        return lines + (self.cpu.lines() if self.cpu else [])


@dataclass(frozen=True, slots=True)
class CpuPart:
    """What lies in host memory of a model that runs on a device with memory of its own, and is computed there."""

    dense_bytes: int
    homes: Sequence[int]  # layers that the CPU computes
    layers: Sequence[int]  # layers whose routed experts it computes
    experts: int = 0
    routed_bytes: int = 0
    slots: int = 0
    cache_bytes: int = 0
    how_read: str = ""

    @classmethod
    def of(cls, split: Split, dense_bytes: Mapping[str, int], movers: Mapping[str, ExpertMover]) -> CpuPart | None:
        """None where the device asked for has no memory of its own."""
        if split.main == CPU:
            return None
        homes = [layer for layer, at in enumerate(split.homes[:-1]) if at == CPU]
        if CPU not in movers:
            return cls(dense_bytes[CPU], homes, ())
        mover = movers[CPU]
        layout = mover.layout
        layers = [i for i, tensors in enumerate(layout.layers) if tensors]
        slots = sum(pool.slots for pool in mover.cache.pools)
        how = layout.expert_total(), layout.routed_bytes(), slots, mover.cache_bytes, mover.store.how
        return cls(dense_bytes[CPU], homes, layers, *how)

    def lines(self) -> list[str]:
        """As a person reads it."""
        mib = 1 / 2**20
        whole = f"computes {ranges(self.homes)} and" if self.homes else "computes"
        lines = [f"in RAM       {self.dense_bytes * mib:9.1f} MiB  of the dense part"]
        if self.experts:
            share = f"{self.slots} slots = {100 * self.slots / self.experts:.0f}% in RAM"
            lines.append(f"CPU experts  {self.routed_bytes * mib:9.1f} MiB  {whole} the {self.experts} experts of "
                         f"{ranges(self.layers)}; {share}")  # fmt: skip
        elif self.homes:
            lines.append(f"CPU          {'':9}      computes {ranges(self.homes)}")
        return lines


def ranges(numbers: Sequence[int]) -> str:
    """Layers 0, 1, 2, 5 -> "layers 0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    said = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' * (len(numbers) > 1)} {said}"


def size_classes(store: ExpertStore) -> list[SizeClass]:
    """The store's size classes as the budget sees them."""
    layout = store.layout
    return [
        SizeClass(layout.expert_count * layout.class_of_layer.count(i), store.slot_bytes(i))
        for i in range(len(layout.classes))
    ]


def cache_request(text: str, classes: list[SizeClass], free_bytes: int, flag: str = "--cache") -> tuple[Request, str]:
    """A ``--cache`` value as a request, and a sentence about it; "auto" takes what free memory allows."""
    if text != "auto":
        return parse_cache(text, flag), f"{flag} {text}"
    wanted = sum(c.experts * c.slot_bytes for c in classes)
    allowed = int(free_bytes * AUTO_SHARE_OF_FREE)
    why = f"auto: {AUTO_SHARE_OF_FREE:.0%} of {free_bytes / 2**30:.1f} GiB free"
    return (Request(nbytes=allowed), why) if wanted > allowed else (Request(nbytes=wanted), f"{why} holds all")


def open_stores(
    split: Split, file: GGUFFile, layout: Layout, options: Any, resources: list[Any]
) -> dict[str, ExpertStore]:
    """A store for each device that computes experts, of its layers; added to what has to be closed."""
    stores = {}
    for at in split.devices:
        layers = split.layers_of_experts(at)
        if any(layout.layers[i] for i in layers):
            stores[at] = open_store(file, layout, options.store, options.direct_io, layers)
            resources.append(stores[at])
    return stores


def open_store(
    file: GGUFFile, layout: Layout, repacked: str | None, direct_io: bool, layers: Collection[int]
) -> ExpertStore:
    """The experts of some layers where they lie in ``file``, or in a repacked store, which must be of this file."""
    checksums = None
    if repacked is not None:
        store, all_checksums = open_repacked(repacked, file, layout)
        layout, checksums = store.full, all_checksums[0]
    return ExpertStore(layout.only(layers), direct_io, checksums)


def place_experts(
    device: Device, store: ExpertStore, used: int, cache: str, policy: str, in_flight: int,
    host_slots: Sequence[int] = (), *, make: MakePolicy | None = None,
) -> tuple[ExpertMover, str]:  # fmt: skip
    """Allocate the slots; a token uses ``used`` experts of a layer.

    ``host_slots`` are the page-locked experts of each class before a device with memory of its own. Raises BudgetError
    if a budget cannot hold one token's experts, DeviceError if so much cannot be page-locked. ``make`` makes the
    policy of the slots, where another object than the usual one decides by its rule.
    """
    classes = size_classes(store)
    request, reason = cache_request(cache, classes, device.memory()[0])
    transport: Transport = Direct(device, store, in_flight)
    slots = allot(request, classes, used)
    if not device.is_unified:
        transport = TwoTiers(device, host_tier(device, store, used, host_slots, policy, in_flight))
    return mover_of(device, store, slots, policy, transport, make), reason


def mover_of(
    device: Device, store: ExpertStore, slots: list[int], policy: str, transport: Transport,
    make: MakePolicy | None = None,
) -> ExpertMover:  # fmt: skip
    """A mover with so many slots of each class."""
    layout = store.layout
    cache = ExpertCache(layout.expert_count, layout.class_of_layer, slots, make or POLICIES[policy])
    return ExpertMover(device, store, cache, transport)


def place_movers(
    split: Split, stores: Mapping[str, ExpertStore], used: int, options: Any
) -> tuple[dict[str, ExpertMover], str]:
    """Who moves the experts of each device that has a store, with what memory; and a sentence about the cache.

    ``used`` is the experts of one token in a layer, ``options`` those of the engine.
    """
    o, movers, reason = options, {}, ""
    divided = GPU in split.devices and stores
    in_ram = host_slots(list(stores.values()), used, o.host_cache) if divided else [[]] * len(stores)
    for (at, store), slots in zip(stores.items(), in_ram, strict=True):
        device = split.devices[at]
        if at == CPU and split.is_divided:
            movers[at] = mover_of(device, store, slots, o.policy, Direct(device, store, o.reads_in_flight))
        else:
            sizes = o.cache, o.policy, o.reads_in_flight, slots
            movers[at], reason = place_experts(device, store, used, *sizes)
    return movers, reason


def host_slots(stores: Sequence[ExpertStore], used: int, cache: str) -> list[list[int]]:
    """How many experts of each class of each store ``--host-cache`` lets be in host memory, all to the same share."""
    classes = [size_classes(store) for store in stores]
    every = [c for some in classes for c in some]
    request, _ = cache_request(cache, every, free_and_total()[0], HOST_CACHE)
    wanted = iter(allot(request, every, used, HOST_CACHE))
    return [[next(wanted) for _ in some] for some in classes]


def host_tier(
    device: Device, store: ExpertStore, used: int, wanted: Sequence[int], policy: str, in_flight: int
) -> HostTier:
    """Page-locked memory for experts, as much as was wanted and the system gives."""
    classes, layout = size_classes(store), store.layout
    slabs = [page_locked(device, c.slot_bytes, n, min(used, c.experts)) for c, n in zip(classes, wanted, strict=True)]
    held = ExpertCache(layout.expert_count, layout.class_of_layer, list(map(len, slabs)), POLICIES[policy])
    return HostTier(device, store, [slab for of_class in slabs for slab in of_class], held, in_flight)
