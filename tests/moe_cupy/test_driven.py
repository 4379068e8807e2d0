"""Decoding driven by the device: the tokens of the host-driven engine, the counts of the simulator, a graph a token."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TESTS
from fake_cupy import CUDARuntimeError, Cupy

from moe_cupy.__main__ import main
from moe_cupy.cache import POLICIES, BudgetError
from moe_cupy.device.base import DeviceError
from moe_cupy.device.cuda import CudaDevice
from moe_cupy.device.emulated import EmulatedDevice
from moe_cupy.engine import Engine
from moe_cupy.engine.options import DECIDERS
from moe_cupy.lab.record import Recorder
from moe_cupy.lab.replay import replay
from moe_cupy.store import StoreError
from moe_cupy.tools.report import side_by_side
from moe_ref.attention import softmax
from moe_ref.finite import NonFiniteError
from tests.models import Shape, tiny_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: the emulated device needs it")
BUNDLED = TESTS / "data/archs"
LAYERS, EXPERTS, USED = 3, 8, 2
TOKENS = np.random.default_rng(5).integers(0, 96, 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", Shape(LAYERS, EXPERTS, USED), seed=6)


def stepped(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    engine.reset()
    return np.stack([engine.decode(int(token)) for token in tokens])


def recorded(model: Path, slots: int, **options: Any) -> tuple[np.ndarray, Recorder, Any]:
    """Logits and counters of the host-driven engine, and its routes."""
    recorder = Recorder(EXPERTS, keep_router=True)
    with Engine(model, device="emulated", cache=f"slots:{slots}", **options) as engine:

        def observe(layer: int, b: Any) -> None:
            recorder.layer(layer, experts=b.ids, weights=b.weights, router=softmax(b.router), ahead=b.ids)

        engine.forward.observe = observe
        recorder.begin_sequence()
        engine.reset()
        want = []
        for token in TOKENS:
            want.append(engine.decode(int(token)))
            recorder.end_pass(generated=True)
        return np.stack(want), recorder, engine.stats


@pytest.mark.parametrize(("slots", "policy"), [(5, policy) for policy in DECIDERS] + [(2, "lru"), (24, "echo")])
def test_tokens_are_those_of_the_host_driven_engine_and_counts_those_of_the_simulator(model, slots, policy):
    want, recorder, moved = recorded(model, slots, policy=policy)
    counts = replay(recorder.trace(), POLICIES[policy], slots)
    options = {"device": "emulated", "decode": "device", "policy": policy, "ctx_size": 64}
    with Engine(model, cache=f"slots:{slots}", **options) as engine:
        got, stats = stepped(engine, TOKENS), engine.stats
        engine.empty_cache()
        again = stepped(engine, TOKENS)
        assert (engine.stats.hits, engine.stats.misses) == (stats.hits, stats.misses), "an emptied cache is a new one"
    assert np.array_equal(got.argmax(1), want.argmax(1))
    assert np.abs(got - want).max() <= 1e-3 and np.array_equal(got, again)
    assert (stats.hits, stats.misses, stats.evictions) == (counts.hits, counts.misses, counts.evictions)
    assert (stats.hits, stats.misses, stats.evictions) == (moved.hits, moved.misses, moved.evictions)
    assert stats.policy == policy and stats.misses and (slots == 24) == (stats.evictions == 0)


COUNTERS = ("hits", "misses", "evictions", "bytes_demand", "bytes_prefetch", "bytes_wasted")


@pytest.mark.parametrize(("slots", "policy"), [(2, "lru"), (3, "lfu"), (5, "lfu"), (5, "echo"), (24, "lru")])
def test_a_second_branch_fetches_what_next_gate_names_and_counts_as_the_host_does(model, slots, policy):
    want, _, moved = recorded(model, slots, policy=policy, prefetch="next-gate")
    options = {"device": "emulated", "decode": "device", "policy": policy, "prefetch": "next-gate", "ctx_size": 64}
    with Engine(model, cache=f"slots:{slots}", **options) as engine:
        got, stats = stepped(engine, TOKENS), engine.stats
    assert np.abs(got - want).max() <= 1e-3 and np.array_equal(got.argmax(1), want.argmax(1))
    assert {n: getattr(stats, n) for n in COUNTERS} == {n: getattr(moved, n) for n in COUNTERS}
    assert (stats.bytes_prefetch > 0) == (slots > 2) and stats.prefetch == "next-gate"


@pytest.mark.parametrize("policy", DECIDERS)
@pytest.mark.parametrize(("slots", "prefetch"), [(3, "none"), (5, "next-gate")])
def test_prompts_are_taken_by_the_host_and_the_cache_is_handed_over(model, slots, policy, prefetch):
    """Prompt, decoding, a second prompt behind it, decoding: the host-driven engine's counts at every point."""
    options = {"device": "emulated", "policy": policy, "prefetch": prefetch, "cache": f"slots:{slots}"}

    def run(engine: Engine) -> Iterator[tuple[np.ndarray, Any]]:
        engine.reset()
        for i, part in enumerate(np.split(TOKENS, [7, 11, 15, 19])):
            if i % 2 == 0:
                yield engine.prefill(part), engine.stats
            else:
                yield np.stack([engine.decode(int(token)) for token in part]), engine.stats

    with Engine(model, decode="device", ctx_size=64, **options) as driven, Engine(model, **options) as engine:
        for (got, stats), (want, moved) in zip(run(driven), run(engine), strict=True):
            assert np.abs(got - want).max() <= 1e-3
            assert {n: getattr(stats, n) for n in COUNTERS} == {n: getattr(moved, n) for n in COUNTERS}
        assert stats.evictions and stats.prompt_tokens == moved.prompt_tokens > 5


@pytest.mark.parametrize("slabs", [2, 3, 7, 23])
@pytest.mark.parametrize("prefetch", ["none", "next-gate"])
def test_what_memory_lacks_halts_a_token_which_goes_on_when_it_was_read(model, slabs, prefetch):
    """Three tiers: the logits to the bit, and without prefetch the counts, of the run with all page-locked."""
    options = {"device": "emulated", "decode": "device", "policy": "lfu", "prefetch": prefetch, "ctx_size": 64}
    with Engine(model, cache="slots:4", **options) as engine:
        want, whole = stepped(engine, TOKENS), engine.stats
    with Engine(model, cache="slots:4", host_cache=f"slots:{slabs}", **options) as engine:
        got, stats = stepped(engine, TOKENS), engine.stats
        if slabs == 7:
            engine.empty_cache()
            assert np.array_equal(stepped(engine, TOKENS), want)
    assert np.array_equal(got, want)
    if prefetch == "none":
        assert {n: getattr(stats, n) for n in COUNTERS} == {n: getattr(whole, n) for n in COUNTERS}
    assert stats.host_misses >= min(slabs, 19) and (stats.host_hits > 0 or slabs == 2)


@pytest.mark.parametrize("name", ["qwen35moe", "deepseek-v2", "phimoe"])
def test_recurrent_latent_and_biased_layers_too(name):
    """Recurrent states change places with every token: one graph reads the one, one the other."""
    path, tokens = BUNDLED / f"{name}.BF16.gguf", np.arange(3, 13)
    with Engine(path, device="emulated", cache="100%") as engine:
        want = stepped(engine, tokens)
    with Engine(path, device="emulated", cache="25%", decode="device", policy="lru", ctx_size=32) as engine:
        got = stepped(engine, tokens)
        assert engine.stats.evictions
    assert np.abs(got - want).max() <= 1e-3 * max(1, want.std())
    assert np.array_equal(got.argmax(1), want.argmax(1))


@pytest.mark.parametrize("prefetch", ["none", "next-gate"])
def test_a_token_is_one_graph_launch_and_one_wait(model, prefetch):
    """All there is besides: what changes is sent, the graph, the logits come back."""
    cupy, options = Cupy(), {"decode": "device", "policy": "lru", "cache": "slots:4", "ctx_size": 64}
    with Engine(model, _device=CudaDevice(cupy), prefetch=prefetch, **options) as engine:
        for token in TOKENS[:5]:
            engine.decode(int(token))
        cupy.log.clear()
        engine.decode(int(TOKENS[5]))
        calls = [call for call, thread, _ in cupy.log if call != "done"]
        assert {thread for _, thread, _ in cupy.log} == {threading.current_thread().name}
    assert calls.count("graph") == 1 and calls.count("Event.synchronize") == 1 and calls[-1] == "Event.synchronize"
    assert not {"launch", "Stream.synchronize", "wait"} & set(calls)
    assert calls.count("copy") == 4 + 1, "id, position, cosines and sines; logits"
    [(_, _, (launches, _))] = [entry for entry in cupy.log if entry[0] == "graph"]
    assert launches > 10 * LAYERS


@pytest.mark.parametrize("prefetch", ["none", "next-gate"])
def test_both_devices_replay_to_the_same_bits(model, prefetch):
    options = {"decode": "device", "policy": "lfu", "prefetch": prefetch, "cache": "slots:5", "ctx_size": 64}
    with Engine(model, _device=CudaDevice(Cupy()), **options) as engine:
        got = stepped(engine, TOKENS)
    with Engine(model, device="emulated", **options) as engine:
        assert np.array_equal(stepped(engine, TOKENS), got)


@pytest.mark.parametrize("make", [EmulatedDevice, lambda: CudaDevice(Cupy())], ids=["emulated", "cuda"])
def test_a_graph_waits_for_all_its_branches_or_is_refused(make):
    """And what no order makes part of it is no part of it: it would run when the graph is made."""
    device = make()
    stream, branch = device.stream("compute"), device.stream("ahead")
    x = device.upload(np.ones(64, np.float32)).view(np.float32)
    scale = partial(device.launch, "scale", x=x, factor=2.0)
    scale(stream=stream)
    with device.capture(stream) as graph:
        scale(stream=stream)
        device.order(stream, branch)
        scale(stream=branch)
        device.order(branch, stream)
        scale(stream=stream)
    device.replay(graph, stream)
    got = device.fetch("x", x, stream)
    stream.record().synchronize()
    assert (got == 16).all()
    with pytest.raises((DeviceError, CUDARuntimeError), match=r"wait for ahead|Unjoined"), device.capture(stream):
        device.order(stream, branch)
        scale(stream=branch)
    with pytest.raises((DeviceError, CUDARuntimeError), match=r"wait for ahead|Unjoined"), device.capture(stream):
        device.order(stream, branch)
        device.order(branch, stream)
        scale(stream=branch)
    device.close()


def test_a_text_is_the_same_whoever_decides(model):
    """Greedy, where only the largest logit comes to the host; where tokens halt, and where they do not."""
    options: Any = {"device": "emulated", "cache": "slots:5", "ctx_size": 32}
    with Engine(model, **options) as engine:
        want = list(engine.generate_tokens(TOKENS[:5].tolist(), 9))
    for more in ({}, {"host_cache": "slots:8", "prefetch": "next-gate"}):
        with Engine(model, decode="device", **more, **options) as engine:
            assert list(engine.generate_tokens(TOKENS[:5].tolist(), 9)) == want
            stats, report = engine.stats, side_by_side([("", engine.stats)])
            assert (stats.host_misses > 8) == bool(more)
            loaded = (stats.bytes_demand + stats.bytes_prefetch) // engine.mover.layout.slab_bytes(0)
            assert stats.host_hits + stats.host_misses == loaded, "each load is counted once"
            assert f"{stats.host_hits} from page-locked memory" in report
            assert "stall per token   not known" in report, "copies are in the graph, where nobody times them"


@pytest.mark.parametrize("at", [2, 9])
def test_a_read_that_fails_in_a_halted_token_is_told_and_the_token_can_be_run_again(model, monkeypatch, at):
    options: Any = {"decode": "device", "policy": "lru", "prefetch": "next-gate", "ctx_size": 32, "cache": "slots:4"}
    with Engine(model, device="emulated", **options) as engine:
        want = [engine.prefill(TOKENS[:3]), *(engine.decode(int(token)) for token in TOKENS[3:8])]
    with Engine(model, device="emulated", host_cache="slots:5", **options) as engine:
        store, calls, failures = engine.mover.store, [], 0
        real, got = store.parts, [engine.prefill(TOKENS[:3])]

        def failing(key: int, memory: Any) -> Any:
            calls.append(key)
            return real(key, memory) if len(calls) != at else [lambda: (_ for _ in ()).throw(StoreError("planted"))]

        monkeypatch.setattr(store, "parts", failing)
        for token in TOKENS[3:8]:
            try:
                got.append(engine.decode(int(token)))
            except StoreError:
                failures += 1
                got.append(engine.decode(int(token)))
    assert failures == 1 and np.array_equal(np.stack(got), np.stack(want))


def no_position(engine: Engine) -> None:
    real: Any = engine.device.put
    engine.device.put = lambda dst, *rest: dst is engine.forward._position or real(dst, *rest)


def no_fill(engine: Engine) -> None:
    for pool in engine.forward.pools._pools:
        object.__setattr__(pool, "slab_bytes", 64)


@pytest.mark.parametrize("plant", [no_position, no_fill], ids=lambda f: f.__name__)
def test_a_graph_with_stale_inputs_or_slots_is_seen(model, plant: Callable[[Engine], None]):
    with Engine(model, device="emulated", decode="device", policy="lru", cache="slots:4", ctx_size=64) as engine:
        want = stepped(engine, TOKENS)
    with Engine(model, device="emulated", decode="device", policy="lru", cache="slots:4", ctx_size=64) as engine:
        engine.device.put(engine.forward._position, np.zeros(1, np.int32), engine.forward.stream)
        plant(engine)
        with suppress(NonFiniteError):  # memory that nothing was brought to may hold anything
            assert not np.array_equal(stepped(engine, TOKENS), want)


def test_what_a_graph_cannot_hold_is_refused_while_it_is_made():
    device = EmulatedDevice()
    stream, target = device.stream("compute"), device.array((4,), np.int32)
    with pytest.raises(DeviceError, match="copy inside a graph"), device.capture(stream):
        device.put(target, np.zeros(4, np.int32), stream)
    with pytest.raises(DeviceError, match="memory asked for inside a graph"), device.capture(stream):
        device.alloc(4)
    device.alloc(4)
    device.close()


def test_requests_that_cannot_be_met_say_why(model, capsys):
    assert main(["run", "-m", str(model), "-p", "x", "--device", "host", "--decode", "device"]) == 2
    assert "--decode device: the host device has no memory of its own; use --decode host" in capsys.readouterr().err
    with pytest.raises(BudgetError, match="too small"):
        Engine(model, device="emulated", decode="device", policy="lru", cache="slots:1")
    with pytest.raises(ValueError, match=r"^policy='hobbit': not with decode='device'.*use one of lru, fifo, lfu, "):
        Engine(model, device="emulated", decode="device", policy="hobbit")
    with pytest.raises(ValueError, match=r"^prefetch='echo': not with decode='device'.*use one of none, next-gate, or"):
        Engine(model, device="emulated", decode="device", policy="lru", prefetch="echo")
    with pytest.raises(ValueError, match=r"^decode='gpu': unknown"):
        Engine(model, decode="gpu")
