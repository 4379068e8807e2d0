"""``python -m moe_ref quantize``: llama-quantize's choices, a file that others read, whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from conftest import shared_files
from gguf.constants import GGMLQuantizationType
from gguf_writer import write_gguf

import moe_ref.quantize as rules
from moe_ref.__main__ import main
from moe_ref.gguf import TensorInfo, open_gguf
from moe_ref.model import Model
from moe_ref.split import open_model
from tests import models
from tests.models import Shape, tiny_moe

TRAINED = Path(__file__).resolve().parents[2] / "data" / "moe-40m-Q4_K_M.gguf"


@pytest.fixture
def tiny(tmp_path) -> Path:
    return tiny_moe(tmp_path / "tiny.gguf", Shape())


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def error_of(capsys, *arguments: object) -> str:
    """The one line of a refused request."""
    assert main(["quantize", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


# ---------------------------------------------------------------------------------------------------------
# Which tensor becomes what


@pytest.mark.parametrize("mix", rules.MIXES)
def test_mixes_give_every_tensor_the_type_that_llama_quantize_gave(shared, mix):
    folder = shared / "data/golden/quants"
    with open_gguf(folder / "qwen3moe-256.Q8_0.gguf") as file:
        chosen, remarks = rules.choose_types(file, mix, [])
    assert chosen == types_of(folder / f"qwen3moe-256.{mix}.gguf") and not remarks
    if mix == "Q4_K_M":
        with open_gguf(shared / "data/trained/moe-40m-Q8_0.gguf") as file:
            assert rules.choose_types(file, mix, [])[0] == types_of(TRAINED)


MORE = {0, 1, 4, 7, 10, 13, 15, 16, 17}  # of 18 layers
EVERY = set(range(18))


@pytest.mark.parametrize(
    ("mix", "experts", "expected"),
    [  # by llama_model_quantize of llama.cpp 0.5.0-dev on a qwen3moe file of 18 layers: what is not of the base type
        ("Q4_K_M", 6, {"attn_v Q6_K": MORE, "ffn_down_exps Q6_K": MORE}),
        ("Q5_K_M", 6, {"attn_v Q6_K": MORE, "ffn_down_exps Q6_K": MORE}),
        ("Q3_K_M", 6, {"attn_v Q5_K": {0, 1}, "attn_v Q4_K": EVERY - {0, 1}, "attn_output Q4_K": EVERY,
                       "ffn_down_exps Q5_K": {0}, "ffn_down_exps Q4_K": EVERY - {0}}),
        ("Q4_K_M", 8, {"attn_v Q8_0": EVERY, "attn_k Q8_0": EVERY, "attn_output Q5_K": EVERY,
                       "ffn_down_exps Q6_K": MORE}),
        ("Q5_K_M", 8, {"attn_v Q8_0": EVERY, "attn_k Q8_0": EVERY, "ffn_down_exps Q6_K": MORE}),
    ],
)  # fmt: skip
def test_mixes_of_a_deeper_model(mix, experts, expected):
    parts = {"attn_v": (32, 256), "attn_k": (32, 256), "attn_output": (256, 256), "ffn_down_exps": (experts, 256, 256)}
    names = {f"blk.{layer}.{part}.weight": shape for layer in range(18) for part, shape in parts.items()}
    tensors = {name: TensorInfo(name, shape, "F32", 0, 0) for name, shape in names.items()}
    metadata = {"general.architecture": "a", "a.block_count": 18, "a.expert_count": experts}
    found: dict[str, set[int]] = {}
    for name, kind in rules.choose_types(SimpleNamespace(tensors=tensors, get=metadata.get), mix, [])[0].items():
        layer, part = name.removesuffix(".weight").split(".")[1:]
        if kind != rules.MIXES[mix][0]:
            found.setdefault(f"{part} {kind}", set()).add(int(layer))
    assert found == expected


@pytest.mark.parametrize("path", shared_files("data/golden/quants/*.gguf"))
def test_what_llama_quantize_left_alone_is_left_alone(path):
    """Norms and routers are F32 in its files, everything else is not."""
    theirs = types_of(path)
    with open_gguf(path) as file:
        for name, kind in rules.choose_types(file, "Q8_0", [])[0].items():
            assert (kind == "F32") == (theirs[name] == "F32"), name
            assert kind in ("F32", "Q8_0")


def test_the_first_rule_that_matches_decides_and_the_rest_take_the_type(tiny, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    flags = ["--tensor-type", "BLK.0.*_exps=q5_1", "--tensor-type", "_exps=Q4_0", "--tensor-type", "attn_[qk]=f16"]
    assert main(["quantize", str(tiny), str(out), "--type", "q8_0", *flags]) == 0
    found, before = types_of(out), types_of(tiny)
    assert list(found) == list(before)
    for name, kind in found.items():
        if "norm" in name or "ffn_gate_inp" in name:
            assert kind == before[name], name
        elif "_exps" in name:
            assert kind == ("Q5_1" if name.startswith("blk.0.") else "Q4_0"), name
        else:
            assert kind == ("F16" if re.search("attn_[qk]", name) else "Q8_0"), name
    assert "note:" not in capsys.readouterr().err


def test_a_rule_for_nothing_is_said(tiny, tmp_path, capsys):
    for pattern in ("ffn_dwon", "attn_norm"):  # a slip, and what no rule may touch
        flags = ["--type", "Q8_0", "--tensor-type", "_exps=F16", "--tensor-type", f"{pattern}=F16"]
        assert main(["quantize", str(tiny), str(tmp_path / "out.gguf"), *flags]) == 0
        assert f"note: --tensor-type {pattern}=F16: decides no weight matrix of this file" in capsys.readouterr().err


def test_rows_that_do_not_fit_fall_back_as_in_llama_quantize_and_it_is_said(tmp_path, capsys):
    def matrix(width: int) -> tuple[str, tuple[int, ...], bytes]:
        return "F32", (4, width), np.ones((4, width), "<f4").tobytes()

    source = {"a.weight": matrix(256), "b.weight": matrix(64), "c.weight": matrix(40), "a.bias": matrix(256)}
    write_gguf(tmp_path / "in.gguf", {"general.architecture": "x"}, source)
    expected = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_NL": "IQ4_NL"}
    for wanted, fallback in expected.items():
        assert main(["quantize", str(tmp_path / "in.gguf"), str(tmp_path / "out.gguf"), "--type", wanted]) == 0
        found = types_of(tmp_path / "out.gguf")
        assert found == {"a.weight": wanted, "b.weight": fallback, "c.weight": "F16", "a.bias": "F32"}
        said = capsys.readouterr().err
        assert f"note: c.weight: rows of 40 are no whole blocks of {wanted}; F16 instead" in said
        assert (f"b.weight: rows of 64 are no whole blocks of {wanted}; {fallback}" in said) == (wanted != fallback)


# ---------------------------------------------------------------------------------------------------------
# What is in the file


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_the_copy_has_gguf_pys_bytes_and_the_metadata_of_the_original(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setattr(rules, "PIECE_ELEMENTS", 300)  # pieces that end inside an expert
    out = tmp_path / "out.gguf"
    assert main(["quantize", str(tiny), str(out), "--type", name]) == 0
    theirs = {t.name: t for t in gguf.GGUFReader(tiny).tensors}
    for t in gguf.GGUFReader(out).tensors:
        data = theirs[t.name].data
        if t.tensor_type.name != "F32":
            data = gguf.quants.quantize(np.array(data), GGMLQuantizationType[name])
        assert t.data.tobytes() == data.tobytes(), t.name
    with open_gguf(tiny) as before, open_gguf(out) as after:
        new = {"general.quantization_version", "general.file_type"}
        assert after.metadata.keys() == before.metadata.keys() | new
        assert all(after.value_bytes(key) == before.value_bytes(key) for key in before.metadata.keys() - new)
        assert after.metadata["general.quantization_version"] == 2
        assert after.metadata["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{name}"]


@pytest.mark.parametrize("name", rules.TYPES)
def test_file_types_are_those_of_llama_cpp(name):
    names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"} | {f"Q{i}_K": f"MOSTLY_Q{i}_K_M" for i in (3, 4, 5)}
    known = {t.name: int(t) for t in gguf.LlamaFileType}
    wanted = names.get(name, f"MOSTLY_{name}")
    assert rules.FILE_TYPES[name] == known.get(wanted, 38 if name == "MXFP4" else None)


def test_a_quantized_copy_of_the_trained_model_predicts_almost_the_same(tmp_path):
    out = tmp_path / "out.gguf"
    assert main(["quantize", str(TRAINED), str(out), "--type", "Q8_0", "--tensor-type", "_exps=Q6_K"]) == 0
    tokens = list(range(300, 332))
    before, after = Model(str(TRAINED)).logits(tokens), Model(str(out)).logits(tokens)
    assert np.median(np.abs(after - before)) < 0.05 * before.std()
    assert (after.argmax(axis=1) == before.argmax(axis=1)).mean() > 0.85


def test_a_split_model_becomes_one_file(tmp_path):
    whole = models.tensors(Shape(), seed=0)
    names, metadata = list(whole), models.metadata(Shape())
    for i, part in enumerate((names[::2], names[1::2])):
        split = {"split.no": np.uint16(i), "split.count": np.uint16(2), "split.tensors.count": np.int32(len(names))}
        path = tmp_path / f"m-{i + 1:05}-of-00002.gguf"
        write_gguf(path, split | (metadata if i == 0 else {}), {n: whole[n] for n in part})
    write_gguf(tmp_path / "whole.gguf", metadata, {n: whole[n] for n in names[::2] + names[1::2]})
    for source, target in (("m-00001-of-00002.gguf", "a.gguf"), ("whole.gguf", "b.gguf")):
        assert main(["quantize", str(tmp_path / source), str(tmp_path / target), "--type", "Q4_0"]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with open_model(tmp_path / "a.gguf") as file:
        assert not any(key.startswith("split.") for key in file.metadata)


# ---------------------------------------------------------------------------------------------------------
# Refusals, and files that must not be half written


def test_wrong_requests_are_one_line_and_exit_code_2(tiny, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    for name in ("Q9_9", "Q8_K", "IQ2_XXS", ""):
        assert re.search(
            f"--type: type '{name}' cannot be written; .*Q4_K", error_of(capsys, tiny, out, "--type", name)
        )
    for rule, words in (
        ("a=Q9", "type 'Q9' cannot be written"), ("(=Q4_0", "'(' is no regular expression"),
        ("Q4_0", "expected REGEX=TYPE"), ("=Q4_0", "expected REGEX=TYPE"), ("x=", "type '' cannot be written"),
    ):  # fmt: skip
        message = error_of(capsys, tiny, out, "--type", "Q8_0", "--tensor-type", rule)
        assert f"--tensor-type {rule}: " in message and words in message
    assert "missing.gguf" in error_of(capsys, tmp_path / "missing.gguf", out, "--type", "Q8_0")
    assert "no folder" in error_of(capsys, tiny, tmp_path / "no" / "out.gguf", "--type", "Q8_0")
    assert "is a folder" in error_of(capsys, tiny, tmp_path, "--type", "Q8_0")
    assert os.listdir(tmp_path) == ["tiny.gguf"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_said(tiny, capsys):
    assert "/proc/out.gguf: cannot be written" in error_of(capsys, tiny, "/proc/out.gguf", "--type", "Q8_0")


def test_the_input_is_never_the_output(tiny, tmp_path, capsys):
    before = tiny.read_bytes()
    os.symlink(tiny, tmp_path / "link.gguf")
    os.link(tiny, tmp_path / "hard.gguf")
    for out in (tiny, tmp_path / "link.gguf", tmp_path / "hard.gguf"):
        assert "is the input itself" in error_of(capsys, tiny, out, "--type", "Q8_0")
    assert tiny.read_bytes() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_numbers_that_no_block_can_hold_are_refused_by_name(tmp_path, capsys, bad):
    weights = np.ones((4, 32), "<f4")
    weights[3, 7] = bad
    write_gguf(tmp_path / "in.gguf", {}, {"x.weight": ("F32", (4, 32), weights.tobytes())})
    (tmp_path / "out.gguf").write_bytes(b"old")
    message = error_of(capsys, tmp_path / "in.gguf", tmp_path / "out.gguf", "--type", "Q4_0")
    assert "x.weight: holds NaN, infinity, or numbers beyond Q4_0" in message
    assert sorted(os.listdir(tmp_path)) == ["in.gguf", "out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("fault", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), 1)]
)
def test_ctrl_c_and_a_full_disk_leave_nothing(tiny, tmp_path, monkeypatch, capsys, fault, code):
    quantize, calls = rules.quantize, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise fault
        return quantize(*arguments)

    monkeypatch.setattr(rules, "quantize", failing)
    assert main(["quantize", str(tiny), str(tmp_path / "out.gguf"), "--type", "Q8_0"]) == code
    assert os.listdir(tmp_path) == ["tiny.gguf"] and len(calls) == 5
    assert "Traceback" not in capsys.readouterr().err
