"""The same model stored otherwise computes the same: in parts, with matrices together, in the layout of older files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from layouts import Stored, fuse_attention, fuse_experts, merge_kv_b, rewritten

from moe_ref.config import ConfigError
from moe_ref.gguf import GGUFError, open_gguf
from moe_ref.model import Model
from moe_ref.split import open_model

GOLDEN = SHARED / "data/golden"


def golden(name: str) -> Path:
    path = GOLDEN / name
    return path if path.is_file() else pytest.skip(f"no {name} in {GOLDEN}")


def same_logits(one: Path, other: Path, tolerance: float = 0.0, **options: Any) -> np.ndarray:
    tokens = np.array([5, 9, 200, 31, 7, 7, 300, 2])
    first, second = Model(one), Model(other)
    for name, value in options.items():
        setattr(second, name, value)
    a, b = first.logits(tokens), second.logits(tokens)
    assert np.abs(a - b).max() <= tolerance, f"{other.name}: {np.abs(a - b).max():.3g} > {tolerance}"
    return a


# ---------------------------------------------------------------------------------------------------------
# Matrices together


FUSABLE = ["archs/mixtral.F16.gguf", "archs/qwen2moe.F16.gguf", "archs/qwen3moe.BF16.gguf",
           "quants/qwen3moe-256.Q8_0.gguf", "quants/qwen3moe-256.IQ3_XXS.gguf"]  # fmt: skip


@pytest.mark.parametrize("name", FUSABLE)
def test_attn_qkv_is_the_three_matrices_one_below_the_other(name, tmp_path):
    fused = rewritten(golden(name), tmp_path / "fused.gguf", fuse_attention)
    assert "blk.0.attn_qkv.weight" in open_gguf(fused).tensors
    same_logits(golden(name), fused)


@pytest.mark.parametrize("name", FUSABLE)
def test_ffn_gate_up_exps_holds_each_experts_gate_rows_first(name, tmp_path):
    fused = rewritten(golden(name), tmp_path / "fused.gguf", fuse_experts)
    same_logits(golden(name), fused)
    model, plain = Model(fused), Model(golden(name))
    for part, other in zip(model.expert(1, 2), plain.expert(1, 2), strict=True):
        assert np.array_equal(part, other)
    whole = "blk.1.ffn_up_exps.weight"
    assert np.array_equal(model.weights[whole], plain.weights[whole])


def test_rows_that_do_not_add_up_are_refused(tmp_path):
    def cut(stored: Stored) -> None:
        fuse_attention(stored)
        kind, (rows, width), raw = stored["blk.1.attn_qkv.weight"]
        stored["blk.1.attn_qkv.weight"] = (kind, (rows - 1, width), raw[: len(raw) // rows * (rows - 1)])

    path = rewritten(golden("archs/mixtral.F16.gguf"), tmp_path / "cut.gguf", cut)
    with pytest.raises(ConfigError, match=r"^blk\.1\.attn_qkv\.weight: shape .* have 192 rows"):
        Model(path)


def test_a_tied_output_is_the_embedding_matrix(tmp_path):
    """Untied with the embedding's own bytes as its head, a file computes what it computes without a head."""

    def tie(stored: Stored) -> None:
        stored["output.weight"] = stored["token_embd.weight"]

    tied = rewritten(golden("archs/qwen3moe.BF16.gguf"), tmp_path / "a.gguf", lambda s: s.pop("output.weight"))
    same_logits(tied, rewritten(golden("archs/qwen3moe.BF16.gguf"), tmp_path / "b.gguf", tie))


# ---------------------------------------------------------------------------------------------------------
# Multi-head latent attention: two ways to compute it, two ways to store it

MLA = ["archs/deepseek-v2-lite.F16.gguf", "archs/deepseek-v3.BF16.gguf"]


@pytest.mark.parametrize("name", MLA)
def test_absorbed_attention_equals_rebuilt_keys_and_values(name):
    """The two differ by the order of sums alone: float64 agrees to 1e-12 of float32's distance."""
    tokens = np.array([5, 9, 200, 31, 7, 7, 300, 2])
    plain, absorbed = Model(golden(name), dtype=np.float64), Model(golden(name), dtype=np.float64)
    plain.absorb_mla = False
    a, b = plain.logits(tokens), absorbed.logits(tokens)
    assert 0 < np.abs(a - b).max() < 1e-10
    same_logits(golden(name), golden(name), tolerance=2e-4, absorb_mla=False)


@pytest.mark.parametrize(("name", "key", "value", "heads"), [(MLA[0], 32, 20, 2), (MLA[1], 40, 28, 4)])
def test_files_that_store_attn_kv_b_as_one_matrix_compute_the_same(name, key, value, heads, tmp_path):
    """Old files have no ``*_mla`` keys: ``key_length`` is the head's own and every head has keys of its own."""
    arch = "deepseek2.attention."
    keys = {arch + "key_length": key, arch + "value_length": value, arch + "head_count_kv": heads,
            arch + "key_length_mla": None, arch + "value_length_mla": None}  # fmt: skip
    old = rewritten(golden(name), tmp_path / "old.gguf", merge_kv_b, **keys)
    same_logits(golden(name), old, tolerance=2e-4)


# ---------------------------------------------------------------------------------------------------------
# Parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    golden("split/qwen3moe-256.IQ1_S-00001-of-00003.gguf")
    return [Path(shutil.copy(path, tmp_path)) for path in sorted((GOLDEN / "split").glob("*.gguf"))]


def test_a_model_in_three_parts_equals_the_file_they_were_cut_from(parts):
    whole = golden("quants/qwen3moe-256.IQ1_S.gguf")
    same_logits(whole, parts[0])
    with open_gguf(whole) as one, open_model(parts[0]) as three:
        assert list(one.tensors) == list(three.tensors)
        for name in one.tensors:
            assert np.array_equal(one.read(name), three.read(name)), name


def test_a_part_that_is_missing_renamed_or_not_the_first_is_named(parts, tmp_path):
    with pytest.raises(GGUFError, match=r"00002-of-00003\.gguf: split\.count: .*the first, named .*00001-of"):
        open_model(parts[1])
    parts[2].rename(tmp_path / "away")
    with pytest.raises(GGUFError, match=r"00003-of-00003\.gguf: cannot be opened"):
        open_model(parts[0])
    shutil.copy(parts[1], parts[2])
    with pytest.raises(GGUFError, match=r"00003-of-00003\.gguf: split\.no: found part 1 of 3"):
        open_model(parts[0])
    (tmp_path / "away").rename(parts[2])
    other = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(GGUFError, match=r"model\.gguf: split\.count: one part of 3; open the first"):
        open_model(other)


@pytest.mark.parametrize("count", [np.uint16(0), np.uint16(1)])
def test_a_count_of_none_or_one_is_no_split(count, tmp_path):
    path = rewritten(golden("quants/qwen3moe-256.IQ1_S.gguf"), tmp_path / "m.gguf", lambda s: None, split__count=count)
    same_logits(golden("quants/qwen3moe-256.IQ1_S.gguf"), path)


def test_a_part_lacking_a_tensor_is_refused_with_both_counts(parts):
    with open_gguf(parts[2]) as file:
        last = list(file.tensors)[-1]
    rewritten(parts[2], parts[2].with_suffix(".new"), lambda s: s.pop(last), split__no=np.uint16(2),
              split__count=np.uint16(3))  # fmt: skip
    parts[2].with_suffix(".new").rename(parts[2])
    with pytest.raises(GGUFError, match=r"split\.tensors\.count: found (\d+) tensors"):
        open_model(parts[0])
