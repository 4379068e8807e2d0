"""Choosing the next token from logits: top-k, top-p, min-p, temperature, in llama.cpp's order.

Source: llama.cpp 0.5.0-dev, src/llama-sampler.cpp; the filters are its own, the random numbers are NumPy's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

HOTTEST = 1e308  # a whole number may be too large for a float


class SamplingError(ValueError):
    """A sampling parameter out of its range, or logits that no token can be chosen from."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Parameters as llama.cpp spells them, and a random generator of its own. Raises SamplingError for a wrong one.

    ``temp`` <= 0 takes the largest logit; ``top_k`` <= 0, ``top_p`` 1 and ``min_p`` 0 switch a filter off; ``seed`` -1
    is a different sequence every time, any other the same one.
    """

    temp: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = -1
    _generator: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(_is_number(self.temp) and abs(self.temp) < HOTTEST, "temp", self.temp, "a finite number; <= 0 is greedy")
        _check(_is_number(self.top_k, integer=True), "top_k", self.top_k, "an integer; 0 or less is off")
        _check(_is_number(self.top_p) and 0 <= self.top_p <= 1, "top_p", self.top_p, "0 to 1 (off)")
        _check(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "0 (off) to 1")
        _check(_is_number(self.seed, integer=True) and self.seed >= -1, "seed", self.seed, "-1 (random) or more")
        object.__setattr__(self, "_generator", np.random.default_rng(None if self.seed == -1 else self.seed))

    def sample(self, logits: np.ndarray) -> int:
        """One token id from logits [vocab]; equal logits go to the lowest id when greedy."""
        ids, probabilities = self.distribution(logits)
        if len(ids) == 1:
            return int(ids[0])
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        return int(ids[min(drawn, len(ids) - 1)])

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What :meth:`sample` draws from: ids [n] by falling logit, equal ones by id, and probabilities float64 [n]."""
        scores = _finite(logits)
        if self.temp <= 0:
            return np.array([np.argmax(scores)]), np.ones(1)
        ids = _largest(scores, self.top_k if self.top_k > 0 else len(scores))  # [vocab] -> [n]; below, only fewer
        if self.top_p < 1:
            cumulative = np.cumsum(softmax(scores[ids]))
            ids = ids[: 1 + np.count_nonzero(cumulative[:-1] < self.top_p)]  # up to and with the one that reaches it
        if self.min_p > 0:
            ids = ids[scores[ids] >= scores[ids[0]] + np.log(self.min_p)]
        return ids, softmax(scores[ids], self.temp)


def softmax(scores: np.ndarray, temp: float = 1.0) -> np.ndarray:
    """exp(scores / temp) over its sum, without overflow. [n] -> [n]"""
    with np.errstate(over="ignore"):  # a difference too large for the temperature is -inf, which is right
        weights = np.exp((scores - scores.max()) / temp)
    return weights / weights.sum()


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest scores, best first, equal ones by id; those at -inf are left out. [vocab] -> [<= k]"""
    k = min(k, len(scores))
    bar = np.partition(scores, len(scores) - k)[len(scores) - k]
    ids = np.flatnonzero((scores >= bar) & (scores > -np.inf))
    return ids[np.argsort(-scores[ids], kind="stable")][:k]


def _finite(logits: np.ndarray) -> np.ndarray:
    """Logits as float64 [vocab]; -inf bans a token. Raises SamplingError if they are not something to choose from."""
    scores = np.asarray(logits, dtype=np.float64)
    if scores.ndim != 1 or not scores.size:
        raise SamplingError(f"logits of shape {scores.shape}, expected [vocab]; pass one position, logits[-1]")
    if np.isfinite(scores.sum()):  # then all of them are; one look at each, and no more, for every token
        return scores
    wrong = np.flatnonzero(np.isnan(scores) | (scores == np.inf))
    if wrong.size:
        found = f"{wrong.size} of {scores.size} logits are NaN or infinite, the first is {scores[wrong[0]]}"
        raise SamplingError(f"{found} at id {wrong[0]}; the forward pass overflowed or the file is damaged")
    if scores.max() == -np.inf:
        raise SamplingError(f"all {scores.size} logits are -inf: no token is allowed; expected at least one finite")
    return scores


def _is_number(value: object, integer: bool = False) -> bool:
    kinds = int | np.integer if integer else int | float | np.number
    return isinstance(value, kinds) and not isinstance(value, bool)


def _check(fine: bool | np.bool_, name: str, found: object, accepted: str) -> None:
    if not fine:
        raise SamplingError(f"{name} is {found!r}, expected {accepted}")
