"""Token ids equal llama.cpp's on every file of the shared reference, bad metadata is refused by name, and no text,
however odd or long, breaks the tokenizer."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, shared_files
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.gguf import open_gguf
from moe_ref.pretokenizers import NOT_BYTE_LEVEL, PRETOKENIZERS
from moe_ref.tokenizer import StreamDecoder, Tokenizer, TokenizerError, byte_characters, load_tokenizer

GOLDEN = SHARED / "data/golden"
TRAINED = SHARED / "data/trained"

ALPHABET = byte_characters()
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ", "a a", "aa aa", "Ã ©"]
CONTROL, USER_DEFINED = 3, 4


def metadata(pre: str | None = "gpt-2", special: dict[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """A tokenizer of all bytes and a few merges; ``special`` maps further tokens to their types, from id 265 on."""
    tokens = ALPHABET + [merge.replace(" ", "") for merge in MERGES] + list(special or {})
    kinds = [1] * (len(tokens) - len(special or {})) + list((special or {}).values())
    found: dict[str, Any] = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": MERGES, "token_type": kinds}
    found |= keys
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def tokenizer(*args: Any, **kwargs: Any) -> Tokenizer:
    return load_tokenizer(metadata(*args, **kwargs))


def load(path: Path) -> Tokenizer:
    with open_gguf(path) as gguf:
        return load_tokenizer(gguf.metadata)


def pieces(ids: list[int], by: Tokenizer) -> list[str]:
    return [by.token_bytes(i).decode("utf-8", "replace") for i in ids]


# ---- against llama.cpp

ANSWERS = GOLDEN / "tokenization.json"
GOLDEN_NAMES = list(json.loads(ANSWERS.read_text("utf-8"))["files"]) if ANSWERS.is_file() else []


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_ids_equal_those_of_llama_cpp_and_decode_back(name: str) -> None:
    golden = json.loads(ANSWERS.read_text("utf-8"))
    path = next(p for folder in ("archs", "quants") for p in sorted((GOLDEN / folder).glob(f"{name[:-5]}.*.gguf")))
    with open_gguf(path) as gguf:
        if (model := gguf.metadata["tokenizer.ggml.model"]) != "gpt2":
            with pytest.raises(TokenizerError, match=f"'{model}' is not supported"):
                load_tokenizer(gguf.metadata)
            return
        mine = load_tokenizer(gguf.metadata)
    for text, (plain, special, same) in zip(golden["texts"], golden["files"][name], strict=True):
        assert mine.encode(text, add_special=False, parse_special=False) == plain, repr(text)
        assert mine.encode(text, add_special=True, parse_special=True) == special, repr(text)
        assert (mine.decode(plain) == text) == same, repr(text)


@pytest.mark.parametrize("path", shared_files("data/golden/vocab/*.gguf"))
def test_vocabulary_tests_of_llama_cpp_pass_to_the_last_id(path: Path) -> None:
    if "spm" in path.name or "phi-3" in path.name:
        with pytest.raises(TokenizerError, match="'llama' is not supported"):
            load(path)
        return
    mine = load(path)
    texts = Path(f"{path}.inp").read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text("utf-8").split("\n")
    assert len(texts) == len(lines) and len(texts) > 40
    for text, line in zip(texts, lines, strict=True):
        ids = mine.encode(text, add_special=False, parse_special=False)
        assert ids == [int(word) for word in line.split()], repr(text)
        assert mine.decode(ids) == text


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    path = TRAINED / "moe-40m-Q4_K_M.gguf"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return load(path)


def test_trained_model_cuts_its_held_out_text_into_31497_tokens_quickly(trained: Tokenizer) -> None:
    text = (TRAINED / "valid.txt").read_bytes().decode("utf-8")
    start = time.perf_counter()
    ids = trained.encode(text, add_special=False, parse_special=False)
    assert time.perf_counter() - start < 1.0, "100 KB should take well under a second"
    assert len(ids) == 31497
    assert trained.decode(ids) == text


def test_recorded_tokens_of_the_trained_model_are_what_its_text_encodes_to(trained: Tokenizer) -> None:
    recorded = np.load(TRAINED / "moe-40m-routing.npz")["tokens"].reshape(16, 256)
    for passage in recorded.tolist():
        assert trained.encode(trained.decode(passage), add_special=False) == passage


AWKWARD = "It's WE'll naïve camelCase 1234567½ \t x=e\u0301té; ——“日本語のABC”!?/\r\n\n  12한국\u3000。 IMGIMGABZ ...  "
# One way of cutting a row, its pieces as llama.cpp's own unicode_regex_split gives them (0.5.0-dev, built for this).
CUTS = {
    "gpt-2": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ 1234567½¦"
    " \t¦ x¦=¦e¦\u0301¦té¦;¦ ——“¦日本語のABC¦”!?/¦\r\n\n ¦ 12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "starcoder": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=¦e¦\u0301¦té¦;¦ ——“¦日本語のABC¦”!?/¦\r\n\n  ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "default": "It¦'¦s¦ WE¦'¦ll¦ naïve¦ camelCase¦ ¦123¦456¦7½¦"
    " \t¦ x¦=¦e¦\u0301¦té¦;¦ ¦——“¦日本語のABC¦”!?/¦\r\n\n ¦ ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ¦...¦  ",
    "falcon": "It¦'¦s¦ WE¦'¦ll¦ naïve¦ camelCase¦ ¦123¦456¦7½¦"
    " \t¦ x¦=¦e¦\u0301¦té¦;¦ ¦——“¦日本語のABC¦”!?/¦\r\n\n ¦ 12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ¦...¦  ",
    "qwen2": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r\n\n¦ ¦ ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "qwen35": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r\n\n¦ ¦ ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "laguna": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r¦\n\n¦ ¦ ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "ufakzeka": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r\n\n¦ ¦ ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "seed-coder": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語のABC¦”!?/¦\r\n\n¦ ¦ ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "bailingmoe": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r\n\n¦ ¦ ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "exaone-moe": "It¦'s¦ WE¦'ll¦ naïve camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r¦\n\n¦ ¦ ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "llama3": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦123¦456¦7½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r\n\n¦ ¦ ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "jais-2": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦123¦456¦7½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r\n\n¦ ¦ ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "minicpm5": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦123¦456¦7½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r\n\n¦  ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "gpt-4o": "It's¦ WE'll¦ naïve¦ camel¦Case¦ ¦123¦456¦7½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語の¦ABC¦”!?/\r\n\n¦ ¦ ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "granite-embed-multi-97m": "It's¦ WE'll¦ naïve¦ camel¦Case¦ ¦123¦456¦7½¦"
    " \t¦ x¦=e\u0301té¦;¦ ——“¦日本語の¦ABC¦”!?/\r\n\n¦ ¦ ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "tekken": "It¦'s¦ WE¦'ll¦ naïve¦ camel¦Case¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語の¦ABC¦”!?/\r\n\n¦ ¦ ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "youtu": "It's¦ WE'll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e\u0301té¦;¦ ¦——“¦日本語の¦ABC¦”¦!?/\r\n\n¦ ¦ ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "tiny_aya": "It's¦ WE'll¦ naïve¦ camelCase¦ ¦12¦345¦67½¦"
    " \t¦ x¦=e\u0301té¦;¦ ——“¦日本語のABC¦”!?/\r\n\n¦ ¦ ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "afmoe": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦12¦345¦67½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語の¦ABC¦”!?/\r\n\n¦ ¦ ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "superbpe": "It's WE'll naïve camelCase ¦1¦234¦567½¦"
    " \t x=e\u0301té; ——“日本語のABC”!?/\r\n\n  ¦12¦한국\u3000。 IMGIMGABZ ...  ",
    "kimi-k2": "It's¦ WE'll¦ naïve¦ camelCase¦ ¦123¦456¦7½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語¦のABC¦”!?/\r\n\n¦ ¦ ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "deepseek-v3": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦123¦456¦7½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語の¦ABC¦”!?/\r\n\n¦  ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "spark2_5": "It¦'s¦ WE¦'ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=e¦\u0301té¦;¦ ——“¦日本語の¦ABC¦”!?/¦\r¦\n¦\n¦  ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "deepseek-llm": "It¦'¦s¦ WE¦'¦ll¦ na¦ï¦ve¦ camelCase¦ ¦1234567½¦"
    " \t¦ x¦=¦e¦\u0301¦t¦é¦;¦ ¦——¦“¦日本語の¦ABC¦”¦!?/¦\r¦\n¦\n¦  ¦12¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "deepseek-coder": "It¦'¦s¦ WE¦'¦ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x¦=¦e¦\u0301¦té¦;¦ ¦——“¦日本語の¦ABC¦”¦!?/¦\r¦\n¦\n¦  ¦1¦2¦한국¦\u3000¦。¦ IMGIMGABZ¦ ...¦  ",
    "poro-chat": "It's¦ WE'll¦ naïve¦ camelCase¦ 1234567½¦"
    " \t¦ x=e\u0301té;¦ ——“日本語のABC”¦!?¦/¦\r\n\n ¦ 12한국¦\u3000。¦ IMGIMGABZ¦ ...  ",
    "viking": "It's¦ WE'll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " \t¦ x=e\u0301té;¦ ——“日本語のABC”¦!?¦/¦\r\n\n ¦ ¦1¦2¦한국¦\u3000。¦ IMGIMGABZ¦ ...  ",
    "chameleon": "It¦'¦s¦ WE¦'¦ll¦ naïve¦ camelCase¦ ¦1¦2¦3¦4¦5¦6¦7¦½¦"
    " ¦\t¦ x¦=¦e¦\u0301¦té¦;¦ ¦—¦—¦“¦日本語のABC¦”¦!¦?¦/¦\r¦\n¦\n¦  ¦1¦2¦한국¦\u3000¦。¦ ¦IMGIMGABZ¦ ¦.¦.¦.¦  ",
}  # fmt: skip
