"""Text to token ids and back, by the tokenizer that a GGUF file carries; ids equal those of llama.cpp.

A text is cut at special tokens first. What is between goes to one of two engines:

* Byte-level BPE, `tokenizer.ggml.model` "gpt2": cut by the patterns of a pre-tokenizer (pretokenizers.py), and into
  bytes, which merges then join in the order of their rank; done by the `tokenizers` library.
* BPE on characters, with ▁ for a space, "llama" and "gemma4": spm.py.
"""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from string import whitespace
from typing import Any, Protocol

from moe_ref.pretokenizers import (
    GEMMA4,
    NOT_BYTE_LEVEL,
    PRETOKENIZERS,
    SPACE_MARKED,
    PreTokenizer,
    SpaceMarked,
)
from moe_ref.spm import ListedBPE, ScoredBPE, merge
from moe_ref.vocabulary import (
    BYTE,
    CONTROL,
    KEY,
    NORMAL,
    SPECIAL,
    UNKNOWN,
    USER_DEFINED,
    TokenizerError,
    Vocabulary,
    array,
    read_vocabulary,
)

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerError", "load_tokenizer"]

HIDDEN = (UNKNOWN, CONTROL)


class Engine(Protocol):
    """What differs between kinds of tokenizer: the way of text without special tokens, and what normal tokens say."""

    def encode(self, text: str) -> list[int]: ...

    def bytes_of(self, text: str) -> bytes: ...


class Tokenizer:
    """Encodes and decodes; made by :func:`load_tokenizer`. ``eog_ids`` are the tokens that end a generation."""

    def __init__(self, vocabulary: Vocabulary, engine: Engine):
        self._vocabulary, self._engine = vocabulary, engine
        self.vocab_size = len(vocabulary.texts)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.eog_ids = vocabulary.eog_ids
        special = {vocabulary.texts[i]: i for i, kind in enumerate(vocabulary.kinds) if kind in SPECIAL}
        self._special = sorted(special.values(), key=lambda i: -len(vocabulary.texts[i].encode()))  # longest first

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of ``text``. Lone surrogates become U+FFFD, as invalid bytes do in llama.cpp.

        ``add_special`` puts bos before and eos behind where the file asks for them; ``parse_special`` reads the text of
        control tokens as those tokens (user-defined tokens always are). Raises TokenizerError for a text that the
        regular expressions give up on: a run of more than ten million characters of one kind.
        """
        ids: list[int] = []
        for fragment in self._fragments(well_formed(text), parse_special):
            ids += [fragment] if isinstance(fragment, int) else self._engine.encode(fragment)
        return self._completed(ids) if add_special else ids

    def encode_chat(self, prompt: str) -> list[int]:
        """Ids of a prompt that a chat template has written: with bos before it and eos behind it where the file asks
        for them, and not once more where the template has put them there too."""
        if self._vocabulary.add_bos and self.bos_id is not None:
            prompt = prompt.removeprefix(self.decode([self.bos_id], continues=True))
        if self._vocabulary.add_eos and self.eos_id is not None:
            prompt = prompt.removesuffix(self.decode([self.eos_id], continues=True))
        return self.encode(prompt)

    def _completed(self, ids: list[int]) -> list[int]:
        """``ids`` between bos and eos, where the file asks for them; a text that has its own is warned of."""
        if self._vocabulary.add_bos and self.bos_id is not None:
            if ids[:1] == [self.bos_id]:
                _warn_twice("begins", "bos", self.decode([self.bos_id], continues=True))
            ids = [self.bos_id, *ids]
        if self._vocabulary.add_eos and self.eos_id is not None:
            if ids[-1:] == [self.eos_id]:
                _warn_twice("ends", "eos", self.decode([self.eos_id], continues=True))
            ids = [*ids, self.eos_id]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False, continues: bool = False) -> str:
        """The text of ``ids``: their bytes joined, then decoded, invalid UTF-8 as U+FFFD.

        Where the file puts a space before a text (Llama 2, Mixtral), one that ``ids`` begin with is left out, unless
        they continue something. As in llama.cpp, none is left out after a special token.
        """
        said = [self._bytes([i], skip_special) for i in ids]
        if said and self._vocabulary.space_prefix and not continues:
            said[0] = said[0].removeprefix(b" ")
        return b"".join(said).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """What one token says: any bytes, often not whole characters. Raises TokenizerError for an unknown id."""
        if not 0 <= id < self.vocab_size:
            found = f"token id {id} is not in the vocabulary, ids are 0 to {self.vocab_size - 1}"
            raise TokenizerError(f"{found}; rows of the output head beyond it are padding: leave them out")
        text, kind = self._vocabulary.texts[id], self._vocabulary.kinds[id]
        if kind in SPECIAL:
            return text.encode()
        if kind == BYTE:
            return _named_byte(text)
        return self._engine.bytes_of(text) if kind == NORMAL else b""

    def is_hidden(self, id: int) -> bool:
        """Whether ``skip_special`` leaves this token out: control tokens and the unknown token."""
        return 0 <= id < self.vocab_size and self._vocabulary.kinds[id] in HIDDEN

    def _bytes(self, ids: Iterable[int], skip_special: bool) -> bytes:
        return b"".join(self.token_bytes(i) for i in ids if not (skip_special and self.is_hidden(i)))

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut ``text`` at special tokens, the longest token first wherever it is, then the next."""
        texts, kinds = self._vocabulary.texts, self._vocabulary.kinds
        fragments: list[str | int] = [text] if text else []
        has = cache(text.__contains__)  # of thousands of special tokens most begin alike
        for i in self._special:
            if has(texts[i][:5]) and texts[i] in text and (parse_special or kinds[i] == USER_DEFINED):
                cut = partial(_cut, token=texts[i], id=i, side=self._vocabulary.strips.get(i))
                fragments = [part for f in fragments for part in (cut(f) if isinstance(f, str) else [f])]
        return fragments


class StreamDecoder:
    """Text as its tokens come, to follow a prompt: whole characters only, an unfinished one is held back."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """What can be said after this token; pieces and flush join to ``decode`` of all ids with ``continues``."""
        return self._decoder.decode(self._tokenizer._bytes([id], self._skip_special))

    def flush(self) -> str:
        """The end: an unfinished character as U+FFFD. The decoder can be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def load_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata.

    Raises TokenizerError naming the key that is missing, malformed or asks for something unsupported. A file without
    ``tokenizer.ggml.pre`` is read as "default" with a warning, as llama.cpp does.
    """
    model = metadata.get(KEY + "model")
    if isinstance(model, str) and model in MODELS:
        return MODELS[model](metadata)
    found = f"{KEY}model is missing" if model is None else f"{KEY}model {model!r} is not supported"
    if model in NO_VOCABULARY:
        found = f"{KEY}model is {model!r}: the file says that it has no tokens"
    raise TokenizerError(f"{found}; supported: {', '.join(MODELS)}; convert a model that has one")


def _warn_twice(where: str, role: str, token: str) -> None:
    found = f"the text {where} with {token!r}, and {KEY}add_{role}_token adds another: the model sees two"
    warnings.warn(f"{found}; leave it out of the text", stacklevel=4)


def well_formed(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace")
    return text


def _cut(text: str, token: str, id: int, side: str | None) -> list[str | int]:
    """``text`` cut at every ``token``, which is replaced by its id; nothing empty is left."""
    if side == "right":  # what is eaten is no token any more, were it one
        parts = re.split(f"{re.escape(token)}[{whitespace}]*", text)
    else:
        parts = text.split(token)
    if side == "left":
        parts[:-1] = [part.rstrip(whitespace) for part in parts[:-1]]
    return [piece for part in parts for piece in (id, part) if piece != ""][1:]


def _named_byte(text: str) -> bytes:
    try:
        return bytes([int(text.removeprefix("<0x").removesuffix(">"), 16)])
    except ValueError as error:
        raise TokenizerError(f"{KEY}tokens: the byte token {text!r} is not of the form <0x0A>") from error


# ---- byte-level BPE: every byte has a printable character, and tokens are strings of those characters


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes (GPT-2): printable Latin-1 itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    beyond = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(beyond)) for byte in range(256)]


BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
NO_TOKEN = "\0no token\0"  # stands where a byte has no token; left out of the ids, as in llama.cpp


class ByteLevelBPE:
    """Text without special tokens -> ids, by the `tokenizers` library.

    As in llama.cpp, merges and tokens need not agree: what merges make and is no token is spelled, a token for each of
    its characters that is ASCII; the others are left out. The library wants a token for all that its merges name, so
    those missing get ids beyond the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary, merges: list[tuple[str, str]], row: PreTokenizer):
        library = _tokenizers_library()
        self._ids, self._size = vocabulary.ids, len(vocabulary.texts)
        named = dict.fromkeys(text for left, right in merges for text in (left, right, left + right))
        self._missing = [NO_TOKEN, *(text for text in named if text not in self._ids)]
        self._ranks = {f"{left} {right}": i for i, (left, right) in enumerate(merges)} if self._missing[1:] else {}
        self._complete = not self._ranks and all(character in self._ids for character in BYTE_OF)
        ids = self._ids | {text: self._size + i for i, text in enumerate(self._missing)}
        model = library.models.BPE(ids, merges, unk_token=NO_TOKEN, ignore_merges=row.ignore_merges)
        self._library = library.Tokenizer(model)
        self._library.pre_tokenizer = _pre_tokenizer(library, row)

    def encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            found = f"a text of {len(text)} characters is too much for one call ({error})"
            raise TokenizerError(f"{found}; a run of one kind of character may have ten million; cut it") from error
        return (
            ids if self._complete else [known for i in ids for known in ([i] if i < self._size else self._spelled(i))]
        )

    def _spelled(self, id: int) -> list[int]:
        """The tokens of a text that is no token: of its symbols once merged, or of the characters of each."""
        text = self._missing[id - self._size]
        if text == NO_TOKEN:
            return []
        symbols = merge(list(text), self._ranks, " ")  # the library takes a whole piece without merging (ignore_merges)
        parts = [
            part for symbol in symbols for part in ([symbol] if symbol in self._ids else filter(str.isascii, symbol))
        ]
        return [self._ids[part] for part in parts if part in self._ids]

    def bytes_of(self, text: str) -> bytes:
        return b"".join(bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode() for c in text)


def _load_gpt2(metadata: Mapping[str, Any]) -> Tokenizer:
    name = metadata.get(KEY + "pre")
    if isinstance(name, str) and name in SPACE_MARKED:
        return _load_listed(metadata, SPACE_MARKED[name])
    row, vocabulary = _pre_tokenizer_row(name), read_vocabulary(metadata)
    return Tokenizer(vocabulary, ByteLevelBPE(vocabulary, _read_merges(metadata), row))


def _pre_tokenizer_row(name: Any) -> PreTokenizer:
    if name is None or name == "":
        warnings.warn(f"{KEY}pre is missing; 'default' is used, ids may differ from the model's own", stacklevel=2)
        name = "default"
    if isinstance(name, str) and name in PRETOKENIZERS:
        return PRETOKENIZERS[name]
    known = ", ".join(sorted([*PRETOKENIZERS, *SPACE_MARKED]))
    why = "has tokens that are not bytes" if name in NOT_BYTE_LEVEL else "is not known"
    raise TokenizerError(f"{KEY}pre {name!r} {why}; supported: {known}; correct it with gguf_new_metadata")


def _read_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in the order of their rank; of equal pairs the first counts. What is no pair never applies."""
    texts = array(metadata, "merges", str, "convert the model again with its merges.txt")
    pairs = ((text[:i], text[i + 1 :]) for text in texts if (i := text.find(" ", 1)) > 0)
    return list(dict.fromkeys((left, right) for left, right in pairs if right))


def _pre_tokenizer(library: Any, row: PreTokenizer) -> Any:
    kinds = library.pre_tokenizers
    cuts = [kinds.Split(library.Regex(pattern), "isolated") for pattern in row.patterns]
    return kinds.Sequence([*cuts, kinds.ByteLevel(add_prefix_space=False, use_regex=False)])


def _tokenizers_library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError("reading text needs the tokenizers library; pip install 'tokenizers>=0.20'") from error
    return tokenizers


# ---- BPE on characters


def _load_scored(metadata: Mapping[str, Any]) -> Tokenizer:
    vocabulary = read_vocabulary(metadata)
    return Tokenizer(vocabulary, ScoredBPE(metadata, vocabulary))


def _load_listed(metadata: Mapping[str, Any], row: SpaceMarked = GEMMA4) -> Tokenizer:
    vocabulary = read_vocabulary(metadata)
    return Tokenizer(vocabulary, ListedBPE(metadata, vocabulary, row.whole_newlines))


MODELS: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {  # tokenizer.ggml.model
    "gpt2": _load_gpt2,
    "llama": _load_scored,
    "gemma4": _load_listed,
}
NO_VOCABULARY = ("none", "no_vocab")
