"""`inspect` describes any GGUF file, says what of it is not supported, and never ends in a traceback; what `inspect`
calls unsupported is refused by everything else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, shared_files

from moe_ref.__main__ import main
from moe_ref.gguf import GGUFError, open_gguf
from moe_ref.model import Model
from tests import models
from tests.gguf_writer import gguf_bytes, write_gguf
from tests.models import Shape

FIELDS = "architecture layers experts experts_used tensors bytes bytes_per_expert tokenizer unsupported warnings"
LORA = {"blk.0.attn_q.weight.lora_a": ("F32", (8, 64), bytes(2048))}
IMATRIX = {"blk.0.attn_q.weight.in_sum2": ("F32", (1, 64), bytes(256))}
VISION = {"v.blk.0.attn_q.weight": ("F16", (64, 64), bytes(8192))}
TOKENS = {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}


def inspected(path: str | Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What --json says, after a look at the table, which must say the same in words."""
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(FIELDS.split()) <= set(facts)
    assert all(said in text for said in (*facts["warnings"], *facts["unsupported"]))
    assert ("can be run here" in text.splitlines()) == (not facts["unsupported"])
    return facts


def model_bytes(split: dict[str, Any] | None = None, **tokenizer: Any) -> bytes:
    """A tiny qwen3moe model, with ``tokenizer.ggml`` keys if there are any."""
    keys = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    shape = Shape(vocab=len(tokenizer.get("tokens", range(96))))  # a row of the embedding for each token
    return gguf_bytes({**models.metadata(shape), **keys, **(split or {})}, models.tensors(shape, seed=0))


@pytest.mark.parametrize(
    ("metadata", "tensors", "reason"),
    [
        ({}, {}, "general.architecture: missing"),
        ({"general.architecture": [1], "general.name": 7, "general.type": [2]}, {}, "general.type: "),
        ({"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}, LORA, "'adapter'"),
        ({"general.type": "imatrix", "imatrix.chunk_count": 3}, IMATRIX, "'imatrix'"),
        ({"general.architecture": "clip", "general.type": "mmproj"}, VISION, "'mmproj'"),
        ({"general.architecture": "clip"}, VISION, "'clip' is not supported; supported: dbrx, "),
        ({"general.architecture": "llama", "llama.block_count": float("nan")}, {}, "token_embd.weight: missing"),
    ],
    ids="empty odd lora imatrix mmproj clip vocab-only".split(),
)
def test_files_that_are_no_model_of_ours_are_described_and_refused(metadata, tensors, reason, tmp_path, capsys):
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    facts = inspected(path, capsys)
    assert reason in facts["unsupported"][0]
    assert [tensor["name"] for tensor in facts["tensors"]] == list(tensors)
    assert facts["bytes"]["total"] == sum(len(raw) for _, _, raw in tensors.values())
    with pytest.raises(ValueError, match=reason.replace(".", r"\.")):
        Model(path)


def test_a_tensor_type_that_ggml_does_not_have_is_shown_by_its_id_and_refused_elsewhere(tmp_path, capsys):
    raw, name = bytearray(model_bytes()), b"blk.1.attn_q.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # behind the name: number of dimensions, two of them, type id
    raw[at : at + 4] = (99).to_bytes(4, "little")
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    facts = inspected(path, capsys)
    assert facts["unsupported"] == ["tensor type unknown id 99 (1 tensors)"]
    tensor = next(t for t in facts["tensors"] if t["name"] == name.decode())
    assert (tensor["type"], tensor["shape"], tensor["bytes"]) == ("unknown id 99", [64, 64], 64 * 64 * 4)
    for refusing in (open_gguf, Model):
        with pytest.raises(GGUFError, match=r"tensor blk\.1\.attn_q\.weight: found type id 99; accepted: F32 \(0\)"):
            refusing(path)
    assert main(["dequantize", str(path), name.decode(), "-o", str(tmp_path / "o.npy")]) == 2
    assert "type unknown id 99 is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "unsupported", "warning"),
    [
        ({}, None, "there is no tokenizer"),
        ({"model": "none"}, None, "there is no tokenizer"),
        (TOKENS, None, None),
        (TOKENS | {"pre": ""}, None, "tokenizer.ggml.pre is missing; 'default' is used"),
        (TOKENS | {"pre": "qwen9"}, "tokenizer.ggml.pre 'qwen9' is not known", None),
        (TOKENS | {"pre": [1, 2]}, "tokenizer.ggml.pre ", None),
        (TOKENS | {"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported", None),
        (TOKENS | {"tokens": ["a", b"\xff", "ab"]}, "tokenizer.ggml.tokens[1]", None),
    ],
    ids="absent none good no-pre unknown-pre odd-pre bert not-utf8".split(),
)
def test_the_tokenizer_is_judged_too(keys, unsupported, warning, tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(model_bytes(**keys))
    facts = inspected(tmp_path / "m.gguf", capsys)
    for found, expected in ((facts["unsupported"], unsupported), (facts["warnings"], warning)):
        assert [(expected or "") in text for text in found] == [True] * bool(expected), found
    assert facts["tokenizer"]["tokens"] == len(keys.get("tokens", []))
    code = main(["tokenize", str(tmp_path / "m.gguf"), "-p", "ab"])
    assert code == (0 if "tokens" in keys and not unsupported else 2)


def test_a_library_that_is_not_installed_is_no_fault_of_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "m.gguf").write_bytes(model_bytes(**TOKENS))
    facts = inspected(tmp_path / "m.gguf", capsys)
    assert facts["unsupported"] == [] and "pip install 'tokenizers" in facts["warnings"][0]


@pytest.mark.parametrize("path", shared_files("data/golden/split/*.gguf"))
def test_the_first_part_of_a_split_file_shows_all_and_another_itself(path, capsys):
    first = "-00001-of-" in path.name
    facts = inspected(path, capsys)
    whole = SHARED / "data/golden/quants/qwen3moe-256.IQ1_S.gguf"
    with open_gguf(whole if first else path) as file:
        assert {t["name"] for t in facts["tensors"]} == set(file.tensors)
    if first:
        assert (facts["unsupported"], facts["warnings"]) == ([], [])
    else:
        assert "one part of 3; open the first, named qwen3moe-256.IQ1_S-00001-of-00003.gguf" in facts["warnings"][0]
        assert facts["unsupported"][0].startswith("split.count: ")


def test_a_first_part_without_the_others_is_shown_alone(tmp_path, capsys):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(model_bytes({"split.no": np.uint16(0), "split.count": np.uint16(2)}))
    facts = inspected(path, capsys)
    assert "m-00002-of-00002.gguf" in facts["warnings"][0] and facts["unsupported"][0].startswith("split.count: ")
    assert facts["layers"] == 3 and len(facts["tensors"]) == len(models.tensors(Shape(), seed=0))


def test_names_cannot_send_commands_to_the_terminal(tmp_path, capsys):
    path = write_gguf(tmp_path / "m.gguf", {"general.name": "\x1b[2J"}, {"\x1b[31m": ("F32", (1,), bytes(4))})
    assert main(["inspect", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("path", shared_files("data/golden/vocab/*.gguf"))
def test_vocabularies_without_a_model_tokenize_a_file_and_are_described(path, tmp_path, capsys):
    facts = inspected(path, capsys)
    assert facts["tokenizer"]["tokens"] > 30_000 and not any("tokenizer" in reason for reason in facts["unsupported"])
    texts = Path(f"{path}.inp").read_bytes().split(b"\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text("utf-8").split("\n")
    which = max(range(len(texts)), key=lambda i: len(texts[i]))
    (tmp_path / "text").write_bytes(texts[which])
    command = ["tokenize", str(path), "-f", str(tmp_path / "text"), "--no-special", "--no-parse-special"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == [int(word) for word in lines[which].split()]
