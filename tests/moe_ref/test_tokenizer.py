"""Token ids equal llama.cpp's on every file of the shared reference, bad metadata is refused by name, and no text,
however odd or long, breaks the tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, shared_files
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.gguf import open_gguf
from moe_ref.pretokenizers import NOT_BYTE_LEVEL, PRETOKENIZERS
from moe_ref.tokenizer import (
    StreamDecoder,
    Tokenizer,
    TokenizerError,
    _pre_tokenizer,
    _tokenizers_library,
    byte_characters,
    load_tokenizer,
)
from tests.effort import little_computing

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
ABSENT = pytest.param("", marks=pytest.mark.skip(reason=f"no {ANSWERS}"))
GOLDEN_NAMES = list(json.loads(ANSWERS.read_text("utf-8"))["files"]) if ANSWERS.is_file() else [ABSENT]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_ids_equal_those_of_llama_cpp_and_decode_back(name: str) -> None:
    golden = json.loads(ANSWERS.read_text("utf-8"))
    path = next(p for folder in ("archs", "quants") for p in sorted((GOLDEN / folder).glob(f"{name[:-5]}.*.gguf")))
    with open_gguf(path) as gguf:
        mine = load_tokenizer(gguf.metadata)
    for text, (plain, special, same) in zip(golden["texts"], golden["files"][name], strict=True):
        assert mine.encode(text, add_special=False, parse_special=False) == plain, repr(text)
        assert mine.encode(text, add_special=True, parse_special=True) == special, repr(text)
        assert (mine.decode(plain) == text) == same, repr(text)


@pytest.mark.parametrize("path", shared_files("data/golden/vocab/*.gguf"))
def test_vocabulary_tests_of_llama_cpp_pass_to_the_last_id(path: Path) -> None:
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
    with little_computing(10):
        ids = trained.encode(text, add_special=False, parse_special=False)
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


def cut(text: str, pre: str) -> list[str]:
    splitter = _pre_tokenizer(_tokenizers_library(), PRETOKENIZERS[pre])
    return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", CUTS)
def test_every_row_cuts_text_as_llama_cpp_cuts_it(pre: str) -> None:
    assert cut(AWKWARD, pre) == CUTS[pre].split("¦")


def test_every_row_of_the_table_is_in_the_cuts() -> None:
    assert {PRETOKENIZERS[pre].patterns for pre in CUTS} == {row.patterns for row in PRETOKENIZERS.values()}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("superbpe", "12345678½ ½123½", "12¦345¦678½¦ ¦½¦123½"),
        ("afmoe", "abc1234567x12", "abc¦1¦234¦567¦x¦12"),
        ("deepseek-llm", "a  日本 \u3000z\u1680一 ", "a¦  ¦日本¦ ¦\u3000z¦\u1680¦一¦ "),
        ("jais-2", " " * 900 + "\n" + " " * 900 + "x", " " * 900 + "\n¦" + " " * 512 + "¦" + " " * 256 + "¦"
            + " " * 128 + "¦  ¦ ¦ x"),
    ],
)  # fmt: skip
def test_rows_rewritten_for_speed_cut_as_the_originals_do(pre: str, text: str, pieces: str) -> None:
    assert cut(text, pre) == pieces.split("¦")


# ---- special tokens


def test_control_tokens_are_read_only_when_asked_and_user_defined_ones_always() -> None:
    mine = tokenizer(special={"<|c|>": CONTROL, "<u>": USER_DEFINED})
    control, user = mine.vocab_size - 2, mine.vocab_size - 1
    assert mine.encode("<|c|><u>") == [control, user]
    plain = mine.encode("<|c|><u>", parse_special=False)
    assert control not in plain and plain[-1] == user and mine.decode(plain) == "<|c|><u>"
    assert mine.decode([control, user, control], skip_special=True) == "<u>"


def test_the_longest_special_token_is_cut_out_first_wherever_it_is() -> None:
    mine = tokenizer(special={"<a>": CONTROL, "x<": CONTROL, "<é": CONTROL, "<a><b>": CONTROL})
    assert pieces(mine.encode("<a><b><a>"), mine) == ["<a><b>", "<a>"]
    assert pieces(mine.encode("x<a>x<"), mine) == ["x", "<a>", "x<"]
    assert pieces(mine.encode("x<é"), mine) == ["x", "<é"]  # three bytes against two


def test_tokens_eat_whitespace_beside_them_only_where_llama_cpp_says_so() -> None:
    special = {"<mask>": CONTROL, "<|end|>": CONTROL, "<s>": CONTROL}
    assert tokenizer(special=special).decode(tokenizer(special=special).encode("a <|end|> b")) == "a <|end|> b"
    phi3 = load_tokenizer(metadata(special=special) | {"general.name": "Phi-3 mini"})
    assert phi3.decode(phi3.encode("a <|end|> \n b <s> c")) == "a <|end|>b <s> c"
    jina = tokenizer("jina-v2-de", special=special)
    assert jina.decode(jina.encode("a  <mask> b")) == "a<mask> b"


@pytest.mark.parametrize(
    ("special", "keys", "ends"),
    [
        ({"<|im_end|>": 1, "<|endoftext|>": CONTROL}, {}, "<|im_end|> <|endoftext|>"),
        ({"<x>": CONTROL, "<y>": CONTROL}, {"eos_token_id": 265, "eot_token_id": 266}, "<x> <y>"),
        ({"<|fim_pad|>": 4, "<|repo_name|>": 4, "<|fim_middle|>": 4}, {}, "<|fim_pad|> <|repo_name|>"),
        ({"<|return|>": 3, "<|call|>": 3, "<|end|>": 3, "<|start|>": 3}, {}, "<|return|> <|call|>"),
        ({"<|call|>": 3, "<|end|>": 3}, {}, "<|call|> <|end|>"),
        ({"</s>": 3, "<|tool_response>": 3}, {}, "<|tool_response>"),
    ],
)  # the rules of llama_vocab::impl::load
def test_tokens_that_end_a_generation_are_those_of_llama_cpp(special: dict, keys: dict, ends: str) -> None:
    mine = tokenizer(special=special, **keys)
    assert set(pieces(sorted(mine.eog_ids), mine)) == set(ends.split())


def test_end_marks_are_control_tokens_whatever_their_type_says() -> None:
    mine = tokenizer(special={"<|im_end|>": 1, "<|channel|>": CONTROL})
    assert mine.decode([265, 266], skip_special=True) == "<|channel|>"  # and gpt-oss's channel mark is shown


def test_bos_and_eos_are_added_as_the_file_or_its_pre_tokenizer_says() -> None:
    special = {"<s>": CONTROL, "</s>": CONTROL}
    ids = {"bos_token_id": 265, "eos_token_id": 266}
    for keys, pre, expected in [
        ({}, "qwen2", []),
        ({}, "llama-bpe", [265]),
        ({}, "tekken", [265]),
        ({"add_bos_token": False}, "llama-bpe", []),
        ({"add_bos_token": True, "add_eos_token": True}, "gpt-2", [265, 266]),
    ]:
        mine = tokenizer(pre, special, **ids, **keys)
        assert mine.encode("") == expected and mine.encode("", add_special=False) == []
        assert mine.encode("<s>") == [*expected[:1], 265, *expected[1:]]  # a second bos is the caller's wish


def test_missing_bos_and_eos_are_token_11_only_where_that_is_a_control_token() -> None:
    assert (tokenizer("falcon").bos_id, tokenizer("falcon").eos_id) == (None, None)
    kinds = [1] * 265
    kinds[11] = CONTROL
    assert tokenizer("falcon3", token_type=kinds).encode("") == [11]
    assert tokenizer("glm4", token_type=kinds).bos_id is None
    with pytest.raises(TokenizerError, match=r"add_bos_token is absent, and true for this .* no .*bos_token_id"):
        tokenizer("llama-bpe")


# ---- bad metadata


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model is missing; supported: gpt2"),
        ({"model": "rwkv"}, "model 'rwkv' is not supported"),
        ({"pre": "qwen9"}, "pre 'qwen9' is not known; supported: .*qwen2, qwen35.*"),
        ({"pre": NOT_BYTE_LEVEL[0]}, "pre 'whitespace' has tokens that are not bytes"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": "abc"}, "tokens: 'abc', expected an array of str"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": [*ALPHABET, 7]}, "tokens: the element 7"),
        ({"token_type": [1, 1]}, "token_type: 2 types for 265 tokens"),
        ({"merges": None}, "merges is missing"),
        ({"eos_token_id": "</s>"}, "eos_token_id: '</s>', expected a token id"),
        ({"add_bos_token": 1}, "add_bos_token: 1, expected true or false"),
        ({"add_eos_token": True}, "add_eos_token is true, but there is no tokenizer.ggml.eos_token_id"),
    ],
)
def test_bad_metadata_is_refused_by_the_name_of_its_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer(**keys)


def test_a_missing_pre_is_default_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="pre is missing; 'default' is used"):
        mine = tokenizer(None)
    assert mine.encode("a1234!") == tokenizer("default").encode("a1234!")


def test_a_special_id_outside_the_vocabulary_is_warned_of_and_passed_over() -> None:
    with pytest.warns(UserWarning, match="eos_token_id = 4294967295 is outside"):
        assert tokenizer(eos_token_id=2**32 - 1).eos_id is None


@pytest.mark.parametrize("id", [-1, 265, 10**9])
def test_an_unknown_id_is_refused(id: int) -> None:
    with pytest.raises(TokenizerError, match=f"token id {id} is not in the vocabulary, ids are 0 to 264"):
        tokenizer().decode([0, id])


def test_without_the_tokenizers_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="pip install 'tokenizers"):
        tokenizer()


# ---- merges


def test_merges_apply_in_the_order_of_their_rank_and_the_first_of_two_equal_counts() -> None:
    assert pieces(tokenizer().encode("hello hellhe"), tokenizer()) == ["hello", " ", "hell", "he"]
    merges = [*MERGES[:2], "Ġ h", "he ll", "h e"]
    first = tokenizer(tokens=[*ALPHABET, "he", "ll", "hell", "Ġh"], merges=merges, token_type=[1] * 260)
    assert pieces(first.encode(" hell"), first) == [" ", "hell"]


def test_ignore_merges_takes_a_whole_piece_that_is_a_token() -> None:
    tokens = [*ALPHABET, "zebra"]
    keys = {"tokens": tokens, "merges": ["z e"][:0], "token_type": [1] * 257, "add_bos_token": False}
    assert tokenizer("llama-bpe", **keys).encode("zebra") == [256]
    assert len(tokenizer("qwen2", **keys).encode("zebra")) == 5


def test_bytes_without_a_token_are_left_out_and_do_not_join_their_neighbours() -> None:
    tokens = [c for c in ALPHABET if c != "b"] + ["ac"]
    mine = tokenizer(tokens=tokens, merges=["a c"], token_type=[1] * 256)
    assert pieces(mine.encode("abcac"), mine) == ["a", "c", "ac"]


def test_tokens_of_other_types_say_what_llama_cpp_says() -> None:
    mine = tokenizer(special={"<0x0A>": 6, "unused": 5, "<unk>": 2, "": 1})
    assert [mine.token_bytes(i) for i in range(265, 269)] == [b"\n", b"", b"<unk>", b"[EMPTY_268]"]
    assert mine.is_hidden(267) and not mine.is_hidden(265)


# ---- any text

ODD = [
    "", "\0", "a\0b\0", "\r\n", "\r", "\n\n\n", " ", " " * 5000, "\t\v\f\x85\xa0\u2028\u3000", "\ufeff\u200b",
    "\U0010ffff\uffff", "👩‍👩‍👧‍👦🏳️‍🌈", "<|endoftext|>", "'" * 99, "á\u0301" * 50, "\x1b[31m", "\ufffd",
    "ǅ ﬁ ß İ ı", "١٢٣ ½ Ⅷ",
]  # fmt: skip


@pytest.mark.parametrize("pre", CUTS)
def test_odd_texts_decode_back_under_every_row(pre: str) -> None:
    mine = tokenizer(pre, add_bos_token=False)
    for text in ODD:
        assert mine.decode(mine.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.sampled_from(sorted(CUTS)))
def test_any_text_decodes_back(text: str, pre: str) -> None:
    mine = TINY.setdefault(pre, tokenizer(pre, add_bos_token=False))
    assert mine.decode(mine.encode(text)) == text


TINY: dict[str, Tokenizer] = {}


def test_surrogate_pairs_are_joined_and_lone_ones_become_the_replacement_character() -> None:
    mine = tokenizer()
    assert mine.decode(mine.encode("a\ud83d\ude42b")) == "a🙂b"
    assert mine.decode(mine.encode("\udfffa\ud83d")) == "\ufffda\ufffd"


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "gpt-4o", "deepseek-llm", "afmoe", "jais-2"])
@pytest.mark.parametrize("unit", ["a", "A", " ", "1", "\n", "!", "\0", "é"])
def test_a_long_run_takes_time_in_proportion(pre: str, unit: str) -> None:
    mine = TINY.setdefault(pre, tokenizer(pre, add_bos_token=False))
    with little_computing(10):  # much more if a pattern backtracks over the run
        assert mine.decode(mine.encode(unit * 60_000 + "\x01")) == unit * 60_000 + "\x01"


@pytest.mark.slow
def test_a_megabyte_of_one_character_and_too_much_of_one_are_both_survived() -> None:
    mine = tokenizer("gpt-4o")
    assert len(mine.encode("a" * 2**20)) == 2**18  # aaaa
    with pytest.raises(TokenizerError, match="12000000 characters is too much for one call"):
        mine.encode("A" * 12_000_000)


# ---- streaming


def test_a_stream_holds_back_the_bytes_of_an_unfinished_character() -> None:
    mine = tokenizer()
    stream = StreamDecoder(mine)
    smile = mine.encode("🙂")
    assert [stream.push(i) for i in [*smile, ALPHABET.index("x"), smile[0]]] == ["", "", "", "🙂", "x", ""]
    assert stream.flush() == "\ufffd" and stream.flush() == "" and stream.push(ALPHABET.index("x")) == "x"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 266), max_size=12))
def test_the_pieces_of_a_stream_join_to_the_decoded_text(ids: list[int]) -> None:
    mine = TINY.setdefault("special", tokenizer(special={"<c>": CONTROL, "é<u>": USER_DEFINED}))
    for skip in (False, True):
        stream = StreamDecoder(mine, skip_special=skip)
        assert "".join(map(stream.push, ids)) + stream.flush() == mine.decode(ids, skip_special=skip)
