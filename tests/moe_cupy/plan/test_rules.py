"""Placement by llama.cpp's flags; patterns against what llama.cpp's own regular expressions found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_cupy.plan import PlanError
from moe_cupy.plan.rules import CPU, GPU, cpu_moe, gpu_layers, n_cpu_moe, parse_overrides, place
from moe_cupy.plan.shapes import from_file, preset
from moe_ref.gguf import open_gguf

DATA = Path(__file__).resolve().parents[2] / "data"
TABLE = json.loads((DATA / "plan" / "overrides.json").read_text())
GOLDEN = Path(__file__).resolve().parents[4] / "shared/data/golden/archs"


def run_lengths(text: str) -> str:
    return re.sub(r"(.)\1*", lambda m: f"{m[1]}{len(m[0])} ", text).strip()


@pytest.mark.parametrize("text", TABLE["cases"])
def test_a_rule_finds_what_llama_cpp_finds(text):
    """In every tensor name of the golden files and of the bundled architectures."""
    expected = TABLE["cases"][text]
    if expected.startswith("error"):
        with pytest.raises(PlanError, match="-ot"):
            parse_overrides(text, ("CPU", "CUDA0", "CUDA1"))
        return
    rules = parse_overrides(text, ("CPU", "CUDA0", "CUDA1"))
    letters = {"CPU": "C", "CUDA0": "0", "CUDA1": "1"}
    found = [next((letters[r.device] for r in rules if r.found_in(name)), "-") for name in TABLE["names"]]
    assert run_lengths("".join(found)) == expected


def test_the_table_has_every_name_of_the_files_that_are_here():
    files = [*GOLDEN.glob("*.gguf"), *(DATA / "archs").glob("*.gguf")]
    names = set()
    for path in files:
        with open_gguf(path) as file:
            names |= set(file.tensors)
    assert len(files) >= 10 and names <= set(TABLE["names"])


def test_exps_does_not_find_a_shared_expert():
    rule = parse_overrides("exps=CPU")[0]
    assert rule.found_in("blk.3.ffn_up_exps.weight") and not rule.found_in("blk.3.ffn_up_shexp.weight")


def layers_on_cpu(placement, part: str) -> set[int]:
    model = preset("deepseek-v2-lite")
    return {t.layer for t in model.tensors if t.part == part and placement.device[t.name] == CPU}


def test_n_cpu_moe_counts_dense_layers_from_the_first():
    """DeepSeek-V2-Lite's layer 0 is dense: N = 3 moves the experts of layers 1 and 2."""
    placement = place(preset("deepseek-v2-lite"), 28, n_cpu_moe(3))
    assert layers_on_cpu(placement, "routed") == {1, 2}
    assert layers_on_cpu(placement, "dense") == layers_on_cpu(placement, "shared") == set()


def test_cpu_moe_leaves_the_rest_on_the_gpu():
    placement = place(preset("deepseek-v2-lite"), 28, cpu_moe())
    assert layers_on_cpu(placement, "routed") == set(range(1, 27))
    assert placement.device["output.weight"] == GPU and placement.device["token_embd.weight"] == CPU


def test_ngl_counts_from_the_last_and_the_output_first():
    model = preset("deepseek-v2-lite")
    one = place(model, 1, [])
    assert one.device["output.weight"] == one.device["output_norm.weight"] == GPU and set(one.pasts) == {CPU}
    three = place(model, 3, [])
    assert {t.layer for t in three.on(GPU, model.tensors)} == {None, 25, 26}
    assert three.pasts == (CPU,) * 25 + (GPU,) * 2
    assert set(place(model, 0, []).device.values()) == {CPU}


def test_the_first_rule_in_the_order_of_the_line_decides():
    model = preset("deepseek-v2-lite")
    rules = parse_overrides(r"blk\.26\.ffn_.*_exps=CUDA0") + cpu_moe()
    assert layers_on_cpu(place(model, 28, rules), "routed") == set(range(1, 26))
    assert layers_on_cpu(place(model, 28, rules[::-1]), "routed") == set(range(1, 27))


def test_a_tied_embedding_is_kept_twice():
    """llama.cpp loads token_embd again as the output, on the GPU."""
    assert place(preset("gemma-4-26b-a4b"), 31, []).tied_copy
    assert not place(preset("gemma-4-26b-a4b"), 0, []).tied_copy
    assert not place(preset("deepseek-v2-lite"), 28, []).tied_copy


@pytest.mark.parametrize("path", sorted((DATA / "archs").glob("*.gguf")), ids=lambda p: p.stem)
def test_every_tensor_of_a_file_has_a_place(path):
    with open_gguf(path) as file:
        model = from_file(file)
    placement = place(model, model.layers + 1, cpu_moe())
    routed = {t.name for t in model.tensors if placement.device[t.name] == CPU} - {"token_embd.weight"}
    assert routed == {t.name for t in model.tensors if re.search(r"_exps\.", t.name)}


@pytest.mark.parametrize(("text", "layers"), [(None, 28), ("auto", 28), ("all", 28), ("99", 28), ("5", 5), ("0", 0)])
def test_layers_are_a_number_or_a_word(text, layers):
    assert gpu_layers(text, 27) == layers


def test_other_words_are_refused():
    with pytest.raises(PlanError, match="-ngl many"):
        gpu_layers("many", 27)


def test_layers_behind_the_trunk_are_counted_before_it():
    """llama.cpp: from layer n_layer_all + 1 - N on, the output being layer n_layer_all; here 27 layers and 2 behind."""
    for n in range(33):
        on_gpu = [layer for layer in range(30) if layer >= 29 + 1 - n]
        assert gpu_layers(str(n), 27, 2) == sum(layer < 27 or layer == 29 for layer in on_gpu)
