"""How a text was made and why it ended: seed, sampler chain and finish reason, for people and for --json."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_ref.command import RequestError
from moe_ref.console import progress
from moe_ref.sampling import Sampler, SamplingError

if TYPE_CHECKING:
    from moe_ref.model import Model
    from moe_ref.tokenizer import Tokenizer


def sampler_of(args: argparse.Namespace) -> Sampler:
    """The sampler that the flags of ``add_sampling`` describe. Raises RequestError, which names the flag.

    For -s -1 a seed is drawn here, so that it can be shown and used again.
    """
    seed = secrets.randbelow(2**32 - 1) if args.seed == -1 else args.seed  # llama.cpp's range; 2**32 - 1 is its -1
    try:
        return Sampler(args.temp, args.top_k, args.top_p, args.min_p, seed)
    except SamplingError as error:
        raise RequestError(f"--{str(error).replace('_', '-', 1)}") from error


def chain(sampler: Sampler) -> str:
    """The filters that are on, in the order in which they run, by llama.cpp's names."""
    if sampler.temp <= 0:
        return "greedy"
    filters = [
        (f"top-k {sampler.top_k}", sampler.top_k > 0),
        (f"top-p {sampler.top_p:g}", sampler.top_p < 1),
        (f"min-p {sampler.min_p:g}", sampler.min_p > 0),
    ]
    return " -> ".join([*(text for text, is_on in filters if is_on), f"temp {sampler.temp:g}", "dist"])


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated text. ``asked`` is -n, ``capacity`` the tokens that the context holds."""

    sampler: Sampler
    n_prompt: int
    tokens: Sequence[int]
    asked: int
    capacity: int

    @property
    def is_truncated(self) -> bool:
        """Whether the context was full: all tokens but the last are in it."""
        return len(self.tokens) != self.asked and self.n_prompt + len(self.tokens) > self.capacity

    @property
    def finish_reason(self) -> str:
        """OpenAI's words: ``stop`` at an end-of-generation token, otherwise ``length``."""
        return "length" if self.is_truncated or len(self.tokens) == self.asked else "stop"

    def why_it_ended(self) -> str:
        """The finish reason as a person reads it."""
        if self.is_truncated:
            return "length: the context is full (-c)"
        return "length: as many tokens as -n asks for" if self.finish_reason == "length" else "stop token"

    def rows(self) -> list[tuple[str, str]]:
        """What statistics show of it."""
        seed = f", seed {self.sampler.seed}" if self.sampler.temp > 0 else ""
        return [("sampler", chain(self.sampler) + seed), ("finish reason", self.why_it_ended())]

    def record(self, text: str) -> dict[str, Any]:
        """The same for --json. ``truncated`` is llama.cpp's word for a context that was full."""
        return {
            "n_prompt": self.n_prompt,
            "n_gen": len(self.tokens),
            "text": text,
            "tokens": [int(token) for token in self.tokens],
            "finish_reason": self.finish_reason,
            "truncated": self.is_truncated,
            "seed": self.sampler.seed,
            "sampler": chain(self.sampler),
        }


def rows_text(rows: Sequence[tuple[str, str]], width: int = 0) -> str:
    """Names, in a column of at least ``width``, and what they are, a line each."""
    width = max(width, *(len(name) for name, _ in rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def print_text(tokenizer: Tokenizer, prompt: str, tokens: Iterable[int]) -> list[int]:
    """Print the prompt once it has been read, as progress is shown until then, and what follows; its tokens."""
    from moe_ref.tokenizer import StreamDecoder

    decoder = StreamDecoder(tokenizer)
    made: list[int] = []
    for token in tokens:
        print("" if made else prompt, end=decoder.push(token), flush=True)
        made.append(token)
    print("" if made else prompt, end=decoder.flush() + "\n", flush=True)
    return made


@contextmanager
def layers_shown(model: Model) -> Iterator[None]:
    """Show how far the next pass of the reference is."""
    before = model.observe
    with progress("prompt", len(model.config.layers)) as done:

        def observe(name: str, array: np.ndarray) -> None:
            before(name, array)
            if name.startswith("l_out"):
                done(1)

        model.observe = observe
        try:
            yield
        finally:
            model.observe = before


def shown_logits(model: Model, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Logits [T, vocab] of ``tokens`` [T], showing how far they are."""
    with layers_shown(model):
        return model.logits(tokens)
