"""Perplexity: the exponential of the mean surprise at each next token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moe_ref.console import print_json
from moe_ref.finite import NonFiniteError


def chunk(tokens: Sequence[int], size: int, most: int | None = None) -> np.ndarray:
    """Cut tokens into whole chunks [n, size], n <= ``most``; a shorter rest is dropped.

    Raises ValueError if there is no whole chunk or none is wanted.
    """
    if most is not None and most < 1:
        raise ValueError(f"--chunks {most}: score at least one")
    if size < 2:
        raise ValueError(f"-c {size}: a chunk needs at least 2 tokens, since its first is not scored")
    count = len(tokens) // size
    if not count:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one chunk of {size}; use a smaller -c")
    return np.asarray(tokens[: count * size], dtype=np.int64).reshape(count, size)[:most]


def chunk_loss(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """-log p of tokens 1..T-1 given those before, in nats; logits [T, vocab], tokens [T] -> [T-1]."""
    scores = logits[:-1].astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(scores).sum(axis=-1))
    return log_sum - np.take_along_axis(scores, tokens[1:, None], axis=-1)[:, 0]


def perplexity(logits: Callable[[np.ndarray], np.ndarray], chunks: Iterable[np.ndarray]) -> dict[str, float]:
    """Score chunks, each a fresh context; returns mean ``nll`` in nats, ``ppl`` = exp(nll), scored ``tokens``.

    ``logits`` maps token ids [T] to logits [T, vocab]. Raises NonFiniteError where the result is NaN or infinite.
    """
    losses = [chunk_loss(logits(tokens), tokens) for tokens in chunks]
    scored = np.concatenate(losses)
    nll = float(scored.mean())
    with np.errstate(over="ignore"):
        ppl = float(np.exp(nll))
    if not np.isfinite(ppl):
        raise NonFiniteError(f"perplexity {ppl}, from a mean surprise of {nll} nats: the logits are not usable")
    return {"nll": nll, "ppl": ppl, "tokens": len(scored)}


def report(result: dict[str, float], as_json: bool) -> None:
    """Print a perplexity."""
    if as_json:
        print_json(result)
    else:
        print(f"perplexity {result['ppl']:.4f} = exp({result['nll']:.5f} nats) over {result['tokens']} tokens")
