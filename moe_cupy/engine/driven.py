"""Decoding driven by the device: which expert is where is decided by kernels, and a token is one graph launch.

All experts lie in page-locked memory that kernels can read. After a layer's router, ``resolve`` finds the slots of the
chosen experts and whom a missing one replaces (LRU), ``fill`` brings what is missing, and the expert kernels follow,
all in one stream: ids never go to the host. What changes from token to token (id, position, rotations) is sent into
fixed buffers before; so the launches of one token can be captured and launched again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_cupy.cache import BudgetError, allot
from moe_cupy.device.base import DeviceError
from moe_cupy.engine import networks
from moe_cupy.engine.block import Block
from moe_cupy.engine.forward import Forward
from moe_cupy.engine.placement import Placement, cache_request, size_classes
from moe_cupy.engine.transport import page_locked
from moe_cupy.kernels.cuda.expert_ops import Resident, resident_experts
from moe_cupy.kernels.cuda.launches import Residency
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.store import MATRICES, ExpertStore
from moe_cupy.store.files import align_up

ALIGNMENT = 64  # of a matrix in its slab
HITS, MISSES, EVICTIONS = 1, 2, 3  # where ``resolve`` counts in its state


@dataclass(frozen=True, slots=True)
class SlotClass:
    """The slots of one size class, and the integers that say what is in them."""

    resident: Resident
    slots: int
    slab_bytes: int


class ResidentExperts:
    """Every expert in page-locked memory, packed as in a slot, and slots under LRU on the device."""

    def __init__(self, device: Any, store: ExpertStore, slots: list[int]):
        self.device, self.layout, self.slots = device, store.layout, slots
        experts, layers = self.layout.expert_count, range(len(self.layout.layers))
        self._before: dict[str, int] = {}
        self._slabs: list[Any] = []  # kernels know but their addresses
        self._sources = np.zeros(len(self.layout.layers) * experts, np.uint64)
        for index in range(len(self.layout.classes)):
            mine = [layer for layer in layers if self.layout.class_of_layer[layer] == index]
            keys = [layer * experts + e for layer in mine for e in range(experts)]
            slabs = page_locked(device, self._slab_bytes(index), len(keys), len(keys))
            room = device.pinned(store.slot_bytes(index))
            self._slabs += slabs
            for key, slab in zip(keys, slabs, strict=True):
                self._pack(store, key, room, slab)
                self._sources[key] = device.address(slab)
        self._source_table = self._sent(self._sources)
        self.classes = [self._slot_class(index, n) for index, n in enumerate(slots)]
        self.cache_bytes = sum(c.slots * c.slab_bytes for c in self.classes)

    def placement(self, dense_bytes: int, how_read: str, reason: str) -> Placement:
        """What was decided, for the report."""
        total = self.layout.expert_total()
        return Placement(
            dense_bytes, self.layout.routed_bytes(), total, sum(self.slots), self.cache_bytes, how_read, reason, total
        )

    def of_layer(self, layer: int) -> tuple[Resident, int]:
        """The slots of a layer's experts, and the key of its first."""
        return self.classes[self.layout.class_of_layer[layer]].resident, layer * self.layout.expert_count

    def reset_counters(self) -> None:
        """Count from here on."""
        self._before = dict.fromkeys(self._before, 0)
        self._before = self.counters()

    def empty(self) -> None:
        """No expert is in a slot, and nothing was ever used."""
        stream = self.device.stream("compute")
        for one in self.classes:
            lru = one.resident.lru
            for array, value in ((lru.state, 0), (lru.slot_of, -1), (lru.key_of, -1), (lru.last_use, 0)):
                self.device.put(array, np.full(array.shape, value, np.int32), stream)

    def counters(self) -> dict[str, int]:
        """Hits, misses, evictions and bytes as the device counted them; waits for it."""
        stream = self.device.stream("compute")
        states = [self.device.fetch(f"state {i}", c.resident.lru.state, stream) for i, c in enumerate(self.classes)]
        stream.record().synchronize()
        misses = [int(state[MISSES]) for state in states]
        now = {
            "hits": sum(int(state[HITS]) for state in states), "misses": sum(misses),
            "evictions": sum(int(state[EVICTIONS]) for state in states),
            "bytes_demand": sum(n * c.slab_bytes for n, c in zip(misses, self.classes, strict=True)),
        }  # fmt: skip
        return {name: value - self._before.get(name, 0) for name, value in now.items()}

    def _offsets(self, index: int) -> list[int]:
        """Where gate, up and down begin in a slab of this class, and where it ends."""
        ends = [0]
        for tensor in self.layout.classes[index]:
            ends.append(align_up(ends[-1] + tensor.nbytes, ALIGNMENT))
        return ends

    def _slab_bytes(self, index: int) -> int:
        return self._offsets(index)[-1]

    def _pack(self, store: ExpertStore, key: int, room: np.ndarray, slab: np.ndarray) -> None:
        store.read(key, room)
        index = self.layout.class_of_layer[key // self.layout.expert_count]
        for (_, part), at in zip(store.views(key, room).items(), self._offsets(index)[:-1], strict=True):
            slab[at : at + part.nbytes] = part

    def _sent(self, values: np.ndarray) -> Any:
        return self.device.upload(values).view(values.dtype).reshape(values.shape)

    def _slot_class(self, index: int, slots: int) -> SlotClass:
        size, at = self._slab_bytes(index), self._offsets(index)
        memory = self.device.alloc(size * slots)
        begins = self.device.address(memory) + size * np.arange(slots, dtype=np.uint64)
        like = [Matrix(t.type, t.rows, t.cols, memory[: t.nbytes]) for t in self.layout.classes[index]]
        lru = Residency(
            self._sent(np.zeros(6, np.int32)), self._sent(np.full(len(self._sources), -1, np.int32)),
            self._sent(np.full(slots, -1, np.int32)), self._sent(np.zeros(slots, np.int32)),
        )  # fmt: skip
        tables = {name: self._sent(begins + np.uint64(at[i])) for i, name in enumerate(MATRICES)}
        shapes = dict(zip(MATRICES, like, strict=True))
        return SlotClass(Resident(lru, self._sent(begins), self._source_table, tables, shapes, size), slots, size)


class DrivenForward(Forward):
    """One token at a time: eagerly until all memory is there, then as a graph, one for each parity of the states."""

    device: Any  # has graphs

    def __init__(self, device: Any, *args: Any, experts: ResidentExperts):
        super().__init__(device, *args)
        self.experts = experts
        self._position = device.array((1,), np.int32)
        self._seen: set[int] = set()
        self._graphs: dict[int, tuple[Any, Any]] = {}  # parity -> graph, logits
        device.workspace(self.stream).position = self._position

    def _launched(self, tokens: np.ndarray, kv: Any, last_only: bool) -> Any:
        """Logits [1, vocab] of one token, in device memory."""
        if len(tokens) != 1:
            raise ValueError(f"{len(tokens)} tokens at once; the device decodes one at a time")
        run = self._begin(tokens, kv)
        self.device.put(self._position, np.array([kv.length], np.int32), self.stream)
        if kv.length == 0 or kv.parity not in self._seen:
            logits = self._pass(run, last_only)
            self._seen |= {kv.parity} if kv.length else set()
        else:
            if kv.parity not in self._graphs:
                with self.device.capture(self.stream) as graph:
                    self._graphs[kv.parity] = graph, self._pass(run, last_only)
            graph, logits = self._graphs[kv.parity]
            self.device.replay(graph, self.stream)
        return logits

    def _moe(self, block: Block) -> None:
        c = self.config
        h, logits = networks.router_logits(block)
        ids, weights = networks.route(block, logits)
        parts = block.buffer("parts", c.expert_used_count, c.embedding_length)
        resident, first_key = self.experts.of_layer(block.layer.index)
        self.device.launch_all(
            resident_experts, self.stream, x=h, ids=ids, resident=resident, first_key=first_key, parts=parts,
            weights=weights if c.quirks.weigh == "input" else None, activation=c.quirks.activation,
            **block.weights.of_experts(),
        )  # fmt: skip
        networks.join(block, parts, weights, networks.beside(block, h))


def place_resident(device: Any, store: ExpertStore, used: int, cache: str) -> tuple[ResidentExperts, str]:
    """Page-lock all experts and allocate slots. Closes the store if that fails.

    Raises BudgetError if the budget cannot hold one token's experts, DeviceError where a device cannot drive.
    """
    try:
        if device.is_unified:
            raise DeviceError(f"--decode device: the {device.name} device has no memory of its own; use --decode host")
        classes = size_classes(store)
        request, reason = cache_request(cache, classes, device.memory()[0])
        return ResidentExperts(device, store, allot(request, classes, used)), reason
    except (BudgetError, MemoryError, DeviceError):
        store.close()
        raise
