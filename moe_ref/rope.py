"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): position as a rotation of pairs.

Beyond the context a model was trained on, the rotation is slowed down: all pairs alike (linear), each pair by a divisor
of the file (rope_freqs, longrope), or the slow pairs only (YaRN, Peng et al. 2023, arXiv 2309.00071).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Tables = tuple[np.ndarray, np.ndarray]  # cosines and sines [T, n_rot/2]


@dataclass(frozen=True, slots=True)
class Rope:
    """How the heads of a layer are rotated; the numbers are those of the GGUF keys ``rope.*``."""

    style: str  # "neox": pairs (i, i + n_rot/2); "norm": pairs (2i, 2i + 1)
    n_rot: int  # features of a head that take part
    freq_base: float
    factor: float = 1.0  # how much longer the context is than it was in training
    yarn: bool = False
    attn_factor: float = 1.0  # the rotation scales by this too; with YaRN, also by 1 + 0.1 ln(factor)
    original_context_length: int = 0
    beta_fast: float = 32.0  # pairs that turn more often than this over the original context keep their speed
    beta_slow: float = 1.0  # pairs that turn less often than this are slowed down in full
    text_pairs: tuple[bool, ...] = ()  # pairs that turn with the text position; () is all

    @property
    def stretch(self) -> float:
        """1 + 0.1 ln(factor): YaRN's correction of attention's temperature."""
        return 1.0 + 0.1 * math.log(self.factor)

    @property
    def magnitude(self) -> float:
        """What the rotation multiplies lengths by."""
        return self.attn_factor * (self.stretch if self.yarn else 1.0)


def _yarn_edge(rope: Rope, turns: float) -> float:
    """The (fractional) pair that makes ``turns`` turns over the original context."""
    return rope.n_rot * math.log(rope.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(rope.freq_base))


def _kept_speed(rope: Rope) -> np.ndarray:
    """Share [n_rot/2] of each pair's own speed that YaRN keeps: 1 for fast pairs, 0 for slow, a ramp between."""
    low = max(0, math.floor(_yarn_edge(rope, rope.beta_fast)))
    high = min(rope.n_rot - 1, math.ceil(_yarn_edge(rope, rope.beta_slow)))
    ramp = (np.arange(rope.n_rot // 2) - low) / max(0.001, high - low)
    return 1 - np.clip(ramp, 0, 1)


def scaled_tables(positions: np.ndarray, rope: Rope, divisors: np.ndarray | float = 1.0, dtype=np.float32) -> Tables:
    """Cosines and sines, times ``magnitude``; positions [T], divisors of the frequencies [n_rot/2]."""
    frequency = rope.freq_base ** (-2.0 * np.arange(rope.n_rot // 2) / rope.n_rot) / divisors
    kept = _kept_speed(rope) if rope.yarn else 0.0
    frequency = frequency * ((1 - kept) / rope.factor + kept)
    if rope.text_pairs:
        frequency = np.where(rope.text_pairs, frequency, 0.0)  # these follow a picture's position: 0 in a text
    angle = positions[:, None].astype(np.float64) * frequency  # [T, n_rot/2]
    return (np.cos(angle) * rope.magnitude).astype(dtype), (np.sin(angle) * rope.magnitude).astype(dtype)


def rope_tables(positions: np.ndarray, n_rot: int, freq_base: float, dtype=np.float32) -> Tables:
    """Cosines and sines of ``position * freq_base**(-2i/n_rot)``; positions [T] -> two arrays [T, n_rot/2]."""
    return scaled_tables(positions, Rope("neox", n_rot, float(freq_base)), dtype=dtype)


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str) -> np.ndarray:
    """Rotate the first ``n_rot`` features of each head; x [T, H, K], cos and sin [T, n_rot/2].

    ``style`` says which features form a pair: "neox" (i, i + n_rot/2), "norm" (2i, 2i + 1).
    Features beyond ``n_rot`` pass through.
    """
    half = cos.shape[1]
    cos, sin = cos[:, None, :], sin[:, None, :]  # the same rotation for every head
    out = x.copy()
    first = slice(0, half) if style == "neox" else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if style == "neox" else slice(1, 2 * half, 2)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out
