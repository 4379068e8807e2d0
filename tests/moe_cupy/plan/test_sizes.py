"""Shapes and sizes: parameter counts, llama-quantize's choices, and sizes that people know, from shapes alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_cupy.plan import PlanError
from moe_cupy.plan.mixes import KEPT
from moe_cupy.plan.shapes import Past, from_file, preset
from moe_cupy.plan.tables import table
from moe_ref.gguf import open_gguf

DATA = Path(__file__).resolve().parents[2] / "data"
SNAPSHOTS = json.loads((DATA / "plan" / "quant_mixes.json").read_text())["models"]
GIB = 2**30


@pytest.mark.parametrize("name", table("models"))
def test_a_preset_has_the_published_parameters_and_a_source(name):
    row = table("models")[name]
    published = table("models")[row.get("same_as", name)]["parameters"]
    assert preset(name).parameters == pytest.approx(published, rel=0.01)
    assert row["source"].startswith("https://")


def layers_in(text: str) -> set[int]:
    """Layers of a text such as 1-3,7."""
    spans = [(part.split("-") * 2)[:2] if "-" not in part else part.split("-") for part in text.split(",")]
    return {layer for first, last in spans for layer in range(int(first), int(last) + 1)}


def snapshot_type(name: str, mix: list) -> str:
    base, others = mix
    match = re.match(r"blk\.(\d+)\.(.*)", name)
    layer, stem = (int(match[1]), match[2]) if match else (0, name)
    return next((t for t, layers in others.get(stem, {}).items() if layer in layers_in(layers)), base)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_every_matrix_has_the_type_that_llama_quantize_gives_it(name):
    """In each mix of the table; llama.cpp's own snapshots are the answer."""
    checked = 0
    for mix, expected in SNAPSHOTS[name].items():
        if mix in ("F32", "F16", "BF16", "TQ1_0", "TQ2_0"):
            continue
        for tensor in preset(name, mix).tensors:
            is_matrix = sum(size > 1 for size in tensor.shape) > 1 and tensor.name.endswith("weight")
            if is_matrix and not KEPT.search(tensor.name):
                assert tensor.type == snapshot_type(tensor.name, expected), (mix, tensor.name)
                checked += 1
    assert checked > 7_000


SIZES = [  # the mission's table; those said of Mixtral and Qwen3-235B's are GiB, as ollama and Explorer show them
    ("qwen3-30b-a3b", "Q4_K_M", 17 * GIB),
    ("mixtral-8x7b", "Q4_K_M", 26 * GIB),
    ("mixtral-8x22b", "Q4_K_M", 80 * GIB),
    ("qwen3-235b-a22b", "Q4_K_M", 135 * GIB),
    ("qwen3-235b-a22b", "IQ3_XXS", 90 * GIB),
    ("deepseek-v3", "Q4_K_M", 405e9),
    ("deepseek-v3", "IQ2_XXS", 170e9),
]


@pytest.mark.parametrize(("name", "quant", "known"), SIZES)
def test_files_are_as_large_as_people_say(name, quant, known):
    assert preset(name, quant).nbytes == pytest.approx(known, rel=0.10)


PUBLISHED = [  # as those who measured with them say (docs/planner.md has the addresses)
    ("gpt-oss-20b", "MXFP4", 12.1e9),
    ("gpt-oss-120b", "MXFP4", 63.4e9),
    ("glm-4.7-flash", "Q4_K_M", 17.1 * GIB),
    ("gemma-4-26b-a4b", "Q4_K_M", 16.4e9),
]


@pytest.mark.parametrize(("name", "quant", "known"), PUBLISHED)
def test_published_files_have_these_sizes(name, quant, known):
    assert preset(name, quant).nbytes == pytest.approx(known, rel=0.03)


ARCHS = sorted((DATA / "archs").glob("*.gguf"))


@pytest.mark.parametrize("path", ARCHS, ids=lambda p: p.name)
def test_a_file_is_counted_to_the_byte(path):
    with open_gguf(path) as file:
        model = from_file(file)
        assert model.nbytes == sum(t.nbytes for t in file.tensors.values() if t.name in {m.name for m in model.tensors})
        assert model.layers == len({t.layer for t in model.tensors if t.layer is not None})
        assert model.experts > 0


def test_what_a_layer_keeps():
    """Numbers a position, by hand from the configurations."""
    assert preset("qwen3-30b-a3b").pasts[0] == Past("gqa", 4 * 128, 4 * 128)
    assert preset("deepseek-v3").pasts[5] == Past("mla", 512 + 64)
    assert preset("gpt-oss-20b").pasts[0].window == 128
    assert preset("gpt-oss-20b").pasts[1].window == 0
    gemma = preset("gemma-4-26b-a4b").pasts
    assert [p.window for p in gemma[:6]] == [1024] * 5 + [0] and gemma[5] == Past("gqa", 2 * 512, 2 * 512)
    delta = preset("qwen3-next-80b-a3b").pasts
    assert [p.mixer for p in delta[:4]] == ["delta", "delta", "delta", "gqa"]
    assert delta[0].state_bytes == 4 * (3 * (2 * 16 * 128 + 32 * 128) + 32 * 128 * 128)


@pytest.mark.parametrize(("name", "quant", "hint"), [
    ("qwen3-30b", "Q4_K_M", "qwen3-30b-a3b"),
    ("mixtral", "Q4_K_M", "mixtral-8x7b"),
    ("qwen3-30b-a3b", "Q4KM", "Q4_K_M"),
    ("gpt-oss-20b", "bogus", "Q4_K_M"),
])  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest(name, quant, hint):
    with pytest.raises(PlanError, match=hint):
        preset(name, quant)
