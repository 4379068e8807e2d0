"""A model divided between a device with memory of its own and the CPU: who computes what, and the same tokens."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, TESTS
from fake_cupy import Array, Cupy

from moe_cupy.__main__ import main
from moe_cupy.cache import BudgetError
from moe_cupy.device.cuda import CudaDevice
from moe_cupy.device.emulated import EmulatedDevice
from moe_cupy.engine import Engine
from moe_cupy.engine.two_devices import Half
from moe_cupy.plan import PlanError
from moe_cupy.plan.rules import CPU, GPU, cpu_moe, n_cpu_moe, parse_overrides
from moe_cupy.tools.report import side_by_side
from moe_ref.gguf import open_gguf
from moe_ref.model import Model
from moe_ref.quants import FormatError
from tests.gguf_writer import write_gguf
from tests.models import Shape, tiny_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: the emulated device needs it")

GOLDEN, BUNDLED = SHARED / "data/golden", TESTS / "data/archs"
FILES = [*sorted(BUNDLED.glob("*.gguf")), *sorted(GOLDEN.glob("archs/*.gguf")), *sorted(GOLDEN.glob("quants/*.gguf"))]
QUICK = ("deepseek-v2.BF16", "gpt-oss.MXFP4_MOE", "qwen35moe.BF16", "gemma4moe.BF16", "qwen3moe-256.Q4_K_M")
TOKENS = np.arange(3, 12)
MODEL = BUNDLED / "deepseek-v2.BF16.gguf"  # three layers: a dense one, two with 8 experts of which 3 are used
STRICT = [BUNDLED / "glm4moe.BF16.gguf", GOLDEN / "archs/gpt-oss.MXFP4_MOE.gguf"]  # the latter's experts have biases
SOME = "--cpu-moe", "-ngl 2", "half of everything"
ODD = "all of attention", "experts on the GPU alone", "half of everything"

PLACEMENTS: dict[str, dict[str, Any]] = {
    "--cpu-moe": {"overrides": cpu_moe()},
    "--n-cpu-moe 1": {"overrides": n_cpu_moe(1)},
    "-ngl 0": {"n_gpu_layers": 0},
    "-ngl 1": {"n_gpu_layers": "1"},
    "-ngl 2": {"n_gpu_layers": 2},
    "-ot a regex of experts": {"overrides": r"blk\.[13579]\.ffn_.*_exps=CPU"},
    "-ot a matrix": {"overrides": r"blk\.[0-1]\.attn_(q|output|kv_a_mqa)=CPU,ffn_gate_inp=CPU"},
    ODD[0]: {"overrides": "attn=CPU,ssm=CPU"},
    ODD[1]: {"n_gpu_layers": 0, "overrides": "exps=CUDA0,token_embd=CUDA0"},
    ODD[2]: {"n_gpu_layers": 3, "overrides": r"attn_(q|k|v)=CPU,ffn_(up|down)\.=CUDA0,shexp=CUDA0,output=CPU,norm=CPU"},
}


def stepped(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    engine.reset()
    return np.stack([engine.decode(int(token)) for token in tokens])


def cpu_layers(path: Path, options: dict[str, Any]) -> set[int]:
    """Layers whose experts the CPU has by llama.cpp's rules, told from the names in the file."""
    with open_gguf(path) as file:
        names = [name for name in file.tensors if re.search(r"_exps\.weight", name)]
        layers = 1 + max(int(name.split(".")[1]) for name in file.tensors if name.startswith("blk."))
    first, rules, found = layers + 1 - int(options.get("n_gpu_layers", 99)), options.get("overrides", []), set()
    for name in names:
        layer = int(name.split(".")[1])
        for rule in parse_overrides(rules) if isinstance(rules, str) else rules:
            if re.search(rule.pattern, name):
                found |= {layer} if rule.device == CPU else set()
                break
        else:
            found |= {layer} if layer < first else set()
    return found


def cases() -> list[Any]:
    """Every placement of every file, most of them slow."""
    made = []
    for path in FILES:
        name = path.name.removesuffix(".gguf")
        for placement, options in PLACEMENTS.items():
            is_quick = name in QUICK[:2] or (name in QUICK and placement in SOME)
            slow = () if is_quick else pytest.mark.slow
            made.append(pytest.param(path, options, id=f"{name} {placement}", marks=slow))
    return made


@pytest.mark.parametrize(("path", "options"), cases())
def test_every_placement_gives_the_tokens_of_the_reference_and_moves_what_it_says(path, options):
    """Within the tolerance of a whole model (DESIGN section 5); what the CPU computed is counted."""
    want = Model(path).logits(TOKENS)
    with Engine(path, device="emulated", prefetch="next-gate", **options) as engine:
        prompt, steps, stats, c = engine.logits(TOKENS), None, engine.stats, engine.config
        engine.reset_stats()
        steps, stats = stepped(engine, TOKENS), engine.stats
    for got in (prompt, steps):
        assert np.array_equal(got.argmax(1), want.argmax(1))
        assert np.abs(got - want).max() <= 1e-3 * max(1, want.std())
    used, mine = len(TOKENS) * c.expert_used_count, cpu_layers(path, options)
    assert stats.cpu_experts == used * len(mine)
    assert stats.hits + stats.misses == used * (sum(layer.is_moe for layer in c.layers) - len(mine))


class RecordingDevice(EmulatedDevice):
    """Keeps the names of the kernels that it launched."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        super().__init__("f32")

    def run(self, launch: Any, stream: Any) -> None:
        self.launched.append(launch.kernel)
        super().run(launch, stream)


def launched(options: dict[str, Any]) -> list[str]:
    """The kernels of the GPU for one token."""
    device = RecordingDevice()
    with Engine(MODEL, _device=device, **options) as engine:
        engine.decode(3)
        return device.launched


def test_the_device_launches_nothing_of_what_the_cpu_has():
    every = launched({})
    is_expert, is_attention = (lambda k: k.startswith("expert")), (lambda k: k.startswith("attention"))
    assert sum(map(is_expert, every)) == 2 * 2 * 3 and sum(map(is_attention, every)) >= 3
    on_cpu = launched({"overrides": cpu_moe()})
    assert not any(map(is_expert, on_cpu)) and sum(map(is_attention, on_cpu)) == sum(map(is_attention, every))
    assert sum(map(is_expert, launched({"overrides": n_cpu_moe(2)}))) == 2 * 3
    assert launched({"n_gpu_layers": 0}) == []
    head = launched({"n_gpu_layers": 1})
    assert len(head) == 2 and head[1].startswith("gemv"), head
    assert sum(map(is_attention, launched({"n_gpu_layers": 2}))) == sum(map(is_attention, every)) // 3
    fewer = launched({"overrides": r"blk\.1\.attn_output=CPU"})
    assert sorted([*fewer, "gemv_BF16"]) == sorted([*every, "add_scaled"]), "one product less, its result is added"


@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("path", [path for path in STRICT if path.is_file()], ids=lambda path: path.stem)
def test_neither_side_touches_the_memory_of_the_other(path, options):
    """The stand-in's arrays refuse NumPy, and its kernels take nothing else; the bits are the emulated device's."""
    with Engine(path, device="emulated", **options) as engine:
        want, homes = engine.logits(TOKENS), engine.split.homes
    with Engine(path, _device=CudaDevice(Cupy()), **options) as engine:
        assert np.array_equal(engine.logits(TOKENS), want)
        for layer, home in enumerate(homes[:-1]):
            assert all(isinstance(part, Array if home == GPU else np.ndarray) for part in engine.kv.layer(layer))


def test_a_product_of_heads_abroad_leaves_what_it_does_not_compute_as_it_is():
    """attn_k_b fills the first features of each head; the rotated ones behind them are somebody else's."""
    with Engine(MODEL, device="emulated", overrides="attn_k_b=CPU") as engine:
        half, c = engine.forward.halves[GPU], engine.config
        for one in (half, half.other):
            one.begin(TOKENS[:2], engine.kv)
        linear, layer = engine.weights.layers[0].linears["attn_k_b"], c.layers[0]
        rank, rotated = c.mla.kv_lora_rank, layer.rope.n_rot
        x, out = (engine.device.array((2, layer.head_count, n), np.float32) for n in (layer.key_length, rank + rotated))
        x[...], out[...] = 0.5, 7
        half.run.product("linear_heads", x, out, linear)
        half.settle()
        assert linear.away and (out[..., rank:] == 7).all() and not (out[..., :rank] == 7).any()


# Order: what the host reads is there


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    shape = Shape(layers=4, experts=8, used=2, dense_type="Q8_0", expert_types=(("Q8_0", "Q8_0", "Q4_0"),))
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", shape, seed=3)


def waits(model: Path, **options: Any) -> tuple[list[str], set[str]]:
    """Calls that the engine's thread waited in for one token, and what other threads waited in."""
    cupy = Cupy()
    with Engine(model, _device=CudaDevice(cupy), prefetch="next-gate", **options) as engine:
        engine.decode(5)
        engine.decode(6)
        cupy.log.clear()
        engine.decode(7)
        found = [(call, thread) for call, thread, _ in cupy.log if "synchronize" in call]
    mine = threading.current_thread().name
    return [call for call, thread in found if thread == mine], {thread for _, thread in found if thread != mine}


@pytest.mark.parametrize(("options", "layers"), [
    ({"overrides": cpu_moe()}, 4),
    ({"overrides": n_cpu_moe(2)}, 4),
    ({"n_gpu_layers": 3}, 2),
    ({"n_gpu_layers": 1}, 0),
], ids=["--cpu-moe", "--n-cpu-moe 2", "-ngl 3", "-ngl 1"])  # fmt: skip
def test_experts_on_the_cpu_cost_no_wait_beyond_that_for_the_routes(tiny, options, layers):
    """One wait for each MoE layer that is at home on the GPU, one for the logits, none for a stream."""
    mine, others = waits(tiny, cache="slots:4", **options)
    assert mine == ["Event.synchronize"] * (layers + 1)
    assert {name.rpartition("-")[0] for name in others} <= {"copy", "expert-read"}


def test_a_matrix_on_the_cpu_costs_one_wait(tiny):
    assert waits(tiny, overrides=r"blk\.2\.attn_q=CPU")[0] == ["Event.synchronize"] * (4 + 1 + 1)


class SlowDevice(EmulatedDevice):
    """Its copies take a while, so that who does not wait for them reads what was there before."""

    def copy_async(self, dst: Any, src: Any, stream: Any) -> None:
        stream.run(lambda: time.sleep(0.003))
        super().copy_async(dst, src, stream)


SLOW = {"overrides": [*cpu_moe(), *parse_overrides(r"blk\.2\.attn_q=CPU")]}


def test_the_host_computes_on_what_has_arrived(tiny, monkeypatch):
    tokens = TOKENS[:4]
    want = Model(tiny).logits(tokens)
    with Engine(tiny, _device=SlowDevice(), **SLOW) as engine:
        got = stepped(engine, tokens)
    assert np.abs(got - want).max() <= 1e-3 * max(1, want.std())
    monkeypatch.setattr(Half, "settle", lambda half: None)  # the planted bug
    with Engine(tiny, _device=SlowDevice(), **SLOW) as engine:
        try:
            wrong = stepped(engine, tokens)
        except (ValueError, IndexError, AssertionError):
            return  # ids that are none
        assert not np.abs(wrong - want).max() <= 1e-3 * max(1, want.std())


# Memory


def test_what_is_resident_on_either_side_does_not_change_a_bit(tiny):
    options = {"overrides": n_cpu_moe(2), "device": "emulated"}
    with Engine(tiny, cache="100%", host_cache="100%", **options) as engine:
        full, steps = engine.logits(TOKENS), stepped(engine, TOKENS)
        assert engine.placement.slots == engine.placement.cpu.slots == 2 * 8
        engine.reset_stats()
        assert engine.stats.cpu_experts == engine.stats.misses == 0
        engine.empty_cache()
        stepped(engine, TOKENS[:1])
        assert engine.stats.cpu_misses == engine.stats.misses == 2 * 2, "of each side's two layers"
    with pytest.raises(BudgetError, match=r"^host_cache of slots:2 is too small"):
        Engine(tiny, host_cache="slots:2", **options)
    with pytest.raises(BudgetError, match=r"^host_cache='101%': more than all experts"):
        Engine(tiny, host_cache="101%", **options)
    with Engine(tiny, cache="slots:2", host_cache="slots:4", **options) as engine:
        assert np.array_equal(engine.logits(TOKENS), full) and np.array_equal(stepped(engine, TOKENS), steps)
        assert engine.stats.evictions and engine.stats.cpu_misses > 8
        assert (engine.placement.cpu.slots, engine.placement.host_slots, engine.placement.slots) == (2, 2, 2)
        engine.empty_cache()
        assert engine.stats.cpu_experts == 0
        stepped(engine, TOKENS[:1])
        assert engine.stats.cpu_experts == engine.stats.cpu_misses == 2 * 2


def test_a_device_without_experts_reports_no_cache(tiny):
    with Engine(tiny, device="emulated", overrides=n_cpu_moe(4), cache="slots:2") as engine:
        engine.logits(TOKENS[:3])
        said, report = "\n".join(engine.placement.lines()), side_by_side([("", engine.stats)])
        assert "none: the CPU computes all experts; --cache has no effect" in said
        assert "hit rate" not in report and "experts resident" not in report and "experts by the CPU" in report


def test_experts_of_the_cpu_take_no_room_on_the_device(tiny):
    with Engine(tiny, device="emulated", overrides=n_cpu_moe(3)) as engine:
        assert {key // 8 for key in stepped_keys(engine)} == {3}
        assert engine.placement.experts == 8 and engine.placement.cpu.experts == 24
        assert "computes the 24 experts of layers 0-2" in "\n".join(engine.placement.lines())
    with Engine(tiny, device="emulated", overrides=cpu_moe()) as engine:
        assert engine.mover is None and engine.placement.cache_bytes == 0


def stepped_keys(engine: Engine) -> set[int]:
    stepped(engine, TOKENS)
    return {key for pool in engine.mover.cache.pools for key in pool.slot_of}


def test_a_failed_read_of_an_expert_of_the_cpu_is_read_again(tiny, monkeypatch):
    from moe_cupy.store import StoreError

    with Engine(tiny, device="emulated", overrides=cpu_moe()) as engine:
        want = engine.logits(TOKENS)
        engine.empty_cache()
        store, calls = engine.stores[CPU], []
        real = store.parts

        def failing(key: int, memory: Any) -> Any:
            calls.append(key)
            return real(key, memory) if len(calls) != 3 else [lambda: (_ for _ in ()).throw(StoreError("planted"))]

        monkeypatch.setattr(store, "parts", failing)
        with pytest.raises(StoreError, match="planted"):
            engine.logits(TOKENS)
        assert np.array_equal(engine.logits(TOKENS), want)


def test_prompts_of_many_lengths_do_not_each_keep_page_locked_memory():
    device = CudaDevice(Cupy())
    stream = device.stream("compute")
    x = device.upload(np.arange(4096 * 512, dtype=np.float32)).view(np.float32).reshape(512, 4096)
    for rows in range(1, 512, 5):
        got = device.fetch("x", x[:rows], stream)
        stream.record().synchronize()
        assert got.shape == (rows, 4096) and got[-1, 0] == 4096 * (rows - 1)
    assert device.pinned_bytes < 3 * x.nbytes + (8 << 20)
    device.close()


# Plan and run agree


TABLES = [
    ["--cpu-moe"],
    ["--n-cpu-moe", "2"],
    ["-ngl", "0"],
    ["-ngl", "1"],
    ["-ngl", "2"],
    ["-ngl", "99"],
    [],
    ["-ot", r"blk\.[0-1]\.attn.*=CPU,exps=CPU"],
    ["-ngl", "1", "-ot", "attn_q=CUDA0,norm=CUDA0,token_embd=CUDA0"],
]
# Launches are given these as numbers; they lie on no device.
NUMBERS = re.compile(r"rope_freqs|rope_factors|layer_output_scale|\.scale$")


def table(text: str) -> dict[str, str]:
    rows = re.findall(r"^(\S+) +\w+ +[\d,]+  (RAM|VRAM|-) ", text, re.MULTILINE)
    return dict(rows)


def tables(capsys: Any, file: Path, out: Path, flags: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What ``plan`` says, and what a run did, by name; the latter is made of what was sent to which device."""
    words = ["plan", str(file), "--tensors", "--mode", "static", "--hardware", "rtx5080-128g"]
    assert main([*words, *flags]) == 0
    planned = table(capsys.readouterr().out)
    words = ["logits", str(file), "--tokens", "1,2", "-o", str(out), "--device", "emulated", "-v"]
    assert main([*words, *flags]) == 0
    return planned, table(capsys.readouterr().err)


GOLDEN_FILES = [GOLDEN / f"{name}.gguf" for name in ("archs/gpt-oss.MXFP4_MOE", "quants/qwen3moe-256.Q4_K_M")]
COMPARED = [*(BUNDLED / f"{name}.BF16.gguf" for name in ("deepseek-v2", "glm4moe", "phimoe")), *GOLDEN_FILES]


@pytest.mark.parametrize("flags", TABLES, ids=" ".join)
@pytest.mark.parametrize("file", [path for path in COMPARED if path.is_file()], ids=lambda path: path.stem)
def test_run_puts_every_tensor_where_plan_says(capsys, tmp_path, file, flags):
    planned, ran = tables(capsys, file, tmp_path / "x.npz", flags)
    with open_gguf(file) as opened:
        assert ran.keys() == planned.keys() == opened.tensors.keys()
    differ = {name for name in planned if planned[name] != ran[name]}
    assert all(NUMBERS.search(name) and ran[name] == "-" for name in differ), differ
    assert set(planned.values()) == ({"RAM"} if flags == ["-ngl", "0"] else {"RAM", "VRAM"})


@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)
def test_the_bytes_on_each_side_are_those_of_the_file(options):
    """No expert among them; vectors are F32 in this file too. A vector that its layer's home uses is there as well."""
    with Engine(MODEL, device="emulated", **options) as engine:
        split = engine.split
        for at in (GPU, CPU):
            wanted = 0
            for t in engine.file.tensors.values():
                home = split.homes[int(t.name.split(".")[1]) if t.name.startswith("blk.") else -1]
                is_copied = len(t.shape) == 1 and home == at
                is_here = split.placement.device[t.name] == at
                wanted += t.nbytes * ("_exps." not in t.name and (is_here or is_copied))
            assert engine.weights.nbytes[at] == wanted


def test_ngl_counts_a_layer_behind_the_trunk_as_llama_cpp_does(tmp_path):
    """Of three layers the last predicts further tokens: -ngl 2 is the output and that one, -ngl 3 the first of ours."""
    with open_gguf(BUNDLED / "glm4moe.BF16.gguf") as file:
        plain = {key: v if isinstance(v, str | int | float) else list(v) for key, v in file.metadata.items()}
        keys = plain | {"glm4moe.nextn_predict_layers": 1}
        made = {name: (t.type, t.shape, file.read(name).tobytes()) for name, t in file.tensors.items()}
    write_gguf(tmp_path / "m.gguf", keys, made)
    for n, homes in ((1, (CPU, CPU, GPU)), (2, (CPU, CPU, GPU)), (3, (CPU, GPU, GPU))):
        with Engine(tmp_path / "m.gguf", device="emulated", n_gpu_layers=n) as engine:
            assert engine.split.homes == homes


# What cannot be done


def test_matrices_of_experts_apart_are_refused_by_name(capsys, tmp_path):
    words = ["logits", str(MODEL), "--tokens", "1,2", "-o", str(tmp_path / "x.npz"), "--device", "emulated"]
    assert main([*words, "-ot", "ffn_up_exps=CPU"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "blk.1.ffn_up_exps.weight on CPU (-ot ffn_up_exps=CPU)" in last
    assert r"move them together, such as -ot 'blk\.1\.ffn_.*_exps=CPU'" in last
    assert main([*words, "-ot", r"blk\.1\.ffn_.*_exps=CPU"]) == 0


def test_a_device_that_decides_alone_takes_no_division():
    with pytest.raises(PlanError, match=r"^decode device runs whole tokens on the GPU.*use decode='host'"):
        Engine(MODEL, device="emulated", decode="device", overrides=cpu_moe())
    with Engine(MODEL, device="emulated", decode="device", n_gpu_layers=99) as engine:
        assert not engine.split.is_divided


def test_a_type_that_the_cpu_has_no_kernel_for_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("moe_cupy.device.host.HostDevice.formats", ("F32",))
    with pytest.raises(FormatError, match=r"blk\.1\.ffn_down_exps\.weight: the host device .* leave it on the GPU"):
        Engine(MODEL, device="emulated", overrides=cpu_moe())
    with Engine(MODEL, device="emulated") as engine:
        assert engine.logits(TOKENS).shape[0] == len(TOKENS), "looking up the embedding needs no kernel"


def test_threads_of_both_devices_end(tiny):
    before = threading.active_count()
    with Engine(tiny, device="emulated", overrides=cpu_moe(), threads=2) as engine:
        engine.decode(3)
        assert threading.active_count() > before + 2
    assert threading.active_count() == before


# Who asks


def test_the_host_device_takes_the_flags_and_says_that_they_do_nothing(tiny):
    with Engine(tiny, device="host", n_gpu_layers=2, overrides=cpu_moe()) as engine:
        assert engine.device_reason.endswith("one memory: -ngl 2, --cpu-moe have no effect")
        got = engine.logits(TOKENS)
    with Engine(tiny, device="host") as engine:
        assert np.array_equal(engine.logits(TOKENS), got) and "effect" not in engine.device_reason
    with pytest.raises(PlanError, match=r"^n_gpu_layers='some': "):
        Engine(tiny, device="host", n_gpu_layers="some")


def test_threads_without_work_are_told(tiny):
    with Engine(tiny, device="emulated", threads=2) as engine:
        assert engine.device_reason.endswith("-t 2 has no effect: the CPU computes nothing")
    with Engine(tiny, device="emulated", threads=2, overrides=n_cpu_moe(1)) as engine:
        assert "effect" not in engine.device_reason


def test_bench_shows_no_hit_rate_where_the_device_has_no_experts(tiny, capsys):
    assert main(["bench", str(tiny), "-p", "2", "-n", "0", "-r", "1", "--device", "emulated", "--cpu-moe"]) == 0
    head, _, row = (line.split("|") for line in capsys.readouterr().out.splitlines()[:3])
    assert row[[cell.strip() for cell in head].index("hit rate")].strip() == "-"


def test_bench_says_how_much_is_where(capsys):
    flags = ["bench", str(MODEL), "-p", "0", "-n", "2", "-r", "1", "-o", "json", "--device", "emulated", "-t", "1"]
    assert main([*flags, "-ngl", "3", "-ot", r"blk\.2.*exps=CPU"]) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert (record["n_gpu_layers"], record["n_cpu_moe"], record["cpu_experts"]) == (3, 1, 2 * 3)


def test_observers_see_the_routes_of_both_sides(tiny):
    seen: dict[str, list[tuple[int, list[int]]]] = {}
    for name, options in {"one": {}, "two": {"n_gpu_layers": 4, "overrides": r"blk\.3.*exps=CPU"}}.items():
        with Engine(tiny, device="emulated", **options) as engine:
            seen[name] = []
            engine.forward.observe = lambda layer, r, to=seen[name]: to.append((layer, r.ids.tolist()))
            stepped(engine, TOKENS)
    assert seen["one"] == seen["two"] and {layer for layer, _ in seen["two"]} == {0, 1, 2, 3}


@pytest.mark.parametrize("options", [PLACEMENTS[name] for name in ("-ngl 0", "-ngl 2", "--cpu-moe")], ids=str)
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_generated_text_is_that_of_the_host_device(tmp_path, options, kind):
    """Greedy tokens, so the largest logit alone comes back; keys and values of either side in the same type."""
    path = tiny_moe(tmp_path / "m.gguf", Shape(layers=3, experts=8, used=2, head=32, width=128), seed=5)
    types = {"cache_type_k": kind, "cache_type_v": kind}
    with Engine(path, device="host", **types) as engine:
        want = list(engine.generate_tokens([1, 2, 3], 12))
    with Engine(path, device="emulated", **types, **options) as engine:
        assert list(engine.generate_tokens([1, 2, 3], 12)) == want
