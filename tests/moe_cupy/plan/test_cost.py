"""The mission's figures out of the planner's own arithmetic, and what its model of time must obey."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from moe_cupy.plan.choose import make_plan
from moe_cupy.plan.cost import host_decode, host_rates, offload_threshold, static_decode, total, waiting
from moe_cupy.plan.hardware import gpu_called, machine_called, pcie_bytes_s, practical, ram_bytes_s
from moe_cupy.plan.hits import curve_of, replayed
from moe_cupy.plan.memory import Settings, past_bytes, use_of
from moe_cupy.plan.planner import Request, cached_plan, static_plan
from moe_cupy.plan.rules import GPU, cpu_moe, place
from moe_cupy.plan.shapes import Past, preset
from moe_cupy.plan.tables import table
from moe_cupy.profile_command import profile_text
from tests.slow_shares import mostly_slow

MISSION = machine_called("rtx5080-128g")


@pytest.mark.parametrize(("link", "theory", "low", "high"), [("3x16", 16, 12, 14), ("4x16", 32, 25, 28),
                                                             ("5x16", 64, 50, 55)])  # fmt: skip
def test_pcie_rows(link, theory, low, high):
    """Gigabytes a second each way, promised and reached."""
    assert pcie_bytes_s(link) / 1e9 == pytest.approx(theory, rel=0.02)
    assert low <= practical(pcie_bytes_s(link)) / 1e9 <= high


def test_half_the_lanes_are_half_the_rate():
    assert pcie_bytes_s("5x8") == pcie_bytes_s("4x16") == pcie_bytes_s("5x16") / 2


@pytest.mark.parametrize(("quant", "gen5", "gen4"), [("F16", 120, 240), ("Q8_0", 60, 120), ("Q4_K_M", 34, 68),
                                                     ("IQ3_XXS", 24, 48)])  # fmt: skip
def test_moving_three_billion_parameters(quant, gen5, gen4):
    """Milliseconds; bits a parameter are those of Qwen3-30B-A3B's experts in each mix."""
    model = preset("qwen3-30b-a3b", quant)
    expert_parameters = 3 * 2048 * 768
    nbytes = 3e9 * model.expert_bytes / expert_parameters
    assert 1e3 * nbytes / practical(pcie_bytes_s("5x16")) == pytest.approx(gen5, rel=0.10)
    assert 1e3 * nbytes / practical(pcie_bytes_s("4x16")) == pytest.approx(gen4, rel=0.10)


def test_sixty_four_uncached_loads():
    """64 loads of 3 B parameters in Q8_0 at 60 ms: 3,840 ms a token."""
    each = 3e9 * 34 / 32 / practical(pcie_bytes_s("5x16"))
    assert 64 * 1e3 * each == pytest.approx(3840, rel=0.05)


@pytest.mark.parametrize(("name", "threshold"), [("deepseek-v3", 1024), ("qwen3-235b-a22b", 512),
                                                 ("deepseek-v2-lite", 342)])  # fmt: skip
def test_op_offload_thresholds(name, threshold):
    """32 E / k in ik_llama.cpp; 32 tokens in llama.cpp whatever the model, unless the environment says otherwise."""
    assert offload_threshold(preset(name), "ik_llama.cpp") == threshold
    assert offload_threshold(preset(name), "llama.cpp") == 32
    assert offload_threshold(preset(name), "llama.cpp", 64) == 64


def test_memory_of_the_mission():
    assert ram_bytes_s("DDR5-5600", 2) / 1e9 == pytest.approx(90, rel=0.01)
    assert MISSION.ram_bytes == 128e9 and MISSION.gpu.vram_bytes == 16 * 2**30 and MISSION.gpu.compute == "12.0"


def test_every_part_of_a_machine_has_a_source():
    hardware = table("hardware")
    parts = [*hardware["gpu"].values(), *hardware["disk"].values(), hardware["pcie"], hardware["ram"]]
    assert all(part["source"].startswith("https://") for part in parts)
    wanted = ("3060 3090 4070 4080 4090 5080 5090 A5000 A6000 H100 H200").split()
    wanted += ["4060 Ti 16G", "5060 Ti 16G", "5070 Ti"]
    assert all(gpu_called(name if name[0] == "H" else f"RTX {name}").bandwidth > 0 for name in wanted)


def test_bytes_of_the_past():
    """By hand: Qwen3-30B keeps 2 x 4 x 128 half floats a position, DeepSeek 576 numbers, gpt-oss at most its window."""
    assert past_bytes(preset("qwen3-30b-a3b").pasts[0], 1024, Settings(1024)) == 1024 * 2 * 4 * 128 * 2
    assert past_bytes(preset("deepseek-v3").pasts[0], 1024, Settings(1024, "q8_0")) == 1024 * 576 * 34 // 32
    window = Past("gqa", 512, 512, window=128)
    assert past_bytes(window, 65536, Settings(65536, ubatch=512)) == 768 * 1024 * 2
    assert past_bytes(window, 65536, Settings(65536), read=True) == 128 * 1024 * 2


def test_more_of_anything_is_never_slower():
    model, request = preset("qwen3-235b-a22b"), Request()
    plan = make_plan(model, MISSION, request).decode_tok_s
    gpu = MISSION.gpu
    better = [
        replace(MISSION, ram_bandwidth=2 * MISSION.ram_bandwidth), replace(MISSION, ram_bytes=2 * MISSION.ram_bytes),
        replace(MISSION, gpu=replace(gpu, vram_bytes=2 * gpu.vram_bytes)),
        replace(MISSION, gpu=replace(gpu, bandwidth=2 * gpu.bandwidth)),
    ]  # fmt: skip
    assert all(make_plan(model, machine, request).decode_tok_s > plan for machine in better)
    assert make_plan(model, MISSION, Request(ctx=32768)).decode_tok_s < plan


def test_terms_add_up_and_a_token_reads_what_it_uses():
    """Weights over all terms: dense part once, k of E experts, one row of the embedding."""
    model = preset("glm-4.5-air")
    placement = place(model, model.layers + 1, cpu_moe())
    settings = Settings(4096)
    terms = static_decode(model, MISSION, placement, settings, 1, curve_of(model))
    e = table("engines")
    gpu, cpu = terms[0].seconds * 960e9 * e["gpu"]["bandwidth_efficiency"], terms[3].seconds * MISSION.ram_practical
    dense = model.nbytes - model.routed_bytes - model.bytes_of("embedding")
    row = model.bytes_of("embedding") / 151552
    assert gpu + cpu == pytest.approx(dense + model.routed_bytes * 8 / 128 + row, rel=1e-6)
    assert static_plan(model, MISSION, Request(overrides=tuple(cpu_moe()))).decode_tok_s > 0
    assert total(terms) == pytest.approx(sum(t.seconds for t in terms))


def test_a_cache_of_everything_never_waits():
    model = preset("qwen3-30b-a3b")
    roomy = replace(MISSION, gpu=replace(MISSION.gpu, vram_bytes=2**40))
    names = [t.name for t in cached_plan(model, roomy, Request()).terms if t.seconds > 1e-6]
    assert not any("missing" in name for name in names)


def test_hit_rates_rise_from_nothing_to_all():
    for name in table("models"):
        curve = curve_of(preset(name))
        rates = [curve(i / 50) for i in range(51)]
        assert rates[0] == 0 and rates[-1] == 1 and rates == sorted(rates)
    points = replayed([(0.5, 0.8), (0.1, 0.4), (1.0, 1.0)], "a trace")
    assert [points(s) for s in (0.05, 0.1, 0.3, 1.0)] == pytest.approx([0.2, 0.4, 0.6, 1.0])


def test_waiting_is_the_mean_of_a_simulation():
    rng = random.Random(1)
    for missed, used, read, compute in ((0.3, 4, 2e-3, 1e-3), (0.9, 8, 1e-3, 3e-3), (0.05, 2, 5e-3, 1e-4)):
        drawn = [sum(rng.random() < missed for _ in range(used)) for _ in range(40_000)]
        mean = sum(max(0.0, m * read - (used - 1) * compute) for m in drawn if m) / len(drawn)
        assert waiting(missed, used, read, compute) == pytest.approx(mean, rel=0.04)


@pytest.mark.parametrize("name", table("models"))
@pytest.mark.parametrize(
    "machine", mostly_slow(table("hardware")["machine"], "rtx5080-128g", "h100-server", "desktop-64g")
)
def test_what_is_planned_fits(name, machine):
    """Every preset on every machine: the card is not overfilled, and the parts add up to the model."""
    model, hardware = preset(name), machine_called(machine)
    plan = make_plan(model, hardware, Request())
    if hardware.gpu:
        assert plan.vram_bytes <= hardware.gpu.vram_bytes - 1024 * 2**20
        held = use_of(model, plan.placement, plan.settings, GPU).weights - plan.placement.tied_copy * model.tied_bytes
    else:
        held = 0
    host = sum(t.nbytes for t in model.tensors if plan.placement.device[t.name] == "CPU")
    assert held + host == model.nbytes and plan.decode_tok_s > 0 and plan.prefill_tok_s > 0


def test_one_copy_an_expert_beats_three():
    model = preset("qwen3-30b-a3b")
    speed = {way: cached_plan(model, MISSION, Request(), slots=600, way=way, misses="load").decode_tok_s
             for way in table("engines")["cache"]}  # fmt: skip
    assert speed["device-driven"] > speed["slabs"] > speed["host-driven"]


PROFILE = """
ram_gb = 24
ram_bandwidth = 30
cores = 2
disk_read = 2
[measured.q8.t1]
layer_us = 200
weights_gbps = 10
experts_from_disk_gbps = 1.5
[measured.q8.t1.rows]
Q4_K = 20
Q6_K = 10
F32 = 40
[measured.q8.t2]
layer_us = 100
weights_gbps = 20
experts_from_disk_gbps = 2.5
[measured.f32.t1]
layer_us = 400
weights_gbps = 2
experts_from_disk_gbps = 1
"""


@pytest.mark.parametrize(("act", "threads", "layer_us"), [("q8", 1, 200), ("q8", 2, 100), ("q8", 16, 100),
                                                          ("f32", 2, 400)])  # fmt: skip
def test_a_host_is_predicted_by_what_was_measured_with_its_threads(tmp_path, act, threads, layer_us):
    (tmp_path / "mine.toml").write_text(PROFILE)
    assert host_rates(machine_called(str(tmp_path / "mine.toml")), act, threads).layer_us == layer_us


def test_a_host_token_by_hand(tmp_path):
    """Each format at the engine's rate times its row kernel's over Q4_K's; layers; nothing from disk at 100 %."""
    (tmp_path / "mine.toml").write_text(PROFILE)
    machine, model = machine_called(str(tmp_path / "mine.toml")), preset("qwen3-30b-a3b")
    read = {"Q4_K": 0.0, "Q6_K": 0.0, "F32": 0.0}
    for tensor in model.tensors:
        used = 8 / 128 if tensor.part == "routed" else 1 / 151936 if tensor.part == "embedding" else 1
        read[tensor.type] += tensor.nbytes * used
    seconds = read["Q4_K"] / 10e9 + read["Q6_K"] / 5e9 + read["F32"] / 20e9 + 48 * 200e-6
    assert total(host_decode(model, machine, 1.0, 1)) == pytest.approx(seconds)
    assert total(host_decode(model, machine, 0.9, 1)) > seconds


def test_a_layer_that_misses_an_expert_costs_what_it_costs_to_stop(tmp_path):
    """0.9^8 of the layers of a model with 8 of 128 experts miss none."""
    model, times = preset("qwen3-30b-a3b"), []
    for stop in ("", "stop_us = 70\n"):
        (tmp_path / "mine.toml").write_text(PROFILE.replace("layer_us = 200\n", "layer_us = 200\n" + stop))
        times.append(total(host_decode(model, machine_called(str(tmp_path / "mine.toml")), 0.9, 1)))
    assert times[1] - times[0] == pytest.approx(48 * (1 - 0.9**8) * 70e-6)


def test_a_measured_profile_is_read_back(tmp_path):
    """What ``doctor --write`` writes, as ``plan --hardware`` reads it."""
    rates = {"layer_us": 250.0, "weights_gbps": 9.0, "experts_from_disk_gbps": 1.6, "rows": {"Q4_K": 15.0, "F32": 20.0}}
    (tmp_path / "mine.toml").write_text(profile_text({"q8": {"t1": rates, "t2": rates}}))
    machine = machine_called(str(tmp_path / "mine.toml"))
    found = host_rates(machine, "q8", 2)
    assert (found.layer_us, found.rate, found.disk) == pytest.approx((250, 9e9, 1.6e9))
    assert found.of("F32") == pytest.approx(12e9) and machine.disk_practical == pytest.approx(1.6e9)
    assert machine.ram_practical == pytest.approx(20e9)
