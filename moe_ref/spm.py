"""Tokenizers whose tokens are plain text with ▁ for a space: SentencePiece's kind of BPE, as llama.cpp computes it.

Text becomes single characters, then neighbours are joined, the best pair of the whole text first and of equal ones the
leftmost, until no pair can be. Two kinds of file differ in what a pair is worth:

* `tokenizer.ggml.model` "llama": the score of the token that the two make (Llama 2, Mixtral, Gemma 1 to 3).
* "gemma4", and a few `tokenizer.ggml.pre` of "gpt2": the place of the pair in a list of merges.

What is no token in the end is spelled in byte tokens, <0x0A>. Keys of SentencePiece that llama.cpp ignores here are
ignored too: remove_extra_whitespaces, precompiled_charsmap, unknown_token_id.

This is not left to the `tokenizers` library. It orders pairs by a list, which cannot hold tokens of equal score (259
in Llama 2, 650 in Baichuan); it spells bytes before it merges, not after; and it has no rule for runs of newlines.

Source: llama.cpp 0.5.0-dev, src/llama-vocab.cpp, `llm_tokenizer_spm_session` and `llm_tokenizer_bpe_session`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np

from moe_ref.vocabulary import KEY, TokenizerError, Vocabulary, array

SPACE = "▁"  # U+2581, a space in the text of a token
CACHED_WORD, CACHED_WORDS = 32, 1 << 15  # words that are remembered: how long, how many
INDEX_BITS = 32  # of a number that is rank and index


def merge(symbols: list[str], ranks: Mapping[str, int], joint: str) -> list[str]:
    """``symbols`` with neighbours joined, the pair of the lowest rank first, of equal ones the leftmost.

    The rank of a pair is that of ``left + joint + right``; a pair that has none is never joined.
    """
    end, symbols = len(symbols), symbols.copy()
    worth = [ranks.get(left + joint + right, -1) for left, right in pairwise(symbols)]  # of i and what follows
    queue = [rank << INDEX_BITS | i for i, rank in enumerate(worth) if rank >= 0]
    heapify(queue)
    before, behind = list(range(-1, end)), list(range(1, end + 1))
    worth.append(-1)
    while queue:
        top = heappop(queue)
        left = top & (1 << INDEX_BITS) - 1
        if worth[left] != top >> INDEX_BITS:
            continue  # one of the two has become part of something else
        right = behind[left]
        symbols[left] += symbols[right]
        symbols[right], worth[right] = "", -1
        behind[left] = behind[right]
        before[behind[right]] = left
        for i in (before[left], left):
            if i >= 0:
                follows = behind[i]
                worth[i] = ranks.get(symbols[i] + joint + symbols[follows], -1) if follows < end else -1
                if worth[i] >= 0:
                    heappush(queue, worth[i] << INDEX_BITS | i)
    return [symbol for symbol in symbols if symbol]


class SpaceMarkedBPE:
    """Text without special tokens -> ids.

    ``joins`` are the characters that some merge joins to a ▁ behind them. Before any other ▁ the text is cut: no merge
    crosses that place, so words can be merged alone, and remembered.
    """

    def __init__(self, ids: dict[str, int], ranks: dict[str, int], joint: str, joins: set[str]):
        self._ids, self._ranks, self._joint = ids, ranks, joint
        self._bytes = [ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._cuts = re.compile(_not_behind(joins) + f"(?={SPACE})")
        self._remembered = lru_cache(CACHED_WORDS)(self._word)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._cuts.split(text.replace(" ", SPACE)):
            ids += self._remembered(word) if len(word) <= CACHED_WORD else self._word(word)
        return ids

    def bytes_of(self, text: str) -> bytes:
        return text.replace(SPACE, " ").encode()

    def _word(self, word: str) -> list[int]:
        ids: list[int] = []
        for symbol in merge(list(word), self._ranks, self._joint):
            known = self._ids.get(symbol)
            ids += self._spelled(symbol) if known is None else [known]
        return ids

    def _spelled(self, symbol: str) -> list[int]:
        """The byte tokens of ``symbol``; a byte that has none is left out."""
        return [found for byte in symbol.encode() if (found := self._bytes[byte]) is not None]


class ScoredBPE(SpaceMarkedBPE):
    """`tokenizer.ggml.model` "llama": two neighbours are joined if together they are a token, the best score first."""

    def __init__(self, metadata: Mapping[str, Any], vocabulary: Vocabulary):
        texts = vocabulary.texts
        inside = {before for text in texts if SPACE in text[1:] for before, c in pairwise(text) if c == SPACE}
        super().__init__(vocabulary.ids, dict(zip(texts, _score_ranks(metadata, len(texts)), strict=True)), "", inside)
        self._prefix = SPACE if vocabulary.space_prefix else ""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` from its start or from a special token on: a space is put before it where the file asks."""
        return super().encode(self._prefix + text)

    def _spelled(self, symbol: str) -> list[int]:
        missing = next((byte for byte in symbol.encode() if self._bytes[byte] is None), None)
        if missing is not None:
            found = f"there is no <0x{missing:02X}>, which {symbol!r} is spelled with"
            raise TokenizerError(f"{KEY}tokens: {found}; leave it out, or convert the model again with its byte tokens")
        return super()._spelled(symbol)


class ListedBPE(SpaceMarkedBPE):
    """Two neighbours are joined if they are in the list of merges, the first of the list first; never over newlines.

    ``whole_newlines``: a run of newlines that is a token is that token, whatever the merges say.
    """

    def __init__(self, metadata: Mapping[str, Any], vocabulary: Vocabulary, whole_newlines: bool):
        merges = [text for text in array(metadata, "merges", str) if " " in text[1:]]  # the others are no pairs
        ranks = dict(zip(reversed(merges), range(len(merges) - 1, -1, -1), strict=True))  # of equal merges the first
        joins = {text[text.index(" ", 1) - 1] for text in merges if f" {SPACE}" in text[1:]}
        super().__init__(vocabulary.ids, ranks, " ", joins)
        self._cuts = re.compile(rf"{self._cuts.pattern}|(?<=\n)(?!\n)|(?<!\n)(?=\n)")
        runs = {text for text in vocabulary.ids if not text.strip("\n")} if whole_newlines else ()
        self._whole = frozenset(runs)

    def _word(self, word: str) -> list[int]:
        return [self._ids[word]] if word in self._whole else super()._word(word)


def _not_behind(characters: set[str]) -> str:
    """A pattern that holds where none of ``characters`` is before."""
    return f"(?<![{''.join(map(re.escape, sorted(characters)))}])" if characters else ""


def _score_ranks(metadata: Mapping[str, Any], n_tokens: int) -> list[int]:
    """A rank for each token: 0 for the best score, the same for equal ones. Without scores all are equal."""
    scores = np.zeros(n_tokens, np.float32)
    if KEY + "scores" in metadata:
        scores = np.asarray(array(metadata, "scores", Real), np.float32)
    if len(scores) < n_tokens or np.isnan(scores).any():
        found = "a score is not a number" if np.isnan(scores).any() else f"{len(scores)} scores for {n_tokens} tokens"
        raise TokenizerError(f"{KEY}scores: {found}; convert the model again")
    ranks: list[int] = np.unique(-scores[:n_tokens], return_inverse=True)[1].tolist()
    return ranks
