"""``device/cuda.py`` itself, line by line, on a stand-in for CuPy that runs kernels on the CPU (tests/fake_cupy.py)."""

from __future__ import annotations

import operator
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from conftest import TESTS
from fake_cupy import VERSIONS, Array, CUDARuntimeError, Cupy

from moe_cupy.__main__ import main
from moe_cupy.device import missing_for_cuda, open_device
from moe_cupy.device.base import DeviceError
from moe_cupy.device.cuda import CudaDevice
from moe_cupy.device.discrete import ARENA
from moe_cupy.device.emulated import EmulatedDevice
from moe_cupy.engine import Engine
from moe_cupy.kernels.cuda import sources
from moe_cupy.kernels.cuda.launches import Launch
from tests.models import Shape, tiny_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: kernels cannot run on the CPU")
BUNDLED = TESTS / "data/archs"
TOKENS = np.arange(3, 15)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    shape = Shape(layers=4, experts=8, used=2, dense_type="Q8_0", expert_types=(("Q8_0", "Q8_0", "Q4_0"),))
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", shape, seed=3)


@pytest.mark.parametrize("name", ["deepseek-v2", "qwen35moe", "minimax-m2"])
def test_whole_models_give_the_bits_of_the_emulated_device(name):
    """Nothing in the engine or the ops reads device memory from the host, for the stand-in's arrays refuse it."""
    options = {"cache": "25%", "host_cache": "50%", "prefetch": "next-gate"}
    with Engine(BUNDLED / f"{name}.BF16.gguf", device="emulated", **options) as engine:
        want = engine.logits(TOKENS)
    with Engine(BUNDLED / f"{name}.BF16.gguf", _device=CudaDevice(Cupy()), **options) as engine:
        assert np.array_equal(engine.logits(TOKENS), want)
        engine.reset()
        steps = np.stack([engine.decode(int(token)) for token in TOKENS])
        assert np.abs(steps - want).max() <= 1e-3 * max(1, want.std())
        assert engine.stats.device == "cuda" and engine.stats.evictions


def test_observers_and_policies_see_routes_in_host_memory(model):
    seen = []
    with Engine(model, _device=CudaDevice(Cupy()), policy="echo", cache="50%", prefetch="next-gate") as engine:
        engine.forward.observe = lambda layer, routes: seen.append((layer, *(a.copy() for a in routes[:3])))
        engine.decode(5)
    with Engine(model, device="host") as engine:
        for layer, ids, weights, router in seen:
            assert ids.dtype == np.int32 and weights.shape == ids.shape and router.shape == (1, 8), layer
            assert np.array_equal(np.sort(router[0])[-2:], router[0][ids[0][::-1]])


def test_no_stream_is_waited_for_in_the_token_loop_and_no_event_but_for_routes_and_logits(model):
    """One wait for each MoE layer's ids and one for the logits. Workers may wait, for they are not the loop."""
    cupy = Cupy()
    with Engine(model, _device=CudaDevice(cupy), cache="slots:4", prefetch="next-gate") as engine:
        engine.decode(5)
        engine.decode(6)
        cupy.log.clear()
        engine.decode(7)
        waits = [(call, thread) for call, thread, _ in cupy.log if "synchronize" in call]
    mine = threading.current_thread().name
    assert [call for call, thread in waits if thread == mine] == ["Event.synchronize"] * (4 + 1)
    elsewhere = {(call, thread.rpartition("-")[0]) for call, thread in waits if thread != mine}
    assert elsewhere <= {("Event.synchronize", "copy"), ("Event.synchronize", "expert-read")}


def test_a_stray_synchronize_in_the_loop_would_be_seen(model, monkeypatch):
    cupy = Cupy()
    with Engine(model, _device=CudaDevice(cupy), cache="slots:4") as engine:
        join = engine.forward._head
        monkeypatch.setattr(engine.forward, "_head", lambda *a: (engine.device.synchronize(), join(*a))[1])
        cupy.log.clear()
        engine.decode(7)
        assert any(call == "Stream.synchronize" for call, *_ in cupy.log)


def test_memory_is_pinned_to_the_byte_and_given_back():
    cupy = Cupy()
    device = CudaDevice(cupy)
    for nbytes in (1, 4097, 70_001):
        memory = device.pinned(nbytes)
        assert memory.nbytes == nbytes == cupy.pinned[memory.ctypes.data].nbytes
        assert memory.ctypes.data % 4096 == 0
    assert device.pinned_bytes == ARENA + 1 + 4097 + 70_001
    device.close()
    assert not cupy.pinned


def test_where_less_can_be_page_locked_the_host_tier_is_smaller_and_says_so(model):
    with Engine(model, _device=CudaDevice(Cupy())) as engine:
        slab, all_of = engine.mover.store.slot_bytes(0), 4 * 8
        assert len(engine.mover.transport.tier.slabs) == all_of
        want = engine.logits(TOKENS)
    with Engine(model, _device=CudaDevice(Cupy(pinned_limit=ARENA + 11 * slab + 5000)), cache="slots:3") as engine:
        tier = engine.mover.transport.tier
        assert 2 <= len(tier.slabs) < 12
        assert any(f"{len(tier.slabs)} of {all_of} experts" in line for line in engine.placement.lines())
        assert np.array_equal(engine.logits(TOKENS), want)
    with pytest.raises(DeviceError, match=r"only 1 of at least 2 experts .* page-locked.*ulimit -l"):
        Engine(model, _device=CudaDevice(Cupy(pinned_limit=ARENA + int(1.5 * slab))))


def test_too_little_gpu_memory_names_what_to_lower(model):
    with pytest.raises(MemoryError, match=r"do not fit into GPU memory: .* lower cache, ctx_size or"):
        Engine(model, _device=CudaDevice(Cupy(free=60_000)), cache="100%")


def test_time_that_a_stream_waits_is_measured_on_the_device(monkeypatch):
    device, gate, stamped = CudaDevice(Cupy()), threading.Event(), threading.Event()

    def clock() -> float:
        stamped.set()
        return 10.0 if gate.is_set() else 3.0

    monkeypatch.setattr(fake_cupy, "time", SimpleNamespace(perf_counter=clock))
    first, second = device.stream("a"), device.stream("b")
    first.raw.thread.run(lambda: gate.wait(600))
    event = first.record()
    second.wait(event, "because")
    assert not event.done() and device.stalls() == {}
    assert stamped.wait(600), "nobody has noted when the wait begins"
    gate.set()
    device.synchronize()
    assert device.stalls() == {"because": 7.0}
    second.wait(event, "over")
    assert "over" not in device.stalls()
    device.close()


def test_kernels_are_compiled_once_for_each_file_and_format(monkeypatch):
    cupy, made = Cupy(), []
    real = cupy.RawModule
    cupy.RawModule = lambda **options: made.append(options) or real(**options)
    device = CudaDevice(cupy)
    x = device.upload(np.ones(64, np.float32)).view(np.float32)
    for _ in range(3):
        device.launch("scale", device.stream("compute"), x=x, factor=2.0)
        device.launch("clamp", device.stream("compute"), x=x, limit=5.0)
    fetched = device.fetch("x", x, device.stream("compute"))
    device.synchronize()
    assert (fetched == 5).all()
    assert len(made) == 1 and made[0]["options"] == ("--std=c++17",)
    monkeypatch.setattr(sources, "program", lambda unit: "#error")
    with pytest.raises(DeviceError, match=r"argmax: NVRTC refused argmax\.cu: .*error") as caught:
        device.run(Launch("argmax", (1, 1, 1), 32, ()), device.stream("compute"))
    assert "\n" not in str(caught.value)
    device.close()


def test_numbers_grow_and_small_arrays_may_change_as_soon_as_they_are_sent():
    device = CudaDevice(Cupy())
    stream = device.stream("compute")
    for first in (0, 70_000, 5):
        got = device.fetch("n", device.numbers(first, 3), stream)
        stream.record().synchronize()
        assert got.tolist() == [first, first + 1, first + 2]
    targets = [device.array((64,), np.int32) for _ in range(40)]
    values = np.zeros(64, np.int32)
    for i, target in enumerate(targets):
        values[:] = i
        device.put(target, values, stream)
    device.synchronize()
    assert [int(target.numpy[63]) for target in targets] == list(range(40))
    device.close()


def test_a_failed_stream_does_not_keep_the_device_from_recovering_and_closing():
    device = CudaDevice(Cupy())

    def fault() -> None:
        raise CUDARuntimeError("cudaErrorIllegalAddress")

    device.stream("compute").raw.thread.run(fault)
    with pytest.raises(CUDARuntimeError):
        device.synchronize()
    device.recover()
    device.close()


# What is missing


def test_without_cupy_one_line_names_the_extra(monkeypatch, capsys, model):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["run", "-m", str(model), "-p", "x", "--device", "cuda"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "moe-offload[cuda13]" in lines[0] and "--device host" in lines[0]
    device, why = open_device("auto")
    device.close()
    assert device.name == "host" and "CuPy is not installed" in why


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("driver", "what"), [(0, "no NVIDIA driver"), (12040, "CUDA 12.4 are here, but no GPU")])
def test_without_a_driver_or_a_gpu_one_line_says_which(monkeypatch, capsys, model, driver, what, version):
    monkeypatch.setitem(sys.modules, "cupy", Cupy(driver=driver, gpu=False, version=version))
    assert main(["run", "-m", str(model), "-p", "x", "--device", "cuda"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and what in lines[0] and (driver or VERSIONS[version] in lines[0])
    with pytest.raises(DeviceError, match=what):
        CudaDevice(sys.modules["cupy"])


def test_auto_takes_the_gpu_where_it_is_usable(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "cupy", Cupy())
    assert missing_for_cuda() == ""
    with Engine(model, cache="50%") as engine:
        assert engine.device.name == "cuda" and "a GPU is here" in engine.device_reason
    device, why = open_device("cuda")
    device.close()
    assert why == "cuda device, as asked"


def test_the_stand_in_has_the_names_of_cupy_and_cupy_has_those_of_the_stand_in():
    """Runs wherever CuPy is installed, with or without a GPU."""
    cupy = pytest.importorskip("cupy")
    fake = Cupy()
    for name in (*vars(fake.cuda), *(f"runtime.{name}" for name in vars(fake.cuda.runtime))):
        assert operator.attrgetter(name)(cupy.cuda) is not None, name
    assert (cupy.cuda.runtime.memcpyDefault, cupy.cuda.runtime.hostAllocPortable) == (4, 1)
    assert int(cupy.__version__.partition(".")[0]) in VERSIONS, "a version that nobody has looked at"
    for name in ("ndarray", "get_default_memory_pool", "RawModule"):
        assert hasattr(cupy, name), name
    for kind, names in ((cupy.cuda.Stream, "record wait_event synchronize __enter__ begin_capture end_capture"),
                        (cupy.cuda.Event, "record done synchronize")):  # fmt: skip
        assert all(hasattr(kind, name) for name in names.split()), kind
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)


def test_the_stand_in_refuses_what_a_gpu_would_misread():
    array = Array((2,), np.float32, Cupy()._alloc(8))
    with pytest.raises(TypeError, match="not allowed"):
        np.asarray(array)
    assert EmulatedDevice.is_unified is CudaDevice.is_unified is False
