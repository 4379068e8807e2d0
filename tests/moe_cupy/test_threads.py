"""Streams run in order, events order streams, queues serve by urgency; failures travel and nothing is left behind."""

from __future__ import annotations

import faulthandler
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from moe_cupy.device import host
from moe_cupy.device.host import HostDevice, RowSplitter
from moe_cupy.device.threads import ThreadEvent

LONG = 300.0  # seconds that nothing here takes unless it hangs
TICK = 0.02  # where a mistake would show itself meanwhile; nothing that is right depends on it


Boom = type("Boom", (Exception,), {})


def boom(error: type[BaseException] = Boom) -> None:
    raise error("planted")


@pytest.fixture(autouse=True)
def no_hang_and_no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    faulthandler.dump_traceback_later(3 * LONG, exit=True)  # should a bound below fail to hold
    yield
    faulthandler.cancel_dump_traceback_later()
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG)
    assert set(threading.enumerate()) <= before, "threads are left"


def within(seconds: float, call: Callable[[], Any]) -> None:
    """``call``, run on a thread of its own; fails instead of hanging, raises what the call raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"not done after {seconds} s"
    if errors:
        raise errors[0]


def finish_or_free(events: list[Any], seconds: float) -> None:
    """Wait for all events; if that takes too long, let everything go (so that threads can end) and fail."""
    end = time.monotonic() + seconds
    while late := [event for event in events if not event.done()]:
        if time.monotonic() > end:
            for event in late:
                event.finish()
            raise AssertionError(f"deadlock: {len(late)} of {len(events)} events have not come after {seconds} s")
        time.sleep(0.002)


@pytest.fixture
def device() -> Iterator[HostDevice]:
    host = HostDevice(2)
    yield host
    for _ in range(2):  # idempotent
        within(LONG, host.close)


class Watched:
    """An event of a device that says when somebody has begun to wait for it."""

    def __init__(self, event: Any) -> None:
        self.event, self.begun = event, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.event, name)

    def block(self) -> None:
        self.begun.set()
        self.event.block()

    def awaited(self) -> None:
        assert self.begun.wait(LONG), "nobody waits"


class Gate:  # work that waits to be let through
    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(LONG), "the gate was never opened"

    def inside(self) -> None:
        assert self.entered.wait(LONG), "nothing came to the gate"


def test_a_stream_runs_its_work_in_order_on_a_thread_of_its_own(device):
    stream, seen = device.stream("a"), []
    for i in range(500):
        stream.run(lambda i=i: seen.append((i, threading.get_ident())))
    within(LONG, stream.record().synchronize)
    assert [i for i, _ in seen] == list(range(500))
    assert len({thread for _, thread in seen}) == 1 and seen[0][1] != threading.get_ident()


def test_events_order_streams_and_the_time_lost_is_booked_under_the_reason(device):
    a, b, gate, second, seen = device.stream("a"), device.stream("b"), Gate(), Gate(), []
    before = a.record()
    a.run(gate)
    a.run(lambda: seen.append("a"))
    b.run(lambda: seen.append("b, before"))
    after = Watched(a.record())
    b.wait(after, "expert")
    b.run(lambda: seen.append("b, behind"))
    within(LONG, before.synchronize)
    gate.inside()
    after.awaited()
    time.sleep(TICK)
    assert before.done() and not after.done()
    assert seen == ["b, before"], "the work before the wait runs, what is behind it does not"
    gate.opened.set()
    within(LONG, b.record().synchronize)
    assert seen == ["b, before", "a", "b, behind"]
    b.wait(after, "nothing, it is there")
    a.run(second)
    last = Watched(a.record())
    b.wait(last, "kv")
    last.awaited()
    second.opened.set()
    within(LONG, b.record().synchronize)
    assert set(b.stalls) == {"expert", "kv"} and not a.stalls
    assert b.stalls["expert"] > TICK and b.stalls["kv"] > 0
    device.stream("c").stalls["kv"] = 100.0
    assert device.stalls() == {"expert": b.stalls["expert"], "kv": b.stalls["kv"] + 100.0}


def test_a_failure_skips_later_work_and_travels_to_streams_that_wait_and_no_others(device):
    (a, b, c, d), seen = map(device.stream, "abcd"), []
    a.run(boom)
    a.run(lambda: seen.append("a"))
    failed = a.record()
    b.wait(failed, "x")
    b.run(lambda: seen.append("b"))
    c.run(lambda: seen.append("c"))
    d.wait(device.workers("q", 1).submit(boom, 0), "queues fail as well")
    finish_or_free([failed, c.record()], LONG)
    c.wait(failed, "late")  # that event has long been there, its failure still counts
    for event in (failed, failed, a.record(), b.record(), c.record(), d.record()):
        with pytest.raises(Boom):
            within(LONG, event.synchronize)
        assert event.done()
    assert seen == ["c"]


def test_a_failed_stream_still_waits_before_it_records(device):
    a, b, gate = device.stream("a"), device.stream("b"), Gate()
    a.run(gate)
    b.run(boom)
    b.wait(a.record(), "x")
    event = b.record()
    gate.inside()
    time.sleep(2 * TICK)
    assert not event.done()
    gate.opened.set()
    with pytest.raises(Boom):
        within(LONG, event.synchronize)


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, MemoryError])
def test_clear_makes_a_failed_stream_usable_whatever_the_failure(device, error):
    stream, seen = device.stream("a"), []
    stream.run(lambda: boom(error))
    failed = stream.record()
    stream.clear()
    stream.run(lambda: seen.append(1))
    within(LONG, stream.record().synchronize)
    assert seen == [1]
    with pytest.raises(error):
        failed.synchronize()


def test_one_worker_serves_by_urgency_then_age_and_promotion_moves_what_has_not_begun(device):
    workers, gate, seen = device.workers("q", 1), Gate(), []
    running = workers.submit(gate, 9)
    gate.inside()
    events = [workers.submit(lambda i=i: seen.append(i), u) for i, u in enumerate([2, 0, 1, 0, 2, 1, 0])]
    # The last three have no effect: less urgent than it was, already running, not of this queue.
    for event, urgency in ((events[4], 0), (events[1], 7), (running, 0), (ThreadEvent(), 0)):
        workers.promote(event, urgency)
    gate.opened.set()
    within(LONG, workers.drain)
    workers.promote(events[0], 0)  # already done
    within(LONG, workers.drain)
    assert seen == [1, 3, 4, 6, 2, 5, 0]


def test_promotion_of_work_that_still_waits_counts_once_it_may_begin(device):
    workers, stream, gate, hold, seen = device.workers("q", 1), device.stream("a"), Gate(), Gate(), []
    stream.run(gate)
    waiting = [workers.submit(lambda u=u: seen.append(u), u, after=stream.record()) for u in (1, 2, 3)]
    for event, urgency in ((waiting[2], 0), (waiting[0], 9)):  # the second is less urgent: no effect
        workers.promote(event, urgency)
    workers.submit(hold, 0)
    hold.inside()
    gate.opened.set()
    within(LONG, stream.record().synchronize)
    hold.opened.set()
    finish_or_free(waiting, LONG)
    assert seen == [3, 1, 2]


def test_work_begins_after_what_it_comes_after_well_or_not(device):
    workers, stream, gate, seen = device.workers("q", 2), device.stream("a"), Gate(), []
    stream.run(gate)
    stream.run(boom)
    late = workers.submit(lambda: seen.append("late"), 0, after=stream.record())
    finish_or_free([workers.submit(lambda: seen.append("free"), 1)], LONG)
    gate.inside()
    time.sleep(2 * TICK)
    assert seen == ["free"] and not late.done()
    gate.opened.set()
    within(LONG, late.synchronize)
    assert seen == ["free", "late"]


def test_drain_waits_for_all_that_is_queued_or_running_and_failed_work_harms_no_other(device):
    workers, gate, seen = device.workers("q", 2), Gate(), []
    workers.submit(gate, 0)
    workers.submit(boom, 0)
    for i in range(20):
        workers.submit(lambda i=i: (time.sleep(TICK / 20), seen.append(i)), 1)
    threading.Timer(3 * TICK, gate.opened.set).start()
    within(LONG, workers.drain)
    assert gate.opened.is_set() and sorted(seen) == list(range(20))


@pytest.mark.parametrize("count", [1, 2])
def test_work_that_waits_for_less_urgent_work_does_not_block_it(device, count):
    """A demand load into the slot of a prefetch not begun: a worker that takes it first starves the other."""
    workers, gates, seen = device.workers("q", count), [Gate() for _ in range(count)], []
    for gate in gates:
        workers.submit(gate, 0)
        gate.inside()
    first = [workers.submit(lambda: seen.append("first"), 1) for _ in range(count)]
    then = [workers.submit(lambda: seen.append("then"), 0, after=event) for event in first]
    for gate in gates:
        gate.opened.set()
    finish_or_free([*first, *then], LONG)
    assert sorted(seen) == ["first"] * count + ["then"] * count


def test_parts_of_one_piece_of_work_run_at_the_same_time_and_end_together(device):
    workers, gates = device.workers("q", 3), [Gate() for _ in range(3)]
    whole = workers.submit(list(gates), 0)
    for gate in gates:
        gate.inside()  # all three are inside at once
    gates[0].opened.set()
    gates[2].opened.set()
    time.sleep(TICK)
    assert not whole.done(), "one part is still running"
    gates[1].opened.set()
    within(LONG, whole.synchronize)


def test_parts_are_served_by_urgency_and_promotion_moves_those_that_have_not_begun(device):
    workers, gate, seen = device.workers("q", 1), Gate(), []
    workers.submit(gate, 0)
    gate.inside()
    note = [lambda name=name: seen.append(name) for name in "abcdef"]
    late, urgent = workers.submit(note[:3], 2), workers.submit(note[3:5], 1)
    workers.submit([lambda: workers.promote(late, 0), note[5]], 0)
    gate.opened.set()
    finish_or_free([late, urgent], LONG)
    assert "".join(seen) == "abcfde", "promoted, it is the oldest of its urgency"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_part_that_fails_fails_the_whole_once_every_part_has_ended(device, failing):
    workers, gate, seen = device.workers("q", 2), Gate(), []
    parts = [gate, lambda: seen.append(1), lambda: seen.append(2)]
    parts.insert(failing, boom)
    whole = workers.submit(parts, 0)
    gate.inside()
    time.sleep(TICK)
    assert not whole.done(), "its memory is still being written"
    gate.opened.set()
    with pytest.raises(Boom):
        within(LONG, whole.synchronize)
    within(LONG, workers.drain)
    assert seen == [1, 2]


class Stress:
    """A random program over streams and queues; each event comes with the work (bits) that it must come after."""

    def __init__(self, seed: int, device: HostDevice, urgencies: int):
        self.random, self.urgencies = random.Random(seed), urgencies
        self.streams = [device.stream(f"s{i}") for i in range(4)]
        self.queues = [device.workers(f"q{i}", count) for i, count in enumerate((1, 2, 4))]
        self.behind = [0] * 4  # of each stream: what its next work must come after
        self.events: list[tuple[Any, int]] = [(self.streams[0].record(), 0)]
        self.lock, self.count, self.begun, self.finished, self.wrong = threading.Lock(), 0, 0, 0, []

    def work(self, needs: int) -> tuple[Callable[[], None], int]:
        bit, nap = 1 << self.count, self.random.choice((0, 0, 0, 1e-4))
        self.count += 1

        def run() -> None:
            with self.lock:
                if self.begun & bit or needs & ~self.finished:
                    self.wrong.append(bit.bit_length() - 1)
                self.begun |= bit
            time.sleep(nap)
            with self.lock:
                self.finished |= bit

        return run, needs | bit

    def step(self) -> None:
        i, (event, needs) = self.random.randrange(4), self.random.choice(self.events[-30:])
        kind = self.random.choice(("run", "record", "wait", "submit", "submit", "promote"))
        queue, urgency = self.random.choice(self.queues), self.random.randrange(self.urgencies)
        if kind == "run":
            run, self.behind[i] = self.work(self.behind[i])
            self.streams[i].run(run)
        elif kind == "record":
            self.events.append((self.streams[i].record(), self.behind[i]))
        elif kind == "wait":
            self.streams[i].wait(event, "stress")
            self.behind[i] |= needs
        elif kind == "submit":
            run, after = self.work(needs)
            self.events.append((queue.submit(run, urgency, after=event), after))
        else:
            queue.promote(event, urgency)


@pytest.mark.parametrize("urgencies", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_random_programs_end_and_respect_every_dependency(device, seed, urgencies):
    stress = Stress(seed, device, urgencies)
    for _ in range(600):
        stress.step()
    finish_or_free([event for event, _ in stress.events] + [s.record() for s in stress.streams], LONG)
    assert not stress.wrong, f"seed {seed}: begun too early, or twice: {stress.wrong}"
    assert stress.finished == (1 << stress.count) - 1, f"seed {seed}: work was lost"


def test_copies_and_ops_run_in_stream_order_in_aligned_memory(device):
    stream, gate = device.stream("copies"), Gate()
    a, b, c = (device.alloc(16).view(np.float32), device.pinned(16).view(np.float32), np.zeros((1, 4), np.float32))
    assert device.alloc(0).size == 0 and all(array.ctypes.data % 4096 == 0 for array in (a, b))
    b[:] = 0
    stream.run(gate)
    device.copy_async(b, a, stream)
    device.launch("combine", stream, parts=b.reshape(1, 1, 4), weights=np.full((1, 1), 3, np.float32), out=c)
    assert not b.any() and not c.any()
    a[:] = 2  # the copy reads when it runs
    gate.opened.set()
    within(LONG, device.synchronize)
    assert b.tolist() == [2] * 4 and c.tolist() == [[6] * 4]


def test_synchronize_waits_until_streams_and_queues_are_idle_and_tells_the_failure(device):
    device.stream("a").run(boom)
    device.stream("b").run(lambda: time.sleep(5 * TICK))
    events = {"stream": device.stream("b").record()}
    events["queue"] = device.workers("read", 1).submit(lambda: time.sleep(8 * TICK), 0)
    with pytest.raises(Boom):
        within(LONG, device.synchronize)
    assert {name: event.done() for name, event in events.items()} == {"stream": True, "queue": True}


def test_recover_waits_until_all_is_idle_and_makes_the_device_usable(device):
    workers, stream, other, gate = device.workers("read", 1), device.stream("a"), device.stream("b"), Gate()
    workers.submit(gate, 0)
    stream.wait(workers.submit(boom, 1), "expert")
    other.wait(stream.record(), "x")
    running, out = workers.submit(lambda: time.sleep(2 * TICK), 2), np.zeros(1)
    threading.Timer(2 * TICK, gate.opened.set).start()
    within(LONG, device.recover)
    assert running.done()
    device.copy_async(out, np.ones(1), other)
    within(LONG, device.synchronize)
    assert out[0] == 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("call_work", [1, 700, 1 << 40])
def test_long_kernels_are_called_in_bounded_pieces_that_cover_each_row_once(threads, call_work, monkeypatch):
    monkeypatch.setattr(host, "SPLIT_WORK", 1)
    monkeypatch.setattr(host, "CALL_WORK", call_work)
    split, calls = RowSplitter(threads), []
    split(lambda first, last: calls.append((first, last)), 50, 100)
    split.close()
    assert sorted(row for first, last in calls for row in range(first, last)) == list(range(50))
    assert max(last - first for first, last in calls) <= max(1, call_work // 100)


@pytest.mark.parametrize("threads", [1, 3])
def test_recover_does_not_wait_for_the_rest_of_a_long_kernel(threads, monkeypatch):
    monkeypatch.setattr(host, "SPLIT_WORK", 1)
    monkeypatch.setattr(host, "CALL_WORK", 1)
    device, begun, calls = HostDevice(threads), threading.Event(), []
    rows = 10 * threads * int(LONG / TICK)  # all of them take ten times as long as is waited for

    def kernel(first: int, last: int) -> None:
        calls.append(first)
        begun.set()
        time.sleep(TICK)

    device.stream("s").run(lambda: device.split(kernel, rows, 1))
    assert begun.wait(LONG)
    within(LONG, device.recover)
    assert len(calls) < rows
    device.split(lambda first, last: calls.append(-1), 1, 1)
    assert calls[-1] == -1, "what is launched after recovery runs"
    device.close()


@pytest.mark.parametrize("count", [1, 3])
def test_close_finishes_what_is_queued_and_ends_all_threads(count):
    before, host, seen = set(threading.enumerate()), HostDevice(3), []
    host.split(lambda *rows: seen.append(rows), 3, 1 << 20)
    workers = host.workers("read", count)
    for i in range(20):
        workers.submit(lambda i=i: (time.sleep(TICK / 10), seen.append(i)), i % 3)
    host.stream("a").run(lambda: (time.sleep(5 * TICK), seen.append("a")))
    workers.submit(lambda: seen.append("late"), 0, after=host.stream("a").record())
    assert len(set(threading.enumerate()) - before) >= count + 2
    within(LONG, host.close)
    assert len(seen) == 3 + 20 + 2 and set(threading.enumerate()) == before
