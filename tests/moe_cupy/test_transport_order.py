"""Two tiers: no slot or slab is overwritten under a reader, no kernel runs before its copy, demand goes first.

Real concurrency on the emulated device: copies and kernels are slowed down, and each checks what it reads. The order
of calls is checked besides on the stand-in for CuPy, whose log holds all waits. Planted bugs must be found by both.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cupy import Cupy

from moe_cupy.device.cuda import CudaDevice
from moe_cupy.device.threads import ThreadEvent
from moe_cupy.engine import Engine
from moe_cupy.engine.transport import DEMAND, PREFETCH, Arrival, after_all
from moe_cupy.kernels.cuda.launches import Launch
from tests.models import Shape, tiny_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: the emulated device needs it")
SHAPE = Shape(layers=3, experts=8, used=2)
TOKENS = np.arange(3, 13)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", SHAPE, seed=3)


@pytest.fixture(scope="module")
def want(model) -> np.ndarray:
    with Engine(model, cache="100%", device="emulated") as engine:
        return engine.logits(TOKENS)


class Watch:
    """Slows copies into slots and the kernels that read them, and looks, before and after, at what they read."""

    def __init__(self, engine: Engine, delay: float = 0.002):
        self.engine, self.delay, self.wrong, self.kernels, self.copies = engine, delay, [], 0, 0
        self.device: Any = engine.device
        self.meant: list[tuple[Any, np.ndarray]] = []  # of the op whose launches are being made
        self._run, self._copy, self._launch = self.device.run, self.device.copy_async, engine.forward._launch
        self.device.run, self.device.copy_async, engine.forward._launch = self.run, self.copy, self.launch
        self.slots = [memory.ctypes.data for memory in engine.mover._slots]

    def launch(self, op: str, **buffers: Any) -> None:
        self.meant = [(w, self.bytes_of(w)) for w in buffers["down"]] if op == "experts" else []
        self._launch(op, **buffers)
        self.meant = []

    def bytes_of(self, w: Any) -> np.ndarray:
        """What the file has for the matrix that ``w`` says it is."""
        mover = self.engine.mover
        key = next(k for k, s in self.resident() if mover._matrices[s]["down"] is w)
        layer, expert = divmod(key, SHAPE.experts)
        tensor = mover.layout.layers[layer][2]
        return self.engine.file.read(tensor.name, expert * tensor.nbytes, tensor.nbytes)

    def resident(self) -> list[tuple[int, int]]:
        return [pair for pool in self.engine.mover.cache.pools for pair in pool.slot_of.items()]

    def run(self, launch: Launch, stream: Any) -> None:
        meant = self.meant if launch.kernel.startswith(("expert_down", "gemm")) else []
        stream.run(lambda: self.look(meant, launch.kernel, "before"))
        self._run(launch, stream)
        if meant:
            stream.run(lambda: time.sleep(self.delay))
            stream.run(lambda: self.look(meant, launch.kernel, "after"))
            self.kernels += 1

    def look(self, meant: Any, kernel: str, when: str) -> None:
        self.wrong += [(kernel, when) for w, expected in meant if not np.array_equal(w.data, expected)]

    def copy(self, dst: Any, src: Any, stream: Any) -> None:
        if dst.ctypes.data not in self.slots:
            self._copy(dst, src, stream)
            return
        self.copies += 1
        before: list[np.ndarray] = []
        stream.run(lambda: before.append(src.copy()))
        stream.run(lambda: time.sleep(self.delay))
        self._copy(dst, src, stream)
        stream.run(lambda: np.array_equal(before[0], src) or self.wrong.append(("copy", "slab changed")))


def watched(model: Path, plant: Any = None, **options: Any) -> tuple[Watch, np.ndarray]:
    options = {"cache": "slots:3", "host_cache": "slots:3", "prefetch": "next-gate", **options}
    with Engine(model, device="emulated", **options) as engine:
        watch = Watch(engine)
        if plant is not None:
            plant(engine)
        return watch, engine.logits(TOKENS)


@pytest.mark.parametrize(("slots", "slabs"), [(2, 2), (3, 2), (3, 5), (5, 3)])
def test_nothing_is_overwritten_while_it_is_read_and_nothing_read_before_it_is_there(model, want, slots, slabs):
    watch, got = watched(model, cache=f"slots:{slots}", host_cache=f"slots:{slabs}")
    assert watch.kernels >= 6 and watch.copies > slots, "or nothing was tested"
    assert watch.wrong == []
    assert np.array_equal(got, want)


def no_kernel_waits(engine: Engine) -> None:
    engine.mover.transport.wait = lambda stream, event, reason: None


def copies_do_not_wait_for_kernels(engine: Engine) -> None:
    engine.mover.used = lambda held, event: None


def reads_do_not_wait_for_copies(engine: Engine) -> None:
    engine.mover.transport.tier.leaves = lambda slab, arrival: None


def copies_do_not_wait_for_reads(engine: Engine) -> None:
    tier = engine.mover.transport.tier
    find = tier.find
    tier.find = lambda key, urgency: (*find(key, urgency)[:2], None)


PLANTED = [no_kernel_waits, copies_do_not_wait_for_kernels, reads_do_not_wait_for_copies, copies_do_not_wait_for_reads]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_a_missing_wait_is_seen(model, plant):
    assert any(watched(model, plant)[0].wrong for _ in range(3))


# The order of calls, on the stand-in for CuPy


def happens_before(log: list[tuple[str, str, Any]]) -> dict[int, set[int]]:
    """Index in the log of each copy and launch -> indices of those that are over by then, from events alone."""
    on_stream: defaultdict[int, set[int]] = defaultdict(set)  # what is over before a stream's next work
    by_thread: defaultdict[str, set[int]] = defaultdict(set)  # and what a thread has learned to be over
    at_event: defaultdict[int, set[int]] = defaultdict(set)
    order = {}
    for i, (call, thread, detail) in enumerate(log):
        if call in ("launch", "copy"):
            on_stream[detail[-1]] |= by_thread[thread]
            order[i] = set(on_stream[detail[-1]])
            on_stream[detail[-1]].add(i)
        elif call == "record":
            at_event[detail[1]] = set(on_stream[detail[0]])
        elif call == "wait":
            on_stream[detail[0]] |= at_event[detail[1]]
        elif call in ("Event.synchronize", "done"):
            by_thread[thread] |= at_event[detail]
    return order


def unordered(model: Path, plant: Any = None) -> tuple[int, list[str]]:
    """How many copies into slots and kernels that read them there were, and which of them no event orders."""
    cupy, reads, wrong = Cupy(), {}, []
    with Engine(model, _device=CudaDevice(cupy), cache="slots:2", host_cache="slots:3") as engine:
        slots = [(memory.data.ptr, memory.data.ptr + memory.nbytes) for memory in engine.mover._slots]
        real = engine.forward._launch

        def launch(op: str, **buffers: Any) -> None:
            real(op, **buffers)
            if op == "experts":
                last = max(i for i, (call, _, d) in enumerate(cupy.log) if call == "launch" and "expert_down" in d[0])
                at = [w.data.data.ptr for w in buffers["down"]]
                reads[last] = {s for s, (a, b) in enumerate(slots) for address in at if a <= address < b}

        engine.forward._launch = launch
        if plant is not None:
            plant(engine)
        for token in TOKENS:
            engine.decode(int(token))
    order, begins = happens_before(cupy.log), {a: s for s, (a, _) in enumerate(slots)}
    copies = {i: begins[d[0]] for i, (call, _, d) in enumerate(cupy.log) if call == "copy" and d[0] in begins}
    for i, some in reads.items():
        for slot in some:
            last = max((c for c, s in copies.items() if s == slot and c < i), default=-1)
            wrong += [f"kernel {i} does not wait for copy {last}"] * (last not in order[i])
    for i, slot in copies.items():
        earlier = {k for k, some in reads.items() if slot in some and k < i}
        wrong += [f"copy {i} does not wait for kernel {k}" for k in earlier - order[i]]
    return min(len(copies), len(reads)), wrong


def test_events_order_every_copy_into_a_slot_and_every_kernel_that_reads_it(model):
    """By the log of calls alone: it says nothing of how fast anything was."""
    count, wrong = unordered(model)
    assert count > 20 and wrong == []


@pytest.mark.parametrize("plant", PLANTED[:2], ids=lambda f: f.__name__)
def test_the_log_shows_a_missing_wait(model, plant):
    assert unordered(model, plant)[1]


# Demand before prefetch


def test_a_demand_load_is_behind_at_most_one_prefetched_slab(model):
    """Prefetches are asked for first, all of them; the demand load is copied second at the latest."""
    copied: list[Any] = []
    with Engine(model, device="emulated", cache="100%", host_cache="100%") as engine:
        transport, device = engine.mover.transport, engine.device
        slots = engine.mover._slots
        for key in range(8):  # all of them page-locked already
            transport.tier.find(key, DEMAND)[2].synchronize()
        real = device.copy_async

        def slow(dst: Any, src: Any, stream: Any) -> None:
            copied.append(dst.ctypes.data)
            stream.run(lambda: time.sleep(0.02))
            real(dst, src, stream)

        device.copy_async = slow
        arrivals = [transport.start(key, slots[key], PREFETCH, None) for key in range(6)]
        time.sleep(0.005)
        arrivals.append(transport.start(6, slots[6], DEMAND, None))
        transport.promote(arrivals[5], DEMAND)
        for arrival in arrivals:
            arrival.synchronize()
    order = [next(i for i, slot in enumerate(slots) if slot.ctypes.data == at) for at in copied]
    assert order[0] == 0 and order.index(6) <= 2 and order.index(5) <= 2, order


def test_without_that_rule_a_demand_load_waits_for_all_prefetches(model, monkeypatch):
    """The planted bug: a worker that does not wait for its prefetches fills the copy stream with them."""
    monkeypatch.setattr("moe_cupy.engine.transport.PREFETCH", -1)
    with pytest.raises(AssertionError):
        test_a_demand_load_is_behind_at_most_one_prefetched_slab(model)


def test_a_failed_read_is_told_to_whoever_waits_and_is_read_again(model, want, monkeypatch):
    from moe_cupy.store import StoreError

    with Engine(model, device="emulated", cache="slots:3", host_cache="slots:3") as engine:
        store, calls = engine.mover.store, []
        real = store.parts

        def failing(key: int, memory: Any) -> Any:
            calls.append(key)
            return real(key, memory) if len(calls) != 4 else [lambda: (_ for _ in ()).throw(StoreError("planted"))]

        monkeypatch.setattr(store, "parts", failing)
        with pytest.raises(StoreError, match="planted"):
            engine.logits(TOKENS)
        assert np.array_equal(engine.logits(TOKENS), want)


def test_several_events_make_one_that_comes_last():
    first, second, third = ThreadEvent(), ThreadEvent(), ThreadEvent()
    third.finish()
    joined = after_all([first, None, second, third])
    assert joined is not None
    second.finish()
    assert not joined.done()
    first.finish()
    assert joined.done()
    assert after_all([third, None]) is None and after_all([]) is None
    assert after_all([lonely := ThreadEvent(), third]) is lonely
    assert Arrival(3, None).copied is None
