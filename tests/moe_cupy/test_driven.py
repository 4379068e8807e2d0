"""Decoding driven by the device: the tokens of the host-driven engine, the counts of the simulator, a graph a token."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TESTS
from fake_cupy import Cupy

from moe_cupy.__main__ import main
from moe_cupy.cache import POLICIES, BudgetError
from moe_cupy.device.base import DeviceError
from moe_cupy.device.cuda import CudaDevice
from moe_cupy.device.emulated import EmulatedDevice
from moe_cupy.engine import Engine
from moe_cupy.lab.record import Recorder
from moe_cupy.lab.replay import replay
from moe_ref.attention import softmax
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


@pytest.mark.parametrize("slots", [2, 5, 24])
def test_tokens_are_those_of_the_host_driven_engine_and_counts_those_of_the_simulator(model, slots):
    recorder = Recorder(EXPERTS, keep_router=True)
    with Engine(model, device="emulated", policy="lru", cache=f"slots:{slots}") as engine:

        def observe(layer: int, b: Any) -> None:
            recorder.layer(layer, experts=b.ids, weights=b.weights, router=softmax(b.router), ahead=b.ids)

        engine.forward.observe = observe
        recorder.begin_sequence()
        engine.reset()
        want = []
        for token in TOKENS:
            want.append(engine.decode(int(token)))
            recorder.end_pass(generated=True)
        moved = engine.stats
    counts = replay(recorder.trace(), POLICIES["lru"], slots)
    with Engine(model, device="emulated", decode="device", cache=f"slots:{slots}", ctx_size=64) as engine:
        got, stats = stepped(engine, TOKENS), engine.stats
        engine.empty_cache()
        again = stepped(engine, TOKENS)
        assert (engine.stats.hits, engine.stats.misses) == (stats.hits, stats.misses), "an emptied cache is a new one"
    assert np.array_equal(got.argmax(1), np.stack(want).argmax(1))
    assert np.abs(got - np.stack(want)).max() <= 1e-3 and np.array_equal(got, again)
    assert (stats.hits, stats.misses, stats.evictions) == (counts.hits, counts.misses, counts.evictions)
    assert (stats.hits, stats.misses, stats.evictions) == (moved.hits, moved.misses, moved.evictions)
    assert stats.policy == "lru" and stats.misses and (slots == 24) == (stats.evictions == 0)


@pytest.mark.parametrize("name", ["qwen35moe", "deepseek-v2", "phimoe"])
def test_recurrent_latent_and_biased_layers_too(name):
    """Recurrent states change places with every token: one graph reads the one, one the other."""
    path, tokens = BUNDLED / f"{name}.BF16.gguf", np.arange(3, 13)
    with Engine(path, device="emulated", cache="100%") as engine:
        want = stepped(engine, tokens)
    with Engine(path, device="emulated", cache="25%", decode="device", ctx_size=32) as engine:
        got, prompt = stepped(engine, tokens), engine.logits(tokens)
        assert engine.stats.evictions
    assert np.abs(got - want).max() <= 1e-3 * max(1, want.std()) and np.array_equal(got, prompt)
    assert np.array_equal(got.argmax(1), want.argmax(1))


def test_a_token_is_one_graph_launch_and_one_wait(model):
    """All there is besides: what changes is sent, the graph, the logits come back."""
    cupy = Cupy()
    with Engine(model, _device=CudaDevice(cupy), decode="device", cache="slots:4", ctx_size=64) as engine:
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


def test_both_devices_replay_to_the_same_bits(model):
    with Engine(model, _device=CudaDevice(Cupy()), decode="device", cache="slots:4", ctx_size=64) as engine:
        got = stepped(engine, TOKENS)
    with Engine(model, device="emulated", decode="device", cache="slots:4", ctx_size=64) as engine:
        assert np.array_equal(stepped(engine, TOKENS), got)


def no_position(engine: Engine) -> None:
    engine.forward._position = engine.device.array((1,), np.int32)  # sent to where no kernel looks


def no_fill(engine: Engine) -> None:
    for one in engine.forward.experts.classes:
        object.__setattr__(one.resident, "slab_bytes", 64)


@pytest.mark.parametrize("plant", [no_position, no_fill], ids=lambda f: f.__name__)
def test_a_graph_with_stale_inputs_or_slots_is_seen(model, plant: Callable[[Engine], None]):
    with Engine(model, device="emulated", decode="device", cache="slots:4", ctx_size=64) as engine:
        want = stepped(engine, TOKENS)
    with Engine(model, device="emulated", decode="device", cache="slots:4", ctx_size=64) as engine:
        engine.device.put(engine.forward._position, np.zeros(1, np.int32), engine.forward.stream)
        plant(engine)
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
        Engine(model, device="emulated", decode="device", cache="slots:1")
    with pytest.raises(ValueError, match="--decode gpu: unknown"):
        Engine(model, decode="gpu")
