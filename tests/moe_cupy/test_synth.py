"""Route-replay models take the recorded routes in both engines, whatever their shape and format."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest

from moe_cupy.cli import main
from moe_cupy.engine import Engine
from moe_cupy.lab.synth import Plan, synthesise
from moe_cupy.lab.trace import read_trace, write_trace
from moe_ref.gguf import open_gguf
from moe_ref.model import Model
from tests.conftest import SHARED
from tests.moe_cupy.test_replay import drawn

TRACE = drawn(200, 4, 12, 3, 0)


@pytest.fixture
def routes(tmp_path) -> str:
    out = io.BytesIO()
    write_trace(out, TRACE)
    (tmp_path / "t.npz").write_bytes(out.getvalue())
    return str(tmp_path / "t.npz")


SHAPES = [("Q4_K", 256, 256), ("q4_k_m", 256, 256), ("MXFP4", 256, 96), ("F16", 384, 40)]


@pytest.mark.parametrize(("quant", "hidden", "ffn"), SHAPES)
def test_both_engines_take_the_recorded_routes(tmp_path, routes, quant, hidden, ffn):
    path = str(tmp_path / "m.gguf")
    shape = ["--hidden", str(hidden), "--ffn", str(ffn), "--quant", quant]
    assert main(["synth", "--routes", routes, *shape, "-o", path]) == 0
    ids = [int(line) for line in (tmp_path / "m.tokens").read_text().split()]
    assert ids == list(range(200))
    model, seen = Model(path), {}
    model.observe = seen.__setitem__
    model.logits(ids)
    got = np.stack([seen[f"ffn_moe_topk-{layer}"] for layer in range(4)], axis=1)
    assert np.mean(np.sort(got, axis=2) == np.sort(TRACE.experts, axis=2)) >= 0.99
    if quant == "Q4_K":
        routed = []
        with Engine(path, cache="slots:9") as engine:
            engine.forward.observe = lambda layer, b: routed.append(b.ids[0].copy())
            for token in ids:
                engine.decode(token)
        got = np.stack(routed).reshape(200, 4, 3)
        assert np.mean(np.sort(got, axis=2) == np.sort(TRACE.experts, axis=2)) >= 0.99


def test_real_routes_are_taken_too(tmp_path):
    source = SHARED / "data" / "routes" / "ship" / "gpt-oss-20b_decode_1.npz"
    if not source.exists():
        pytest.skip(f"{source} is absent")
    trace = read_trace(source).part(0, 96)
    with open(tmp_path / "m.gguf", "wb") as out:
        synthesise(out, trace, Plan(96, 24, 32, 4, 256, 32, "Q8_0"), seed=1)
    model, seen = Model(tmp_path / "m.gguf"), {}
    model.observe = seen.__setitem__
    model.logits(range(96))
    got = np.stack([seen[f"ffn_moe_topk-{layer}"] for layer in range(24)], axis=1)
    assert np.mean(np.sort(got, axis=2) == np.sort(trace.experts, axis=2)) >= 0.99


def made(seed: int) -> bytes:
    out = io.BytesIO()
    synthesise(out, TRACE, Plan(20, 4, 12, 3, 256, 32, "Q4_0"), seed)
    return out.getvalue()


def test_the_file_is_sound_and_follows_from_the_seed(tmp_path):
    assert made(1) == made(1) != made(2)
    (tmp_path / "m.gguf").write_bytes(made(1))
    with open_gguf(tmp_path / "m.gguf") as file:
        assert file.tensors["blk.3.ffn_down_exps.weight"].shape == (12, 256, 32)
        assert file.metadata["qwen3moe.expert_used_count"] == 3
        raw = file.read("blk.0.ffn_up_exps.weight")
        assert len(np.unique(raw.reshape(12, -1), axis=0)) == 12, "experts differ"


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q5_K_M", "Q3_K_M", "Q8_0", "Q4_0", "IQ4_XS", "MXFP4_MOE"])
def test_mixes_have_the_types_that_llama_quantize_gave_a_file(mix):
    """Expected: types of a qwen3moe file of 2 layers and 4 experts that llama.cpp's tool quantized."""
    source = SHARED / "data" / "golden" / "quants" / f"qwen3moe-256.{mix}.gguf"
    if not source.exists():
        pytest.skip(f"{source} is absent")
    with open_gguf(source) as file:
        wanted = {tensor.name: tensor.type for tensor in file.tensors.values()}
    assert {name: kind for name, kind, _ in Plan(256, 2, 4, 2, 256, 256, mix).tensors()} == wanted


def test_it_is_streamed(tmp_path):
    """The file is far larger than what is held while it is written."""
    plan = Plan(64, 4, 12, 3, 256, 4096, "F16")
    tracemalloc.start()
    with open(tmp_path / "m.gguf", "wb") as out:
        written = synthesise(out, TRACE, plan, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written == (tmp_path / "m.gguf").stat().st_size > 300e6
    assert peak < written / 4, f"{peak / 1e6:.0f} MB held for a file of {written / 1e6:.0f} MB, 75 a layer"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hidden", "200", "--ffn", "64"], "multiple of 128"),
        (["--hidden", "256", "--ffn", "100"], "256"),
        (["--hidden", "256", "--ffn", "256", "--quant", "IQ1_S"], "nothing here encodes type IQ1_S"),
    ],
)
def test_shapes_that_cannot_be_are_refused(tmp_path, capsys, routes, flags, words):
    assert main(["synth", "--routes", routes, *flags, "-o", str(tmp_path / "m.gguf")]) == 2
    err = capsys.readouterr().err
    assert words in err and not (tmp_path / "m.gguf").exists()
