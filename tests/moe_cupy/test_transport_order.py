"""Two tiers: no slot or slab is overwritten under a reader, no kernel runs before its copy, demand goes first.

On the emulated device under a scheduler (tests/adversary.py) that delays every stream, worker or the host to the last
moment which the events allow, in all orders: each kernel looks at what it reads. The order of calls is checked besides
on the stand-in for CuPy, whose log holds all waits. Planted bugs must be found by both, every time.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections import defaultdict
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adversary import COMPUTE, COPY, GIVE, HOST, LANES, READ, AdversarialDevice, Job, Order
from fake_cupy import Cupy

from moe_cupy.device.cuda import CudaDevice
from moe_cupy.device.threads import ThreadEvent
from moe_cupy.engine import Engine
from moe_cupy.engine.transport import DEMAND, PREFETCH, Arrival, after_all
from moe_cupy.kernels.cuda.launches import Launch
from moe_ref.finite import NonFiniteError
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
    """Looks at what the kernels of experts read when they run, and at which copies are behind which."""

    def __init__(self, engine: Engine):
        self.engine, self.wrong, self.kernels = engine, list[str](), 0
        self.device: Any = engine.device
        self.meant: list[tuple[Any, np.ndarray]] = []  # of the op whose launches are being made
        self.waiting: list[int] = []  # urgencies of the copies that were given to the stream and are not done
        self.copies, self.most_before_demand = 0, 0
        self._run, self._copy, self._launch = self.device.run, self.device.copy_async, engine.forward._launch
        self.device.run, self.device.copy_async, engine.forward._launch = self.run, self.copy, self.launch
        self.slots = [memory.ctypes.data for memory in engine.mover._slots]
        self.giver = next(q for q in self.device._queues if q is engine.mover.transport._queue)
        self.giver.released = self.released

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
        meant = self.meant if launch.kernel.startswith(("expert_", "gemm")) else []
        if meant:
            self.kernels += 1
            stream.run(lambda: self.look(meant, launch.kernel))
        self._run(launch, stream)

    def look(self, meant: Any, kernel: str) -> None:
        self.wrong += [kernel for w, expected in meant if not np.array_equal(w.data, expected)]

    def copy(self, dst: Any, src: Any, stream: Any) -> None:
        if dst.ctypes.data not in self.slots:
            self._copy(dst, src, stream)
            return
        self.copies += 1
        self.waiting.append(self.giver.running.urgency)
        self._copy(dst, src, stream)
        stream.run(lambda: self.waiting.pop(0))

    def released(self, job: Job) -> None:
        """How many prefetched slabs are before a demand load that may begin now."""
        if job.urgency == DEMAND:
            self.most_before_demand = max(self.most_before_demand, self.waiting.count(PREFETCH))


def watched(model: Path, order: Order, plant: Any = None, **options: Any) -> tuple[Watch, np.ndarray]:
    """A prompt and some single tokens under one order."""
    options = {"cache": "slots:3", "host_cache": "slots:3", "prefetch": "next-gate", **options}
    with Engine(model, _device=AdversarialDevice(order), **options) as engine:
        watch = Watch(engine)
        if plant is not None:
            plant(engine)
        logits = np.empty(0)
        with nullcontext() if plant is None else suppress(NonFiniteError):  # what was read too early may be anything
            logits = engine.logits(TOKENS)
            engine.reset()
            for token in TOKENS[:4]:
                engine.decode(int(token))
        return watch, logits


HOST_FIRST = [(HOST, *rest) for rest in itertools.permutations((COMPUTE, COPY, READ, GIVE))]


def check(model: Path, want: np.ndarray, order: Order, **options: Any) -> None:
    watch, got = watched(model, order, **options)
    assert watch.kernels >= 6 and watch.copies > 3, "or nothing was tested"
    assert watch.wrong == [] and np.array_equal(got, want), order
    assert watch.most_before_demand <= 1


def test_nothing_is_overwritten_before_it_was_read_and_nothing_read_before_it_is_there(model, want):
    """The host runs as far ahead as it can; all orders of the others."""
    for order in HOST_FIRST:
        check(model, want, order)


@pytest.mark.parametrize(("slots", "slabs"), [(2, 2), (3, 2), (5, 3)])
def test_nor_with_other_sizes_in_random_orders(model, want, slots, slabs):
    for seed in range(6):
        check(model, want, random.Random(seed), cache=f"slots:{slots}", host_cache=f"slots:{slabs}")


@pytest.mark.slow
def test_nor_in_any_order_at_all(model, want):
    for order in itertools.permutations(LANES):
        check(model, want, order)
    for seed in range(100):
        check(model, want, random.Random(seed))


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


# Each with the order that shows it: what comes too early first, what it should have waited for last.
PLANTED = {
    no_kernel_waits: (HOST, COMPUTE, READ, GIVE, COPY),
    copies_do_not_wait_for_kernels: (HOST, READ, GIVE, COPY, COMPUTE),
    reads_do_not_wait_for_copies: (HOST, READ, GIVE, COMPUTE, COPY),
    copies_do_not_wait_for_reads: (HOST, GIVE, COPY, COMPUTE, READ),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_a_missing_wait_is_seen(model, plant):
    """A schedule is a function of its order: what is seen once is seen always."""
    first, second = (watched(model, PLANTED[plant], plant)[0].wrong for _ in range(2))
    assert first and first == second


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


@pytest.mark.parametrize("plant", list(PLANTED)[:2], ids=lambda f: f.__name__)
def test_the_log_shows_a_missing_wait(model, plant):
    assert unordered(model, plant)[1]


# Demand before prefetch


def before_demand(model: Path) -> int:
    """Of 6 prefetches asked for before a demand load, how many are copied before it, if the copy stream dawdles."""
    copied: list[Any] = []
    with Engine(model, _device=AdversarialDevice(LANES[1:]), cache="100%", host_cache="100%") as engine:
        transport, device, slots = engine.mover.transport, engine.device, engine.mover.slots
        for key in range(8):  # all of them page-locked already
            transport.tier.find(key, DEMAND)[2].synchronize()
        real = device.copy_async
        device.copy_async = lambda dst, src, stream: (copied.append(dst.ctypes.data), real(dst, src, stream))
        device.baton.order = (READ, GIVE, HOST, COMPUTE, COPY)  # workers do what they can before the host goes on
        arrivals = [transport.start(key, slots[key], PREFETCH, None) for key in range(6)]
        arrivals.append(transport.start(6, slots[6], DEMAND, None))
        transport.promote(arrivals[5], DEMAND)
        for arrival in arrivals:
            arrival.synchronize()
    order = [next(i for i, slot in enumerate(slots) if slot.ctypes.data == at) for at in copied]
    assert sorted(order) == list(range(7)) and order.index(5) < order.index(1), "one that is joined goes before others"
    return sum(key != 5 for key in order[: order.index(6)])


def test_a_demand_load_is_behind_at_most_one_prefetched_slab(model):
    """And in every schedule above: ``most_before_demand``."""
    assert before_demand(model) == 1


def test_without_that_rule_a_demand_load_waits_for_all_prefetches(model, monkeypatch):
    """The planted bug: a worker that does not wait for its prefetches fills the copy stream with them."""
    monkeypatch.setattr("moe_cupy.engine.transport.PREFETCH", -1)
    with pytest.raises(AssertionError, match="one that is joined"):
        before_demand(model)


def test_nor_does_it_hold_in_a_whole_engine(model, monkeypatch):
    monkeypatch.setattr("moe_cupy.engine.transport.PREFETCH", -1)
    watch, _ = watched(model, (HOST, READ, GIVE, COMPUTE, COPY), cache="slots:12", host_cache="slots:24")
    assert watch.most_before_demand > 1


def test_a_wait_for_nothing_is_told():
    device = AdversarialDevice(LANES)
    stream, never = device.stream("compute"), ThreadEvent()
    stream.wait(never, "")
    with pytest.raises(AssertionError, match="waits for what nothing will do"):
        stream.record().synchronize()
    device.close()


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
