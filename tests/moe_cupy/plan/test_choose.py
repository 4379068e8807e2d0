"""Which placement is chosen: more or faster hardware is never slower, and the first advice is the best there is."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_cupy.__main__ import main
from moe_cupy.plan.advice import LOWER_QUANT, WORTH, advise
from moe_cupy.plan.choose import best_static, cpu_is_quicker, make_plan
from moe_cupy.plan.hardware import GB, GIB, Gpu, Machine, gpu_called, machine_called, pcie_bytes_s
from moe_cupy.plan.planner import Plan, Request, cached_plan
from moe_cupy.plan.shapes import Model, preset
from moe_cupy.plan.tables import PlanError, table
from tests.effort import calls_of
from tests.slow_shares import mostly_slow

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


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


def every_change(model: Model, machine: Machine, request: Request, ctx: int, short: int) -> dict[str, tuple]:
    """Each single change that advice may give, made here by hand."""
    gpu = machine.gpu
    tried = {
        "-ctk q8_0": (model, machine, replace(request, ctk="q8_0", ctv="q8_0")),
        "half the context": (model, machine, replace(request, ctx=ctx // 2)),
        "smaller buffers": (model, machine, replace(request, ubatch=request.ubatch // 4)),
        "instead of": (preset(model.name, LOWER_QUANT[model.quant]), machine, request),
        "DDR": (model, replace(machine, ram_bandwidth=(102.4 if "DDR5" in machine.ram_kind else 57.6) * 1e9), request),
    }
    if short:
        tried["more RAM"] = (model, replace(machine, ram_bytes=machine.ram_bytes + (short // (32 * GB) + 1) * 32 * GB),
                             request)  # fmt: skip
    if gpu is None:
        return tried | {"a card": (model, replace(machine, gpu=gpu_called("RTX 5060 Ti 16G")), request)}
    tried["more VRAM"] = (model, replace(machine, gpu=replace(gpu, vram_bytes=gpu.vram_bytes + 8 * GIB)), request)
    if pcie_bytes_s(gpu.pcie) < pcie_bytes_s(gpu.pcie[:1] + "x16"):
        tried["PCIe"] = (model, replace(machine, gpu=replace(gpu, pcie=gpu.pcie[:1] + "x16")), request)
    return tried


@pytest.mark.parametrize(
    "machine", mostly_slow(table("hardware")["machine"], "rtx5080-128g", "h100-server", "desktop-64g")
)
@pytest.mark.parametrize(("name", "quant"), [("qwen3-30b-a3b", "Q4_K_M"), ("glm-4.5-air", "Q8_0"),
                                             ("qwen3-235b-a22b", "Q4_K_M"), ("mixtral-8x7b", "Q6_K")])  # fmt: skip
def test_the_first_advice_is_the_best_of_all(name, quant, machine):
    """Every change is planned by itself here; the three best are what is advised, with their gains."""
    model, hardware, request = preset(name, quant), machine_called(machine), Request()
    plan = make_plan(model, hardware, request)
    gains = {}
    for what, (m, h, r) in every_change(model, hardware, request, plan.settings.ctx, plan.disk_bytes).items():
        if h.ram_bandwidth >= hardware.ram_bandwidth and (other := planned(m, h, r)) is not None:
            gains[what] = other.decode_tok_s / plan.decode_tok_s
    best = sorted((gain for gain in gains.values() if gain >= WORTH), reverse=True)[:3]
    found = advise(plan)
    assert [advice.gain for advice in found] == pytest.approx(best)
    for advice in found:
        assert any(what in advice.change and gain == pytest.approx(advice.gain) for what, gain in gains.items())
        assert advice.decode_tok_s == pytest.approx(advice.gain * plan.decode_tok_s)


IMPOSSIBLE = [
    (["qwen3-30b-a3b", "-c", "100000000"], "nearest that works: -c 40960"),
    (["qwen3-30b-a3b", "--vram", "0", "-c", "100000000"], "nearest that works: -c 40960"),
    (["qwen3-30b-a3b", "-ub", "100000000"], "nearest that works: -ub 8192"),
    (["qwen3-30b-a3b", "--vram", "0.1"], "nearest that works: --vram 0"),
    (["qwen3-30b-a3b", "-fitt", "99999"], "nearest that works: --vram 0"),
    (["qwen3-30b-a3b", "--vram", "-1"], "expected 0 to 1,000,000"),
    (["qwen3-30b-a3b", "--vram", "nan"], "expected 0 to 1,000,000"),
    (["kimi-k2", "--quant", "BF16", "--vram", "0", "--ram", "16"], "it fits nowhere"),
    (["deepseek-r1", "--ram", "10", "--vram", "2"], "at least 14.5 GB of RAM"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), IMPOSSIBLE, ids=[" ".join(words) for words, _ in IMPOSSIBLE])
def test_what_cannot_be_done_is_a_sentence_and_what_it_names_works(capsys, words, said):
    try:
        code = main(["plan", *words])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and said in error
    near = re.search(r"nearest that works: (-\S+) (\d+)", error)
    if near:
        assert main(["plan", *words, near[1], near[2], "--json"]) == 0


@pytest.mark.parametrize(("words", "speed"), [
    (["qwen3-30b-a3b", "--ram", "4.5", "--vram", "24"], 150), (["qwen3-30b-a3b", "--ram", "0.1", "--vram", "80"], 150),
    (["qwen3-235b-a22b", "--ram", "2", "--vram", "16"], 0.5), (["qwen3-235b-a22b", "--ram", "6", "--vram", "4"], 0.1),
])  # fmt: skip
def test_host_memory_smaller_than_the_dense_part_is_no_obstacle_if_the_card_holds_it(capsys, words, speed):
    assert main(["plan", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["decode_tok_s"] > speed and (speed > 1 or any("read from disk" in w for w in plan["warnings"]))


def test_a_machine_that_names_no_disk_says_what_is_assumed(capsys, tmp_path):
    (tmp_path / "mine.toml").write_text('ram_gb = 24\ncores = 8\nram = "DDR5-5600"\n')
    for model, told in (("qwen3-235b-a22b", True), ("gpt-oss-20b", False)):
        assert main(["plan", model, "--hardware", str(tmp_path / "mine.toml"), "--json"]) == 0
        plan = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert any("names no disk" in warning for warning in plan["warnings"]) == told


@pytest.mark.parametrize("machine", mostly_slow(["rtx5080-128g", "rtx3060-32g", "desktop-64g"], "rtx3060-32g"))
@pytest.mark.parametrize("name", ["kimi-k2", "qwen3-235b-a22b", "qwen3-next-80b-a3b"])
def test_an_answer_takes_less_than_ten_seconds(name, machine):
    """With advice and commands; the largest models, a machine that is too small for them among others.

    In calls of functions, of which there are some two and a half million a second.
    """
    assert calls_of(lambda: main(["plan", name, "--hardware", machine, "--explain"])) < 25_000_000
