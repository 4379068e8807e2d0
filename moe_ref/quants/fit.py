"""Scales that fit: which step, and which minimum, lets small integers come closest to a run of weights.

The step that maps a run's extremes onto the ends of the codes is rarely the best one. As in ggml, a handful of
steps around it are tried; each gives codes, the codes give the best step by least squares, and the fit that
explains most is kept. An error on a large weight costs more: squares are weighted.
The runs lie in columns, so that one NumPy operation works on all of them: x [run, m] of m runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from moe_ref.quants.blocks import inverse

SMALLEST = 1e-15  # runs within this of zero get no scale: half precision has no number for it


def columns(x: np.ndarray, run: int) -> np.ndarray:
    """float32 [n, elements] -> [run, n * elements / run]."""
    return np.ascontiguousarray(x.reshape(-1, run).T)


def largest(x: np.ndarray, axis: int) -> np.ndarray:
    """The number of the largest magnitude, with its sign; that axis keeps length 1."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=axis, keepdims=True), axis=axis)


def size_weight(x: np.ndarray) -> np.ndarray:
    """x [run, m] -> the weight of each square: ``sqrt(x^2 + 2 mean(x^2))``, large for large x, never near 0."""
    square = x * x
    return np.sqrt(square + 2 * square.mean(axis=0))


def fit_scale(
    x: np.ndarray, weight: np.ndarray, ends: Iterable[float], nearest: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """x, weight [run, m] -> scales [m] such that ``x ~ scale * q``, where ``nearest`` gives the q of a number.

    For each of ``ends``, x is first scaled such that its largest magnitude falls there.
    """
    top = largest(x, 0)[0]  # [run, m] -> [m]
    reciprocal = inverse(np.where(np.abs(top) < SMALLEST, 0, top))
    weighted, best, scale = weight * x, np.zeros_like(top), np.zeros_like(top)
    for end in ends:
        q = nearest(x * (np.float32(end) * reciprocal))
        xq, qq = (weighted * q).sum(axis=0), (weight * q * q).sum(axis=0)  # [m]
        fit = xq * inverse(qq)
        better = fit * xq > best  # what the fit takes from the squares of x
        best, scale = np.where(better, fit * xq, best), np.where(better, fit, scale)
    return scale


def fit_affine(x: np.ndarray, top: int, nudges: Iterable[float]) -> tuple[np.ndarray, np.ndarray]:
    """x [run, m] -> scales [m] and minimums [m] >= 0 such that ``x ~ scale * q - minimum``, q in 0..top.

    First the range of x as ``top`` steps, then, for each of ``nudges``, the best line for the codes that
    ``top + nudge`` steps give.
    """
    weight = size_weight(x)
    low = np.minimum(x.min(axis=0), 0)  # [m]
    span = x.max(axis=0) - low
    reciprocal = inverse(np.where(span < SMALLEST, 0, span))
    above, weighted = x - low, weight * x
    sum_w, sum_x = weight.sum(axis=0), weighted.sum(axis=0)
    best, scale, offset = np.full_like(low, -np.inf), np.zeros_like(low), low
    for nudge in (None, *nudges):
        q = np.rint(above * (np.float32(top + (nudge or 0)) * reciprocal))
        wq = weight * np.minimum(q, top, out=q)
        sum_q, sum_qq, sum_xq = wq.sum(axis=0), (wq * q).sum(axis=0), (weighted * q).sum(axis=0)
        if nudge is None:
            slope, start = span / np.float32(top), low
        else:
            slope, start = _regression(sum_w, sum_x, sum_q, sum_qq, sum_xq)
        line_squared = slope * (slope * sum_qq + 2 * start * sum_q) + start * start * sum_w
        gain = 2 * (slope * sum_xq + start * sum_x) - line_squared  # what the fit takes from the squares of x
        better = gain > best
        best, scale, offset = (np.where(better, *pair) for pair in ((gain, best), (slope, scale), (start, offset)))
    return scale, -offset


def _regression(w: np.ndarray, x: np.ndarray, q: np.ndarray, qq: np.ndarray, xq: np.ndarray) -> tuple:
    """Weighted sums [m] of 1, x, q, q^2, x q -> slope and start <= 0 of the best line; 0 and 0 where q is constant."""
    divisor = inverse(w * qq - q * q)
    slope, start = (w * xq - x * q) * divisor, (qq * x - q * xq) * divisor
    return np.where(start > 0, xq * inverse(qq), slope), np.minimum(start, 0)
