"""The tokens of a GGUF file and their roles: which are special, which end a text, which one begins it.

Files say less than engines need, so llama.cpp goes by the text of tokens: it makes control tokens of known end marks,
finds the fill-in-the-middle tokens, and mends the types of a few models. Its rules are followed here, with two
exceptions: a token that llama.cpp would take for bos or eos only because its id is 11 must be a control token, and
where several tokens could be the same fill-in-the-middle token the first of the list is taken (there: any of them).

Source: llama.cpp 0.5.0-dev, `llama_vocab::impl::load` in src/llama-vocab.cpp.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_ref.pretokenizers import FALCON_END_OF_TEXT, GEMMA4, PRETOKENIZERS, SPACE_MARKED

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
SPECIAL = (UNKNOWN, CONTROL, USER_DEFINED)

KEY = "tokenizer.ggml."

END_TEXTS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~["
).split()
MIDDLE_TEXTS = {  # role: tokens that have it when no key says so
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
OLD_ROLES = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}  # the same roles under older keys
ENDING_ROLES = ("fim_pad", "fim_rep", "fim_sep", "eot", "eom", "eos")
SHOWN_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss: part of the answer, never hidden
CALLS = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|call|>"}, {"<|return|>", "<|calls|>"}, {"<|flush|>", "<|calls|>"})


class TokenizerError(ValueError):
    """A tokenizer that cannot be built from this metadata, or a token id that it does not have; names the key or id."""


@dataclass(slots=True)
class Vocabulary:
    """Tokens by id. Two ids may have the same text, as in published files of Gemma 4: both decode to it, and ``ids``
    has the last, to which llama.cpp's table of texts leads too. ``kinds`` are token types after llama.cpp's
    corrections, ``strips`` the side where a token eats the whitespace beside it ("left" or "right")."""

    texts: list[str]
    kinds: list[int]
    ids: dict[str, int]
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    eog_ids: frozenset[int] = frozenset()
    add_bos: bool = False
    add_eos: bool = False
    strips: dict[int, str] = field(default_factory=dict)
    space_prefix: bool = False  # the space before the first word is not of the text


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds where a file has no such key: `bos_token_id`, `eos_token_id`, `add_bos_token`, `add_space_prefix`."""

    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    space_prefix: bool = False
    control_only: bool = True  # bos and eos only if those tokens are of the type control
    always_bos: bool = False  # bos is added even against `add_bos_token`


def defaults_of(metadata: Mapping[str, Any]) -> Defaults:
    """The defaults of the file's kind of tokenizer; none of a kind that is not known here."""
    model, pre = metadata.get(KEY + "model"), str(metadata.get(KEY + "pre") or "default")
    if model == "llama":
        return Defaults(bos_id=1, eos_id=2, add_bos=True, space_prefix=True, control_only=False)
    if model == "gemma4":
        return Defaults(always_bos=GEMMA4.always_bos)
    if model == "gpt2" and pre in SPACE_MARKED:
        return Defaults(FALCON_END_OF_TEXT, FALCON_END_OF_TEXT, always_bos=SPACE_MARKED[pre].always_bos)
    if model == "gpt2" and pre in PRETOKENIZERS:
        return Defaults(PRETOKENIZERS[pre].bos_id, FALCON_END_OF_TEXT, PRETOKENIZERS[pre].add_bos)
    return Defaults()


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of ``metadata``. Raises TokenizerError naming the key."""
    defaults, vocabulary = defaults_of(metadata), _read_tokens(metadata)
    bos_id, eos_id = (_default_id(i, vocabulary, defaults.control_only) for i in (defaults.bos_id, defaults.eos_id))
    vocabulary.bos_id = _special_id(metadata, "bos", vocabulary, bos_id)
    vocabulary.eos_id = _special_id(metadata, "eos", vocabulary, eos_id)
    vocabulary.unk_id = _special_id(metadata, "unknown", vocabulary, None)
    vocabulary.pad_id = _special_id(metadata, "padding", vocabulary, None)
    vocabulary.add_bos = _flag(metadata, "add_bos_token", defaults.add_bos)
    vocabulary.add_eos = _flag(metadata, "add_eos_token", False)
    vocabulary.space_prefix = _flag(metadata, "add_space_prefix", defaults.space_prefix)
    if defaults.always_bos and not vocabulary.add_bos:
        if KEY + "add_bos_token" in metadata:
            warnings.warn(f"{KEY}add_bos_token is false and passed over: Gemma 4 needs its bos", stacklevel=1)
        vocabulary.add_bos = True
    if vocabulary.add_bos:
        _check_is_there(metadata, "bos", vocabulary.bos_id)
    if vocabulary.add_eos:
        _check_is_there(metadata, "eos", vocabulary.eos_id)
    vocabulary.eog_ids = _correct_kinds(metadata, vocabulary)
    vocabulary.strips = _strips(metadata, vocabulary)
    return vocabulary


def array(metadata: Mapping[str, Any], name: str, kind: type, remedy: str = "convert the model again") -> list[Any]:
    """The array ``tokenizer.ggml.<name>`` as a list whose elements are all of ``kind``."""
    value = metadata.get(KEY + name)
    if value is None:
        raise TokenizerError(f"{KEY}{name} is missing; a tokenizer needs an array of {kind.__name__}; {remedy}")
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise TokenizerError(f"{KEY}{name}: {value!r:.40}, expected an array of {kind.__name__}; {remedy}")
    items = value.tolist() if hasattr(value, "tolist") else list(value)
    wrong = next((x for x in items if not isinstance(x, kind) or isinstance(x, bool)), None)
    if wrong is not None:
        raise TokenizerError(f"{KEY}{name}: the element {wrong!r}, expected elements of {kind.__name__}; {remedy}")
    return items


def _read_tokens(metadata: Mapping[str, Any]) -> Vocabulary:
    read = (text.partition("\0")[0] for text in array(metadata, "tokens", str))  # llama.cpp reads C strings
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(read)]
    if not texts:
        raise TokenizerError(f"{KEY}tokens is empty; a tokenizer needs at least one token; convert the model again")
    ids = {text: i for i, text in enumerate(texts)}  # of equal texts the last
    kinds = array(metadata, "token_type", int) if KEY + "token_type" in metadata else [NORMAL] * len(texts)
    if len(kinds) < len(texts):
        raise TokenizerError(f"{KEY}token_type: {len(kinds)} types for {len(texts)} tokens; convert the model again")
    return Vocabulary(texts, kinds[: len(texts)], ids)


def _default_id(token: int | None, vocabulary: Vocabulary, control_only: bool) -> int | None:
    if token is None or token >= len(vocabulary.texts):
        return None
    return token if vocabulary.kinds[token] == CONTROL or not control_only else None


def _special_id(metadata: Mapping[str, Any], role: str, vocabulary: Vocabulary, default: int | None) -> int | None:
    """The id under ``tokenizer.ggml.<role>_token_id``; one outside the vocabulary is warned of and passed over."""
    key = f"{KEY}{role}_token_id"
    if key not in metadata:
        return default
    value = metadata[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TokenizerError(f"{key}: {value!r}, expected a token id; set it with gguf_set_metadata")
    if 0 <= value < len(vocabulary.texts):
        return value
    warnings.warn(f"{key} = {value} is outside the {len(vocabulary.texts)} tokens and passed over", stacklevel=2)
    return default


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(KEY + name, default)
    if not isinstance(value, bool):
        raise TokenizerError(f"{KEY}{name}: {value!r}, expected true or false; set it with gguf_set_metadata")
    return value


def _check_is_there(metadata: Mapping[str, Any], role: str, token: int | None) -> None:
    if token is None:
        name = f"{KEY}add_{role}_token"
        said = "true" if name in metadata else "absent, and true for this tokenizer"
        absent = f"{KEY}{role}_token_id"
        raise TokenizerError(f"{name} is {said}, but there is no {absent}; set either with gguf_new_metadata")


def _correct_kinds(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> frozenset[int]:
    """Correct ``vocabulary.kinds`` in place by the texts of tokens; returns the ids that end a generation."""
    ids, kinds = vocabulary.ids, vocabulary.kinds
    roles = {role: _middle_id(metadata, role, vocabulary) for role in MIDDLE_TEXTS}
    roles |= {role: _special_id(metadata, role, vocabulary, None) for role in ("eot", "eom")}
    ends = {ids[text] for text in END_TEXTS if text in ids}
    for i in ends:
        kinds[i] = CONTROL
    for text in SHOWN_TEXTS:
        if text in ids:
            kinds[ids[text]] = USER_DEFINED
    roles["eos"] = vocabulary.eos_id
    ends |= {end for role in ENDING_ROLES if (end := roles[role]) is not None}
    texts = {vocabulary.texts[i] for i in ends}
    if "<|end|>" in texts and any(pair <= texts for pair in CALLS):  # ends a message of many, not the answer
        _not_an_end("<|end|>", USER_DEFINED, vocabulary, ends)
    if "</s>" in texts and "<|tool_response>" in texts:
        _not_an_end("</s>", NORMAL, vocabulary, ends)
    return frozenset(ends)


def _middle_id(metadata: Mapping[str, Any], role: str, vocabulary: Vocabulary) -> int | None:
    """A fill-in-the-middle token: by its key, its older key, or its text, which makes it a control token."""
    for name in (OLD_ROLES.get(role, role), role):
        if (found := _special_id(metadata, name, vocabulary, None)) is not None:
            return found
    by_text = next((vocabulary.ids[t] for t in MIDDLE_TEXTS[role].split() if t in vocabulary.ids), None)
    if by_text is not None:
        vocabulary.kinds[by_text] = CONTROL
    return by_text


def _not_an_end(text: str, kind: int, vocabulary: Vocabulary, ends: set[int]) -> None:
    ends.discard(vocabulary.ids[text])
    vocabulary.kinds[vocabulary.ids[text]] = kind


def _strips(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[int, str]:
    """Tokens that eat whitespace beside them: nothing in a file says so, llama.cpp goes by names."""
    pre, name = str(metadata.get(KEY + "pre", "")), str(metadata.get("general.name", "")).lower()
    if any(known in pre for known in ("jina-v2-de", "jina-v2-es", "jina-v2-code")):
        sides = {"<mask>": "left"}
    elif "phi-3" in name or "phi3" in name:
        special = [t for t, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True) if kind in SPECIAL]
        sides = dict.fromkeys({*special, "</s>"} - {"<unk>", "<s>", "<|endoftext|>"}, "right")
    else:
        sides = {"[MASK]": "left"} if "modern-bert" in name else {}
    return {vocabulary.ids[text]: side for text, side in sides.items() if text in vocabulary.ids}
