"""Vocabularies as files have them: one rule for bos and eos, merges that name no token, one text at two ids."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import shared_files
from tokenizer_cases import CHAT, FILES, merge_cases, special_cases

from moe_ref.chat import render_chat
from moe_ref.gguf import open_gguf
from moe_ref.tokenizer import TokenizerError, load_tokenizer

LLAMA_CPP = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_cases.json").read_text())
REPORTED = {  # file of ../shared/data/reports: a text, the ids of llama.cpp
    "renamed_token_merge_stays": ("<think>a", [383, 66]),
    "merge_of_unknown_token": ("hi qz", [73, 74, 222, 82, 91]),
    "chat_no_bos_add_bos_true": ("<s>hi", [1, 1, 333, 342, 340]),
}


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Iterator[Mapping[str, Mapping[str, Any]]]:
    folder = request.getfixturevalue("shared") / "data" / "golden" / "archs"
    files = {name: open_gguf(folder / f"{name}.gguf") for name in set(FILES.values())}
    yield {name: file.metadata for name, file in files.items()}
    for file in files.values():
        file.close()


def changed(metadata: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (dict(metadata) | dict(changes)).items() if value is not None}


def test_chat_prompts_have_bos_and_eos_as_llama_cpp_gives_them(golden: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for label, file, changes in special_cases():
            metadata = changed(golden[file], changes)
            tokenizer, prompt = load_tokenizer(metadata), render_chat(metadata, CHAT)
            assert tokenizer.encode_chat(prompt) == LLAMA_CPP[label], label
            assert tokenizer.encode(prompt, add_special=False) == LLAMA_CPP[label], label


def test_merges_that_do_not_fit_the_tokens_cut_as_in_llama_cpp(golden: Any) -> None:
    for label, file, changes, texts in merge_cases(golden.__getitem__):
        tokenizer = load_tokenizer(changed(golden[file], changes))
        ids = [tokenizer.encode(text, add_special=False, parse_special=False) for text in texts]
        assert ids == LLAMA_CPP[label], label


@pytest.mark.parametrize("path", shared_files(*(f"data/reports/{name}.gguf" for name in REPORTED)))
def test_the_reported_files_are_cut_as_in_llama_cpp(path: Path) -> None:
    text, expected = REPORTED[path.stem]
    done = subprocess.run(
        [sys.executable, "-m", "moe_ref", "tokenize", path, "-p", text], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(i) for i in expected]
    assert ("adds another: the model sees two" in done.stderr) == (expected[:2] == [1, 1])
    assert done.stderr.count("\n") <= 1


@pytest.mark.parametrize("path", shared_files("data/reports/gemma4_same_text_twice.gguf"))
def test_a_text_at_two_ids_decodes_from_either_and_encodes_to_the_last(path: Path) -> None:
    with open_gguf(path) as file:
        tokenizer = load_tokenizer(file.metadata)
    assert tokenizer.decode([379]) == tokenizer.decode([380]) == ", "
    assert 380 in tokenizer.encode("a, b") and 379 not in tokenizer.encode("a, b")


def small(model: str, tokens: list[str], kinds: list[int], **keys: Any) -> Any:
    known = {"model": model, "tokens": tokens, "token_type": kinds, "merges": [], "pre": "default"} | keys
    return load_tokenizer({f"tokenizer.ggml.{key}": value for key, value in known.items() if value is not None})


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma4"])
def test_special_texts_at_two_ids_are_read_as_one_token(model: str) -> None:
    tokens, kinds = ["<unk>", "<s>", "</s>", "<x>", "<x>", "a"], [2, 3, 3, 4, 3, 1]
    tokenizer = small(model, tokens, kinds, bos_token_id=1, eos_token_id=2, add_space_prefix=False)
    assert tokenizer.encode("a<x>a", add_special=False) == [5, 4, 5]
    assert tokenizer.decode([3]) == tokenizer.decode([4]) == "<x>"


def test_a_second_eos_is_warned_of_too() -> None:
    tokens = ["<unk>", "<s>", "</s>", "a"]
    tokenizer = small("llama", tokens, [2, 3, 3, 1], add_eos_token=True, add_space_prefix=False)
    with pytest.warns(UserWarning, match="ends with '</s>', and tokenizer.ggml.add_eos_token adds another"):
        assert tokenizer.encode("a</s>") == [1, 3, 2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode("</s>a<s>", add_special=True) == [1, 2, 3, 1, 2]
        assert tokenizer.encode_chat("<s>a</s>") == tokenizer.encode_chat("a") == [1, 3, 2]


def test_a_chat_template_gets_no_bos_that_the_tokenizer_does_not_have() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": list("abcdefghijklm"),
    }
    metadata |= {"tokenizer.chat_template": "{{ bos_token }}|{{ messages[0].content }}"}
    with pytest.warns(UserWarning, match=r"writes bos_token, but the file has none.*tokenizer\.ggml\.bos_token_id"):
        assert render_chat(metadata, CHAT) == "|hi"
    with pytest.raises(TokenizerError, match=r"add_bos_token is true, but there is no"):
        render_chat(metadata | {"tokenizer.ggml.add_bos_token": True}, CHAT)
