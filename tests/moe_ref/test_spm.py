"""Tokens of plain text with ▁ for a space: merges go by score or by list as llama.cpp's do, words cut for speed change
nothing, and no text takes more than its share of time. Ids of real files are compared in test_tokenizer.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.pretokenizers import SPACE_MARKED
from moe_ref.spm import merge
from moe_ref.tokenizer import StreamDecoder, Tokenizer, TokenizerError, load_tokenizer
from tests.effort import little_computing

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def metadata(
    model: str, words: Mapping[str, Any], special: dict[str, int] | None = None, **keys: Any
) -> dict[str, Any]:
    """<unk> <s> </s>, the byte tokens, then ``words`` with their scores and ``special`` tokens with their types."""
    special = special or {}
    found: dict[str, Any] = {
        "model": model,
        "tokens": ["<unk>", "<s>", "</s>", *BYTES, *words, *special],
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words), *special.values()],
        "scores": [0.0] * 259 + [float(score or 0) for score in words.values()] + [0.0] * len(special),
    }
    found |= keys
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def scored(words: Mapping[str, float], special: dict[str, int] | None = None, **keys: Any) -> Tokenizer:
    return load_tokenizer(
        metadata("llama", words, special, **{"add_space_prefix": False, "add_bos_token": False} | keys)
    )


def listed(merges: str, special: dict[str, int] | None = None, model: str = "gemma4", **keys: Any) -> Tokenizer:
    """Merges as "a+b ab+c"; all parts and results are tokens unless ``tokens`` says otherwise."""
    pairs = [pair.split("+") for pair in merges.split(" ")]
    words = dict.fromkeys(text for left, right in pairs for text in (left, right, left + right))
    given: dict[str, Any] = {"bos_token_id": 1, "merges": [f"{left} {right}" for left, right in pairs]}
    return load_tokenizer(metadata(model, words, special, **given | keys))


def pieces(text: str, by: Tokenizer, **how: bool) -> str:
    """The tokens of ``text`` as the vocabulary has them, between bars."""
    ids = by.encode(text, **{"add_special": False} | how)
    return "|".join(by._vocabulary.texts[i] for i in ids)


# ---- by score


def test_the_best_score_of_the_whole_text_is_merged_first_and_of_equal_scores_the_leftmost() -> None:
    letters = dict.fromkeys("abc", -9.0)
    assert pieces("abc", scored(letters | {"ab": -2, "bc": -1})) == "a|bc"
    assert pieces("abcab", scored(letters | {"ab": -1, "bc": -1, "ca": -1})) == "ab|ca|b"
    assert pieces("aaaaa", scored(letters | {"aa": -1, "aaaa": -2})) == "aaaa|a"
    assert pieces("aaa", scored(letters | {"aa": -1, "aaa": -1})) == "aaa"


def test_a_token_that_no_two_tokens_make_is_never_reached() -> None:
    assert pieces("abc", scored(dict.fromkeys("abc", -9.0) | {"abc": -1})) == "a|b|c"


def test_any_token_can_come_of_a_merge_control_and_byte_tokens_too() -> None:
    mine = scored(dict.fromkeys(["<", "/", "s", ">", "</", "</s"], -1.0))
    assert mine.encode("</s>", add_special=False, parse_special=False) == [2]


def test_what_is_no_token_is_spelled_in_bytes() -> None:
    mine = scored({"a": -1})
    assert pieces("aé\n", mine) == "a|<0xC3>|<0xA9>|<0x0A>"
    assert mine.decode(mine.encode("é🙂\0\ufffd")) == "é🙂\0\ufffd"
    assert mine.decode([3 + 0xC3]) == "\ufffd"


def test_a_byte_without_a_token_is_an_error_that_names_it() -> None:
    mine = load_tokenizer(metadata("llama", {}, tokens=["<unk>", "<s>", "</s>", "a"], token_type=None))
    with pytest.raises(TokenizerError, match=r"no <0xE2>, which '▁' is spelled with"):
        mine.encode("a")


def test_scores_may_be_whole_numbers_and_are_compared_as_float32() -> None:
    words = {"a": 0, "b": 0, "c": 0, "ab": 2**24, "bc": 2**24 + 1}
    assert pieces("abc", scored(words)) == "ab|c"  # the two are equal in float32, so the leftmost is first
    scores = np.array([0] * 259 + list(words.values()), np.int32)
    assert pieces("abc", scored(words, scores=scores)) == "ab|c"
    assert pieces("abc", scored(words, scores=None)) == "ab|c"


# ---- spaces


def test_a_space_is_put_before_the_text_and_after_every_special_token_and_first_left_out_again() -> None:
    mine = scored({"▁": -9, "a": -9, "▁a": -1}, {"<u>": USER_DEFINED}, add_space_prefix=None)
    assert pieces("a", mine) == "▁a"
    assert pieces(" a", mine) == "▁|▁a"
    assert pieces("a</s>a<u>a", mine) == "▁a|</s>|▁a|<u>|▁a"
    assert pieces("a</s>", mine, parse_special=False).startswith("▁a|<0x3C>")
    assert mine.decode(mine.encode("a a")) == "a a"
    assert mine.decode(mine.encode("a</s>a")) == "a</s> a"  # as llama.cpp: only the very first is left out
    assert mine.decode(mine.encode("</s>a"), skip_special=True) == " a"
    assert pieces("a", scored({"a": -1, "▁a": -1})) == "a"  # add_space_prefix false


def test_a_continuation_keeps_its_space_streamed_or_not() -> None:
    mine = scored({"▁": -9, "a": -9, "▁a": -1}, add_space_prefix=True)
    ids = mine.encode("a a")
    assert mine.decode(ids, continues=True) == " a a"
    stream = StreamDecoder(mine)
    assert "".join(map(stream.push, ids)) + stream.flush() == " a a"


def test_the_escaped_space_in_a_text_is_a_space() -> None:
    mine = scored({"▁": -9, "▁▁": -1})
    assert pieces(" ▁", mine) == "▁▁" and mine.decode(mine.encode("▁")) == " "


# ---- bos and eos


def test_bos_and_eos_are_tokens_1_and_2_unless_the_file_says_otherwise_and_bos_is_added() -> None:
    mine = load_tokenizer(metadata("llama", {"▁": -1}))
    assert (mine.bos_id, mine.eos_id, mine.encode("")) == (1, 2, [1])
    both = load_tokenizer(metadata("llama", {}, bos_token_id=2, eos_token_id=1, add_eos_token=True))
    assert both.encode("") == [2, 1] and both.encode("", add_special=False) == []
    assert load_tokenizer(metadata("llama", {}, add_bos_token=False)).encode("") == []
    with pytest.raises(TokenizerError, match=r"add_bos_token is absent, and true for this .* no .*bos_token_id"):
        load_tokenizer(metadata("llama", {}, tokens=["a"], token_type=None, scores=None))


def test_gemma_4_adds_its_bos_even_against_the_file() -> None:
    assert listed("a+b").encode("") == [1]
    with pytest.warns(UserWarning, match="add_bos_token is false and passed over"):
        assert listed("a+b", add_bos_token=False).encode("") == [1]
    with pytest.raises(TokenizerError, match=r"no tokenizer\.ggml\.bos_token_id"):
        listed("a+b", bos_token_id=None)


# ---- by a list of merges


def test_merges_go_by_their_place_in_the_list_and_the_first_of_two_equal_counts() -> None:
    assert pieces("abc", listed("b+c a+b")) == "a|bc"
    assert pieces("abc", listed("a+b b+c a+b")) == "ab|c"
    assert pieces("a b", listed("a+b a+▁")) == "a▁|b"  # a merge may end in a space, though few files have one
    assert pieces("ab", listed("b+a")) == "a|b"


def test_a_run_of_newlines_that_is_a_token_is_that_token_for_gemma_only() -> None:
    special = {"\n\n\n": NORMAL}
    mine = listed("a+b \n+\n \n+a", special)
    assert pieces("a\n\n\nb", mine) == "a|\n\n\n|b"
    assert pieces("\n\n\n\n", mine) == "\n\n|\n\n"
    assert pieces("\na", mine) == "\n|a"  # no merge crosses the end of a run
    sarvam = listed("a+b \n+\n \n+a", special, model="gpt2", pre="sarvam-moe")
    assert pieces("a\n\n\nb", sarvam) == "a|\n\n|\n|b"


def test_a_merge_that_makes_no_token_is_spelled_in_bytes_and_a_byte_without_a_token_left_out() -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "<0x61>"]
    mine = listed("a+b", tokens=tokens, token_type=[UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, BYTE])
    assert pieces("ab", mine) == "<0x61>" and pieces("ba", mine) == "b|a" and pieces("é", mine) == ""


@pytest.mark.parametrize("pre", SPACE_MARKED)
def test_names_of_gpt2_whose_tokens_are_no_bytes_load_and_say_their_text(pre: str) -> None:
    mine = listed("▁+a a+a", model="gpt2", pre=pre, add_bos_token=True)
    assert mine.encode(" aé", add_special=True) == [1, *mine.encode(" aé", add_special=False)]
    assert mine.decode(mine.encode(" a é\n", add_special=False)) == " a é\n"


# ---- words are merged alone


def slowly(symbols: list[str], ranks: dict[str, int], joint: str) -> list[str]:
    """What ``merge`` says it does, by looking at every pair each time."""
    while True:
        pairs = [
            (ranks.get(joint.join(pair), 99999), i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False))
        ]
        best, i = min(pairs, default=(99999, 0))
        if best == 99999:
            return symbols
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


TEXT = st.text("ab▁\n", max_size=30)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.dictionaries(st.text("ab▁\n", min_size=2, max_size=5), st.integers(0, 3), max_size=20))
def test_the_queue_merges_as_looking_at_every_pair_does(text: str, ranks: dict[str, int]) -> None:
    assert merge(list(text), ranks, "") == slowly(list(text), ranks, "")


@settings(max_examples=300, deadline=None)
@given(TEXT, st.dictionaries(st.text("ab▁", min_size=2, max_size=4), st.integers(-3, 0), max_size=12))
def test_cutting_at_words_changes_nothing_by_scores(text: str, words: dict[str, int]) -> None:
    words = dict.fromkeys("ab▁\n", -9) | words
    whole = slowly(list(text), {word: -score for word, score in words.items()}, "")
    assert pieces(text, scored(words)).split("|") == (whole or [""])


@settings(max_examples=300, deadline=None)
@given(st.text("ab▁", max_size=30), st.lists(st.text("ab▁", min_size=1, max_size=3), min_size=2, max_size=24))
def test_cutting_at_words_changes_nothing_by_merges(text: str, parts: list[str]) -> None:
    merges = [f"{left}+{right}" for left, right in zip(parts[::2], parts[1::2], strict=False)]
    ranks = {text.replace("+", " "): i for i, text in reversed(list(enumerate(merges)))}
    mine = listed(" ".join([*merges, "x+a", "x+b", "x+▁"]))
    assert pieces(text, mine).split("|") == (slowly(list(text), ranks, " ") or [""])


@pytest.mark.parametrize("unit", ["a", " ", "\n", "é", "ab", "a ", "a\n", "<", "</s>", "\0"])
def test_a_long_run_takes_time_in_proportion(unit: str) -> None:
    runs = {"a" * 2**k: -k for k in range(1, 6)} | {"▁" * 2**k: -k for k in range(1, 6)}
    for mine in (scored(dict.fromkeys("ab▁", -99) | runs), listed("a+a aa+aa ▁+▁ ▁▁+▁▁ a+b \n+\n")):
        text = unit * (60_000 // len(unit))
        with little_computing(10):
            assert mine.decode(mine.encode(text, add_special=False, parse_special=False)) == text


def test_thousands_of_special_tokens_do_not_slow_a_text_down() -> None:
    special = {f"<unused{i}>": CONTROL for i in range(6000)}  # as Gemma 3 has
    mine = scored(dict.fromkeys("<p> ", -1), special)
    text = "<p> <unused7></p>\n" * 6000
    with little_computing(10):
        assert mine.encode(text).count(mine._vocabulary.ids["<unused7>"]) == 6000


# ---- bad metadata


@pytest.mark.parametrize("model", "bert t5 rwkv plamo2 hybriddna whitespace test".split())
def test_other_models_are_refused_by_name(model: str) -> None:
    with pytest.raises(TokenizerError, match=f"model '{model}' is not supported; supported: gpt2, llama, gemma4;"):
        load_tokenizer(metadata(model, {}))


@pytest.mark.parametrize("model", ["none", "no_vocab"])
def test_a_file_without_tokens_says_so(model: str) -> None:
    with pytest.raises(TokenizerError, match=f"model is '{model}': the file says that it has no tokens"):
        load_tokenizer({"tokenizer.ggml.model": model})


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("llama", {"scores": [1.0]}, "scores: 1 scores for 259 tokens"),
        ("llama", {"scores": ["x"] * 259}, "scores: the element 'x'"),
        ("llama", {"scores": [float("nan")] * 259}, "scores: a score is not a number"),
        ("llama", {"add_space_prefix": 1}, "add_space_prefix: 1, expected true or false"),
        ("llama", {"tokens": None}, "tokens is missing"),
        ("gemma4", {"merges": None}, "merges is missing"),
    ],
)
def test_bad_metadata_is_refused_by_the_name_of_its_key(model: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(metadata(model, {}, **{"bos_token_id": 1} | keys))


def test_a_token_ends_at_its_first_nul_as_in_llama_cpp() -> None:
    mine = scored({"a\0b": -1, "\0": -1})
    assert mine.decode([259, 260]) == "a[EMPTY_260]"


def test_no_library_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert pieces("a", scored({"a": -1})) == "a"
