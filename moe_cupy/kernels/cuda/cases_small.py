"""Cases of the kernels beside matrices and attention: norms, recurrence, small ops, what sampling asks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_cupy.kernels.cuda import launches
from moe_cupy.kernels.cuda.cases import Case, Output
from moe_cupy.kernels.cuda.launches import Launch
from moe_cupy.kernels.samples import U, normal, unset
from moe_ref import deltanet
from moe_ref.attention import sigmoid
from moe_ref.experts import ACTIVATIONS
from moe_ref.norm import l2_norm, layer_norm, rms_norm


def norm_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """Rows so small that epsilon counts, all kinds, a residual, and fewer features than a row has."""
    yield norm_case(rng, "rms", 96, 96, block, residual=True)
    yield norm_case(rng, "layer", 300, 300, block)
    yield norm_case(rng, "unit", 20, 20, block)
    yield norm_case(rng, "rms", 64, 96, block)


def norm_case(
    rng: np.random.Generator, kind: str, width: int, row: int, block: int, residual: bool = False
) -> Case:  # fmt: skip
    """Five rows, of which ``width`` features are normalised; a bias where there is a residual."""
    x, gain, out = normal(rng, 5, row) + np.float32(0.5), normal(rng, width), unset(5, row)
    x[0] *= 1e-3
    added, bias = (normal(rng, 5, row), normal(rng, width)) if residual else (None, None)
    summed = x.copy() if added is None else x + added
    part, function = summed[:, :width].astype(np.float64), {"rms": rms_norm, "layer": layer_norm, "unit": unit}[kind]
    want = np.full(x.shape, np.nan)
    want[:, :width] = function(part, gain.astype(np.float64), 1e-6) + (0.0 if bias is None else bias)
    lost = np.abs(part).max(-1) / part.std(-1) if kind == "layer" else np.ones(5)  # digits that the mean takes along
    size = np.abs(gain).max() * np.abs(part).max(-1) / np.sqrt(np.mean(part**2, -1)) + np.nanmax(np.abs(want), -1)
    allowed = ((width // 32 + 20) * U * (4 * lost + 1) * size)[:, None]
    launch = launches.rms_norm(out, x, gain, residual=added, bias=bias, kind=kind, width=width, block=block)
    return Case(f"rms_norm {kind} {width}", (launch,), (Output(out, want, allowed), Output(x, summed)))


def unit(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Of length one, times a weight."""
    return l2_norm(x, epsilon) * weight


def delta_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """Convolution, gates and recurrence over several tokens; the state moves on."""
    x, before, kernel = normal(rng, 5, 70), normal(rng, 3, 70), normal(rng, 70, 4)
    total, moved = deltanet.convolve(*(a.astype(np.float64) for a in (x, before, kernel)))
    out, after = unset(5, 70), unset(3, 70)
    bound = 16 * U * (deltanet.convolve(*(np.abs(a).astype(np.float64) for a in (x, before, kernel)))[0] + 1)
    launch = launches.delta_convolve(out, x, (before, after), kernel, block)
    yield Case("delta_convolve", (launch,), (Output(out, total * sigmoid(total), bound), Output(after, moved)))
    alpha, beta, dt, a = normal(rng, 5, 6), normal(rng, 5, 6), normal(rng, 6), -np.exp(normal(rng, 6))
    wants = np.exp(np.logaddexp(0, alpha.astype(np.float64) + dt) * a), sigmoid(beta.astype(np.float64))
    slope = 32 * U * (1 + np.abs(np.logaddexp(0, alpha + dt) * a) + np.abs(a) * np.abs(alpha + dt))
    launch = launches.delta_gates(alpha, beta, dt, a, block)
    yield Case("delta_gates", (launch,), (Output(alpha, wants[0], slope), Output(beta, wants[1], 16 * U)))
    for tiled in (False, True):
        yield recur_case(rng, (5, 6, 3, 48), tiled, block)


def recur_case(rng: np.random.Generator, shape: tuple[int, int, int, int], tiled: bool, block: int) -> Case:
    """shape is (T, heads, key heads, width). Fades below 1 keep errors of earlier tokens from growing."""
    n_tokens, heads, key_heads, width = shape
    mixed = normal(rng, n_tokens, (2 * key_heads + heads) * width)
    mixed[2, : 2 * key_heads * width] *= 1e-4  # so short that epsilon counts
    fade, beta = (rng.uniform(0.1, 0.9, (n_tokens, heads)).astype(np.float32) for _ in range(2))
    before, after, out = normal(rng, heads, width, width), unset(heads, width, width), unset(n_tokens, heads, width)
    q, k, v = np.split(mixed.astype(np.float64), [key_heads * width, 2 * key_heads * width], axis=-1)
    which = np.arange(heads) % key_heads if tiled else np.arange(heads) // (heads // key_heads)
    q, k = (l2_norm(y.reshape(n_tokens, key_heads, width), 1e-6)[:, which] for y in (q, k))
    want, moved = deltanet.recur(q, k, v.reshape(out.shape), *(a.astype(np.float64) for a in (fade, beta, before)))
    size = np.abs(before).max() + np.abs(v).max()
    bound = 2 * n_tokens * (width + 24) * U * size * np.sqrt(width)  # |k|_1 <= sqrt(width), |q| = 1
    launch = launches.delta_recur(out, mixed, (fade, beta), (before, after), key_heads, tiled=tiled, block=block)
    return Case(f"delta_recur {shape} {tiled}", (launch,), (Output(out, want, bound), Output(after, moved, bound)))


def small_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """Elementwise ops and argmax."""
    x, y, z = normal(rng, 5, 61), normal(rng, 5, 61), normal(rng, 5)
    wide, by = (a.astype(np.float64) for a in (x, y))

    def one(label: str, launch: Launch, got: np.ndarray, want: np.ndarray, roundings: float) -> Case:
        return Case(label, (launch,), (Output(got, want, roundings * U * (1 + np.abs(want) + np.abs(wide))),))

    a = x.copy()
    yield one("add_scaled", launches.add_scaled(a, y, 0.3, block), a, wide + 0.3 * by, 4)
    a = x.copy()
    gate = launches.multiply(a, z, is_gate=True, scale=0.5, block=block)
    yield one("multiply by a gate", gate, a, wide * sigmoid(z.astype(np.float64))[:, None] * 0.5, 16)
    a = x.copy()
    yield one("multiply", launches.multiply(a, y, block=block), a, wide * by, 4)
    for name, function in ACTIVATIONS.items():
        a = unset(5, 61)
        yield one(f"activate {name}", launches.activate(a, x, y, name, block), a, function(wide, by), 40)
    a = x.copy()
    yield one("softcap", launches.softcap(a, 1.5, block), a, 1.5 * np.tanh(wide / 1.5), 8)
    a = x.copy()
    yield Case("clamp", (launches.clamp(a, 0.5, block),), (Output(a, np.clip(x, -0.5, 0.5)),))
    parts, weights, old = normal(rng, 5, 4, 24), normal(rng, 5, 4), normal(rng, 5, 24)
    out = old.copy()
    want = old + np.einsum("tk,tkd->td", weights.astype(np.float64), parts)
    bound = 8 * U * (np.einsum("tk,tkd->td", np.abs(weights), np.abs(parts)) + np.abs(old))
    yield Case("combine", (launches.combine(out, parts, weights, True, block),), (Output(out, want, bound),))
    logits, largest, ids = normal(rng, 4, 1000), unset(4), unset(4, dtype=np.int32)
    logits[0, [20, 700]], logits[1, 3], logits[2] = 9, np.nan, -np.inf
    last = logits[3].argmax()
    best = Output(ids, np.array([20, 3, 0, last])), Output(largest, np.array([9, np.inf, np.inf, logits[3, last]]))
    yield Case("argmax", (launches.argmax(largest, ids, logits, block),), best)
    yield from top_k_cases(rng, block)


def top_k_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """Ties, NaN and minus infinity (largest, both); one part, several with a short last one, all numbers there are."""
    for n, k, splits in ((333, 1, 3), (40, 8, 4), (30, 30, 1), (330, 64, 5)):
        logits = np.round(normal(rng, 3, n) * 8) / np.float32(8)  # many are equal
        logits[0, : n // 2], logits[1, 3], logits[2, n // 3 :] = -np.inf, np.nan, -np.inf
        seen = np.where(np.isfinite(logits), logits, np.inf)
        want_ids = np.argsort(-seen, axis=-1, kind="stable")[:, :k]
        shapes = (3, splits, k), (3, 1, k)
        (values, best), (ids, chosen) = ([unset(*shape, dtype=t) for shape in shapes] for t in (np.float32, np.int32))
        first = launches.top_k(values, ids, logits, block=block)
        second = launches.top_k(best, chosen, values, ids, block=block)
        largest = np.take_along_axis(seen, want_ids, -1)
        outputs = Output(best, largest[:, None]), Output(chosen, want_ids[:, None])
        yield Case(f"top_k {k} of {n} in {splits}", (first, second), outputs, (values, ids))
