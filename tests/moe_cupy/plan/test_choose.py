"""Which placement is chosen: more or faster hardware is never slower, and the first advice is the best there is."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_cupy.plan.choose import best_static, cpu_is_quicker, make_plan
from moe_cupy.plan.hardware import GB, GIB, Gpu, Machine, machine_called
from moe_cupy.plan.planner import Plan, Request, cached_plan
from moe_cupy.plan.shapes import Model, preset
from moe_cupy.plan.tables import PlanError, table

MISSION = machine_called("rtx5080-128g")
NAMES = ("qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b", "deepseek-v2-lite", "gemma-4-26b-a4b", "qwen3.6-35b-a3b",
         "glm-4.5-air")  # fmt: skip
model_called = lru_cache(preset)

machines = st.builds(
    lambda vram, bandwidth, pcie, ram, ram_bandwidth, cores, disk: Machine(
        "made up", Gpu("made up", int(vram * GIB), bandwidth * 1e9, bandwidth * 2e11, pcie), int(ram * GB),
        ram_bandwidth * 1e9, "made up", cores, disk * 1e9,
    ),
    vram=st.floats(3, 100), bandwidth=st.floats(200, 5000),
    pcie=st.sampled_from([f"{generation}x{lanes}" for generation in (3, 4, 5) for lanes in (1, 4, 8, 16)]),
    ram=st.floats(24, 512), ram_bandwidth=st.floats(20, 300), cores=st.integers(2, 64), disk=st.floats(0.3, 14),
)  # fmt: skip
PARTS = ("vram", "bandwidth", "tensor", "pcie", "ram", "ram_bandwidth", "cores", "disk")


def bettered(machine: Machine, part: str, factor: float) -> Machine:
    """More or faster of one part."""
    gpu = machine.gpu
    assert gpu is not None
    return {
        "vram": lambda: replace(machine, gpu=replace(gpu, vram_bytes=int(gpu.vram_bytes * factor))),
        "bandwidth": lambda: replace(machine, gpu=replace(gpu, bandwidth=gpu.bandwidth * factor)),
        "tensor": lambda: replace(machine, gpu=replace(gpu, tensor=gpu.tensor * factor)),
        "pcie": lambda: replace(machine, gpu=replace(gpu, link_measured=gpu.link_practical * factor)),
        "ram": lambda: replace(machine, ram_bytes=int(machine.ram_bytes * factor)),
        "ram_bandwidth": lambda: replace(machine, ram_bandwidth=machine.ram_bandwidth * factor),
        "cores": lambda: replace(machine, cores=int(machine.cores * factor) + 1),
        "disk": lambda: replace(machine, disk_read=machine.disk_read * factor),
    }[part]()


def planned(model: Model, machine: Machine, request: Request) -> Plan | None:
    try:
        return make_plan(model, machine, request)
    except PlanError:
        return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(machines, st.sampled_from(NAMES), st.sampled_from(PARTS), st.floats(1.001, 4), st.sampled_from([2048, 16384]))
def test_more_of_anything_is_never_slower(machine, name, part, factor, ctx):
    """At the same context. Where the dense part is on a card that is quicker than the CPU, decoding and prompts both;
    elsewhere what placements are chosen by, a turn of both."""
    model, request = model_called(name), Request(ctx=ctx)
    before = planned(model, machine, request)
    if before is None:
        return
    better = bettered(machine, part, factor)
    after = planned(model, better, request)
    assert after is not None
    assert after.turn_s <= before.turn_s * (1 + 1e-9)
    if before.ngl > model.layers and after.ngl > model.layers and not cpu_is_quicker(better):
        assert after.decode_tok_s >= before.decode_tok_s * (1 - 1e-9)
        assert after.prefill_tok_s >= before.prefill_tok_s * (1 - 1e-9)


@pytest.mark.parametrize(("name", "step"), [("qwen3-30b-a3b", 1), ("glm-4.5-air", 1), ("qwen3-235b-a22b", 2)])
def test_a_larger_card_step_by_step(name, step):
    """From 6 to 48 GiB: no step down in decoding or prompts, whichever placement is chosen."""
    model = preset(name)
    found = []
    for half in range(12, 97, step):
        machine = replace(MISSION, gpu=replace(MISSION.gpu, vram_bytes=half * GIB // 2))
        plan = planned(model, machine, Request(ctx=4096))
        if plan is not None and plan.ngl > model.layers:
            found.append((plan.decode_tok_s, plan.prefill_tok_s))
    assert len(found) > 15
    for (d0, p0), (d1, p1) in zip(found, found[1:], strict=False):
        assert d1 >= d0 and p1 >= p0


@pytest.mark.parametrize("machine", table("hardware")["machine"])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x22b", "gpt-oss-120b"])
def test_the_plan_is_the_quickest_of_its_candidates(name, machine):
    model, hardware = preset(name), machine_called(machine)
    if hardware.gpu is None:
        return
    plan = make_plan(model, hardware, Request(ctx=8192))
    for way in (best_static, cached_plan):
        with suppress(PlanError):
            assert plan.turn_s <= way(model, hardware, Request(ctx=8192)).turn_s


def test_what_the_chosen_context_costs_is_said():
    """Without -c the context is chosen; where a smaller one would be quicker the plan says by how much."""
    plan = make_plan(preset("glm-4.5-air"), MISSION, Request())
    small = make_plan(preset("glm-4.5-air"), MISSION, Request(ctx=4096))
    assert small.decode_tok_s > plan.decode_tok_s
    assert any(f"with -c 4096 it would be {small.decode_tok_s:.1f} tok/s" in step for step in plan.steps)
    assert not any("-c 4096" in step for step in make_plan(preset("gpt-oss-20b"), MISSION, Request()).steps)
