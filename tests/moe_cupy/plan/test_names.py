"""Names as people write them: models of the issue's list, files, repositories, cards."""

from __future__ import annotations

import pytest

from moe_cupy.__main__ import main
from moe_cupy.plan import PlanError
from moe_cupy.plan.hardware import gpu_called, machine_called, ram_bytes_s
from moe_cupy.plan.names import model_named
from moe_cupy.plan.shapes import preset, types_held

NAMES = [
    "Mixtral-8x7B", "Mixtral-8x22B", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Next-80B", "Qwen3.6-35B-A3B",
    "gpt-oss-20b", "gpt-oss-120b", "DeepSeek-V2-Lite", "DeepSeek-V3", "DeepSeek-R1", "GLM-4.5-Air", "GLM-4.7",
    "GLM-4.7-Flash", "Llama-4-Scout", "MiniMax-M2", "Kimi K2", "Gemma-4-26B-A4B",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelling", [str, str.lower, str.upper, lambda n: n.replace("-", "_")])
def test_each_model_of_the_list_is_found_however_it_is_spelled(name, spelling):
    found, quant = model_named(spelling(name))
    first = name.lower().replace(" ", "-")
    assert found.lower().startswith(first) and quant is None
    assert model_named(spelling(name) + "-Q4_K_M") == (found, "Q4_K_M")
    assert model_named(f"unsloth/{spelling(name)}-GGUF:IQ3_XXS") == (found, "IQ3_XXS")


@pytest.mark.parametrize(("name", "found", "quant"), [
    ("Qwen3-30B-A3B-Q5_K_M", "qwen3-30b-a3b", "Q5_K_M"),
    ("Qwen3-30B-A3B-Instruct-2507-UD-Q4_K_XL", "qwen3-30b-a3b", "UD-Q4_K_XL"),
    ("gpt-oss-120b-mxfp4-00001-of-00003.gguf", "gpt-oss-120b", "MXFP4"),
    ("DeepSeek-R1-0528-IQ2_XXS", "deepseek-r1", "IQ2_XXS"),
    ("C:\\models\\GLM-4.7-Flash-Q4_K_M.gguf", "glm-4.7-flash", "Q4_K_M"),
    ("/m/Mixtral-8x7B-Instruct-v0.1.Q8_0.gguf", "mixtral-8x7b", "Q8_0"),
    ("GLM-4.6", "glm-4.7", None),
    ("Qwen_Qwen3-30B-A3B-Q5_K_M.gguf", "qwen3-30b-a3b", "Q5_K_M"),
    ("zai-org_GLM-4.5-Air-Q6_K_L-00001-of-00003.gguf", "glm-4.5-air", "Q6_K_L"),
    ("meta-llama_Llama-4-Scout-17B-16E-Instruct-Q4_K_M.gguf", "llama-4-scout", "Q4_K_M"),
    ("Qwen3-235B-A22B-mix-IQ3_K-00001-of-00003.gguf", "qwen3-235b-a22b", "IQ3_K"),
    ("DeepSeek-V3-0324-IQ4_K_R4-00001-of-00010.gguf", "deepseek-v3", "IQ4_K"),
    ("Qwen3-30B-A3B-128K-UD-Q6_K_XL.gguf", "qwen3-30b-a3b", "UD-Q6_K_XL"),
    ("Huihui-GLM-4.5-Air-abliterated.i1-Q4_K_M.gguf", "glm-4.5-air", "Q4_K_M"),
])  # fmt: skip
def test_files_and_repositories(name, found, quant):
    assert model_named(name) == (found, quant)


@pytest.mark.parametrize("name", ["qwen3-30b", "qwen3-30b-a3b-bogus", "Qwen3-30B-A3B-Q5", "glm-4", "glm-4.75", "", "-",
                                  "DeepSeek-R1-Distill-Qwen-32B-Q4_K_M", "DeepSeek-R1-0528-Qwen3-8B-Q8_0"])  # fmt: skip
def test_a_name_that_is_not_understood_is_refused_with_the_nearest(name):
    with pytest.raises(PlanError, match="presets: "):
        model_named(name)


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B-Q5_K_M", "Gemma-4-26B-A4B", "GLM-4.7-Flash"])
def test_the_command_takes_such_names_and_shows_the_mix(capsys, name):
    assert main(["plan", name]) == 0
    said = capsys.readouterr().out
    model = preset(*model_named(name))
    held = types_held(model.tensors)
    assert sum(held.values()) == model.nbytes and len(held) > 1
    assert all(kind in next(line for line in said.splitlines() if line.startswith("types: ")) for kind in held)


@pytest.mark.parametrize(("name", "vram"), [
    ("RTX 3060", 12), ("3090", 24), ("RTX 4060 Ti 16GB", 16), ("rtx4070", 12), ("RTX-4080", 16), ("4090", 24),
    ("NVIDIA GeForce RTX 5060 Ti 16G", 16), ("5070 ti", 16), ("rtx_5080", 16), ("5090", 32), ("A5000", 24),
    ("rtx a6000", 48), ("H100", 80), ("h200", 141),
])  # fmt: skip
def test_cards_by_any_name(name, vram):
    assert gpu_called(name).vram_bytes == machine_called(name).gpu.vram_bytes == vram * 2**30


@pytest.mark.parametrize(("kind", "channels", "gb"), [
    ("DDR4-3200", 2, 51.2), ("DDR4-3600", 2, 57.6), ("DDR5-4800", 2, 76.8), ("DDR5-5200", 2, 83.2),
    ("ddr5-5600", 2, 89.6), ("DDR5-6000", 2, 96.0), ("DDR5-6400", 2, 102.4), ("DDR5-4800", 12, 460.8),
])  # fmt: skip
def test_kinds_of_memory(kind, channels, gb):
    assert ram_bytes_s(kind, channels) / 1e9 == pytest.approx(gb)
