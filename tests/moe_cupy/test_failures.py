"""Disks fail and files change: one clear error, nothing leaks, and the engine goes on afterwards."""

from __future__ import annotations

import errno
import gc
import os
import resource
import shutil
import threading
import time
import tracemalloc

import numpy as np
import pytest

from moe_cupy.device.host import HostDevice
from moe_cupy.engine import Engine
from moe_cupy.kernels.table import OPS
from moe_cupy.store import StoreError
from tests.models import Shape, tiny_moe

NAMED = r"expert \d+ of layer \d+ \(blk\.\d+\.ffn_\w+_exps\.weight\): .*m\.gguf"
SHAPE = Shape(layers=4, experts=8, used=2)


@pytest.fixture
def model(tmp_path):
    return tiny_moe(tmp_path / "m.gguf", SHAPE, seed=5)


@pytest.fixture
def tokens():
    return np.arange(30)


def fail_nth_read(monkeypatch, n, behave):
    """Make the n-th expert read of the process behave otherwise."""
    real, count = os.preadv, [0]

    def preadv(fd, buffers, offset, *rest):
        count[0] += 1
        return behave(real, fd, buffers, offset) if count[0] == n else real(fd, buffers, offset, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    return count


def io_error(real, fd, buffers, offset):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def nothing(real, fd, buffers, offset):
    return 0


@pytest.mark.parametrize("behave", [io_error, nothing], ids=["EIO", "end of file"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("prefetch", ["none", "next-gate"])
@pytest.mark.parametrize("direct_io", [True, False])
def test_a_failed_read_is_one_error_naming_the_expert_and_the_engine_goes_on(
    model, tokens, monkeypatch, behave, n, prefetch, direct_io
):
    with Engine(model, cache="slots:4", prefetch=prefetch, direct_io=direct_io) as engine:
        want = engine.logits(tokens)
        with monkeypatch.context() as patch:
            fail_nth_read(patch, n, behave)
            with pytest.raises(StoreError, match=NAMED):
                for _ in range(20):  # a failed prefetch is told when its expert is wanted
                    engine.logits(tokens)
        assert np.array_equal(engine.logits(tokens), want)


def test_short_reads_are_continued(model, tokens, monkeypatch):
    with Engine(model, cache="slots:4", direct_io=False) as engine:
        want = engine.logits(tokens)
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, b, offset: real(fd, [b[0][: max(1, len(b[0]) // 3)]], offset))
        assert np.array_equal(engine.logits(tokens), want)


def test_a_file_truncated_after_opening_is_told_and_harmless_once_restored(model, tokens, tmp_path):
    whole = shutil.copy(model, tmp_path / "copy.gguf")
    with Engine(model, cache="slots:4") as engine:
        want = engine.logits(tokens)
        size = os.path.getsize(model)
        os.truncate(model, size // 2)
        with pytest.raises(StoreError, match="truncated or replaced while open"):
            for token in range(90):
                engine.decode(token % SHAPE.vocab)
        with open(whole, "rb") as source, open(model, "r+b") as target:
            target.write(source.read())
        assert np.array_equal(engine.logits(tokens), want)


def test_an_interrupt_leaves_the_engine_usable_and_no_thread_behind(model, tokens):
    before = set(threading.enumerate())
    with Engine(model, cache="slots:4") as engine:
        want = engine.logits(tokens)

        reached = []

        def interrupt(layer, ids):
            reached.append(layer)
            raise KeyboardInterrupt

        engine.forward.observe = interrupt
        with pytest.raises(KeyboardInterrupt):
            engine.logits(tokens)
        assert len(reached) == 1, "nothing is computed after it"
        engine.forward.observe = None
        assert np.array_equal(engine.logits(tokens), want)
    assert set(threading.enumerate()) == before


class SlotWatch:
    """Makes expert kernels slow and has each check, before and after, that its slot holds the expert it is for."""

    def __init__(self, engine, monkeypatch):
        self.engine, self.wrong, self.seen, self.layer_of = engine, [], 0, {}
        self.real, self.acquire = OPS["experts"], engine.mover.acquire
        monkeypatch.setitem(OPS, "experts", self.real._replace(host=self.kernel))
        monkeypatch.setattr(engine.mover, "acquire", self.note)

    def note(self, layer, experts, pinned=(), scores=None):
        held = self.acquire(layer, experts, pinned, scores)
        self.layer_of |= {id(one.matrices["down"]): layer for one in held}
        return held

    def kernel(self, split, **buffers):
        pairs = list(zip(buffers["wanted"].tolist(), buffers["down"], strict=True))
        before = [self.holds(*pair) for pair in pairs]
        time.sleep(0.002)
        self.real.host(split, **buffers)
        self.seen += len(pairs)
        self.wrong += [e for (e, w), ok in zip(pairs, before, strict=True) if not (ok and self.holds(e, w))]

    def holds(self, expert, down):
        tensor = self.engine.mover.layout.layers[self.layer_of[id(down)]][2]
        return np.array_equal(down.data, self.engine.file.read(tensor.name, expert * tensor.nbytes, tensor.nbytes))


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_a_slot_is_never_overwritten_while_a_launched_kernel_may_read_it(model, tokens, monkeypatch, slots):
    with Engine(model, cache=f"slots:{slots}", prefetch="next-gate", _device=HostDevice(2, inline=False)) as engine:
        want = engine.logits(tokens)
        watch = SlotWatch(engine, monkeypatch)
        got = engine.logits(tokens)
    assert watch.seen >= 4 * SHAPE.layers
    assert not watch.wrong
    assert np.array_equal(got, want)


@pytest.mark.parametrize("bug", ["loads do not wait for kernels", "kernels do not wait for loads"])
def test_the_watch_above_catches_missing_waits(model, tokens, monkeypatch, bug):
    with Engine(model, cache="slots:2", _device=HostDevice(2, inline=False)) as engine:
        engine.logits(tokens)
        watch = SlotWatch(engine, monkeypatch)
        queue, submit = engine.mover.transport.queue, engine.mover.transport.queue.submit
        if bug == "loads do not wait for kernels":
            monkeypatch.setattr(queue, "submit", lambda work, urgency, after, name: submit(work, urgency))
        else:
            slow = [lambda: time.sleep(0.005)]  # a load that takes longer than a launch
            monkeypatch.setattr(queue, "submit", lambda work, *order: submit(slow + work, *order))
            monkeypatch.setattr(engine.forward.stream, "wait", lambda event, reason: None)
        engine.logits(tokens)
    assert watch.wrong


def test_a_thousand_tokens_at_the_minimum_cache_do_not_leak(tmp_path):
    path = tiny_moe(tmp_path / "m.gguf", Shape(layers=4, experts=8, used=2, width=128, inner=128), seed=1)

    def rss() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    with Engine(path, cache="slots:2", prefetch="next-gate", ctx_size=1200) as engine:
        for token in range(10):
            engine.decode(token)
        before = rss()
        for token in range(900):
            engine.decode(token % 96)
        tracemalloc.start()  # sees what fits into memory that was free before, which RSS does not
        for token in range(100):
            engine.decode(token % 96)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert engine.stats.misses > 3000
        assert rss() <= 1.02 * before + engine.kv.nbytes, "keys and values are touched as the text grows, no more"
        assert kept < 100 << 10, f"100 tokens left {kept} bytes behind"
