"""Small models with a key of their metadata dropped, zeroed, changed or added, against what llama.cpp makes of them.

``data/metadata.json`` holds llama.cpp's answers: by model, the change, every 48th logit of the last position (null: it
refuses the file, and so must we), and the tolerance. Recipe: ``benchmarks/metadata_sweep.py --record``.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, TESTS
from layouts import rewritten

from moe_ref.config import ConfigError, load_config
from moe_ref.model import Model

RECORD = json.loads((TESTS / "data" / "metadata.json").read_text())
MODELS = [name for name in RECORD if name != "tokens"]
TWO_KINDS = ("gemma4moe.BF16", "gpt-oss.MXFP4_MOE", "llama4.BF16")  # of layers: with a window and without
OF_SOME_LAYERS = ("rope.", "swa", "sliding", "head_count_kv", "group")
GLM = "glm4moe-bare.BF16"


def found(name: str) -> Path:
    folders = (TESTS / "data" / "archs", SHARED / "data" / "golden" / "archs")
    path = next((path for folder in folders if (path := folder / f"{name}.gguf").is_file()), None)
    return path or pytest.skip(f"no {name}.gguf in {folders[0]} or {folders[1]}")


def changed(name: str, change: dict[str, Any], folder: Path) -> Path:
    keys = {key.replace(".", "__"): value for key, value in change.items()}
    return rewritten(found(name), folder / "changed.gguf", lambda stored: None, **keys)


def complaint(path: Path, want: list[float] | None, allowed: float) -> str:
    """How the reference differs from llama.cpp; empty if it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = Model(path)
            got = model.logits(RECORD["tokens"])[-1, ::48]
            model.close()
        except ConfigError as error:
            return "" if want is None else f"refused: {error}"
    if want is None:
        return "runs, and llama.cpp refuses it"
    error = np.abs(got - want).max()
    return "" if error <= 1e-4 + allowed * max(1, np.std(want)) else f"logits differ by {error:.3g}"


def complaints(name: str, folder: Path, part: tuple[str, ...] = ("",)) -> list[str]:
    rows = [row for row in RECORD[name] if not row[0] or any(text in key for key in row[0] for text in part)]
    each = ((change, complaint(changed(name, change, folder), want, allowed)) for change, want, allowed in rows)
    return [f"{change}: {text}" for change, text in each if text]


@pytest.mark.parametrize("name", [*TWO_KINDS, GLM])
def test_keys_of_some_layers_mean_what_they_mean_in_llama_cpp(name, tmp_path):
    assert complaints(name, tmp_path, OF_SOME_LAYERS) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_keys_mean_what_they_mean_in_llama_cpp(name, tmp_path):
    assert complaints(name, tmp_path) == []


def test_the_record_holds_the_variants_that_were_once_wrong():
    """Layers with a window took the model's base and factor, or lost their factor with the type "none"."""
    changes = [change for name in TWO_KINDS for change, want, _ in RECORD[name] if want]
    assert {"gemma4.rope.freq_base_swa": None} in changes and {"gemma4.rope.scaling.factor": 4.0} in changes
    assert {"gpt-oss.rope.scaling.type": "none"} in changes
    assert {"llama4.rope.scaling.type": "none", "llama4.rope.scaling.factor": 4.0} in changes


# The vocabulary


@pytest.mark.parametrize("count", [383, 385])
def test_another_number_of_tokens_than_rows_is_refused_as_in_llama_cpp(count, tmp_path):
    tokens = [f"<{i}>" for i in range(count)]
    path = changed(GLM, {"tokenizer.ggml.tokens": tokens}, tmp_path)
    with pytest.raises(ConfigError, match=rf"^tokenizer\.ggml\.tokens: {count} tokens, but .* has 384 rows"):
        Model(path)


def test_vocab_size_beside_tokens_says_nothing_as_in_llama_cpp(tmp_path):
    path = changed(GLM, {"glm4moe.vocab_size": 1000}, tmp_path)
    with pytest.warns(UserWarning, match=r"^glm4moe\.vocab_size: 1000 has no effect: the file has 384 tokens"):
        assert Model(path).config.vocab_size == 384


def test_vocab_size_without_tokens_counts_them(tmp_path):
    path = changed(GLM, {"tokenizer.ggml.tokens": None, "glm4moe.vocab_size": 1000}, tmp_path)
    with pytest.raises(ConfigError, match=r"^glm4moe\.vocab_size: 1000 tokens, but .* has 384 rows"):
        Model(path)


# What is refused or said, and has no logits


def test_a_layer_is_not_left_out_by_an_architecture_that_predicts_no_further_tokens(tmp_path):
    """llama.cpp: wrong number of tensors."""
    path = changed("olmoe.BF16", {"olmoe.nextn_predict_layers": 1}, tmp_path)
    with pytest.raises(ConfigError, match=r"^blk\.2\..*olmoe has no use for this tensor"):
        Model(path)


def test_a_width_that_contradicts_the_tensors_is_refused(tmp_path):
    path = changed(GLM, {"glm4moe.expert_feed_forward_length": 48}, tmp_path)
    with pytest.raises(ConfigError, match=r"^glm4moe\.expert_feed_forward_length: 48, but .* the width is 24"):
        Model(path)


def test_a_part_of_a_head_rotated_where_llama_cpp_refuses_it_is_said(tmp_path):
    path = changed("olmoe.BF16", {"olmoe.rope.dimension_count": 8}, tmp_path)
    with pytest.warns(UserWarning, match=r"^olmoe\.rope\.dimension_count: 8 of 16 are rotated; llama\.cpp refuses"):
        Model(path)


@pytest.mark.parametrize("pattern", [1, [False, False]])
def test_a_model_of_windows_without_any_is_refused(pattern):
    """llama.cpp: an assertion."""
    keys = {"block_count": 2, "embedding_length": 24, "context_length": 100, "attention.head_count": 2,
            "attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window": 8, "expert_count": 4,
            "expert_used_count": 2, "attention.sliding_window_pattern": pattern}  # fmt: skip
    metadata = {"general.architecture": "gpt-oss"} | {f"gpt-oss.{key}": value for key, value in keys.items()}
    with pytest.raises(ConfigError, match=r"^gpt-oss\.attention\.sliding_window_pattern: no layer has a window"):
        load_config(metadata, 11)
