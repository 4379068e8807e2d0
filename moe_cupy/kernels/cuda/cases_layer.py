"""Cases of the kernels that read no single matrix: experts, router, attention, recurrence, small ops."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_cupy.kernels.cuda import launches
from moe_cupy.kernels.cuda.cases import Case, Output, as_input, sum_error
from moe_cupy.kernels.cuda.launches import CacheRows, Launch, Pointers, Sight, Slots
from moe_cupy.kernels.reference import expand
from moe_cupy.kernels.samples import U, normal, random_matrix, unset
from moe_ref import deltanet
from moe_ref.attention import attend, sigmoid, visible
from moe_ref.experts import ACTIVATIONS
from moe_ref.kv_types import rotated
from moe_ref.norm import l2_norm, layer_norm, rms_norm
from moe_ref.quants import quantize
from moe_ref.rope import apply_rope, rope_tables
from moe_ref.routing import route

# ---------------------------------------------------------------------------------------------------------
# experts


def some_slots(rng: np.random.Generator, kind: str, shape: tuple[int, int], parts: int) -> tuple[list[Any], Slots]:
    """Four slots of ``parts`` matrices each; 2 tokens use 3 experts of 6, one of which is not here."""
    held = [[random_matrix(rng, kind, *shape) for _ in range(4)] for _ in range(parts)]
    slot_of, ids = np.array([[3, 0, 1], [2, -1, 0]], np.int32), np.array([[5, 1, 2], [0, 3, 1]], np.int32)
    return held, Slots(tuple(Pointers([m.data for m in matrices]) for matrices in held), slot_of, ids)


def gate_up_case(
    rng: np.random.Generator, kind: str, shape: tuple[int, int], block: int, activation: str, q8: bool
) -> Case:
    """The first half of experts, with all that may be there; shape is (F, D)."""
    (gates, ups), slots = some_slots(rng, kind, shape, 2)
    biases, scales = (normal(rng, 6, shape[0]), normal(rng, 6, shape[0])), (normal(rng, 6), normal(rng, 6))
    given, x = as_input(normal(rng, 2, shape[1]), q8)
    by = normal(rng, 2, 3)
    h = unset(2, 3, shape[0])
    want, error = np.full(h.shape, np.nan), np.zeros(h.shape)
    for t, r in zip(*np.nonzero(slots.slot_of >= 0), strict=True):
        slot, e = slots.slot_of[t, r], slots.ids[t, r]
        sums, errors = [], []
        for w, bias, scale in zip((gates[slot], ups[slot]), biases, scales, strict=True):
            factor = scale[e].astype(np.float64) * by[t, r]
            sums.append(factor * (x[t] @ expand(w).T) + bias[e])
            errors.append(np.abs(factor) * sum_error(x[[t]], w, q8)[0] + 4 * U * np.abs([sums[-1], bias[e]]).sum(0))
        (g, u), (g_error, u_error) = sums, errors
        want[t, r] = ACTIVATIONS[activation](g, u)
        error[t, r] = 1.2 * (np.abs(u) + 1) * g_error + (np.abs(g) + 1) * (u_error + 24 * U * (np.abs(u) + 1))
    launch = launches.expert_gate_up(
        h, given, slots, gates[0], activation, biases=biases, scales=scales, input_weights=by, block=block
    )
    return Case(f"{launch.kernel} {activation} {shape}", (launch,), (Output(h, want, error),))


def down_case(rng: np.random.Generator, kind: str, shape: tuple[int, int], block: int, q8: bool) -> Case:
    """The second half of experts and their weighted sum, added to what was there; shape is (D, F)."""
    (downs,), slots = some_slots(rng, kind, shape, 1)
    given, h = as_input(normal(rng, 2, 3, shape[1]), q8)
    weights, bias, scale, old = normal(rng, 2, 3), normal(rng, 6, shape[0]), normal(rng, 6), normal(rng, 2, shape[0])
    out, want, error = old.copy(), old.astype(np.float64), 4 * U * np.abs(old)
    for t, r in zip(*np.nonzero(slots.slot_of >= 0), strict=True):
        w, e = downs[slots.slot_of[t, r]], slots.ids[t, r]
        y = scale[e] * (h[t, r] @ expand(w).T)
        want[t] += weights[t, r] * (y + bias[e])
        off = np.abs(scale[e]) * sum_error(h[t, r][None], w, q8)[0] + 8 * U * (np.abs(y) + np.abs(bias[e]))
        error[t] += np.abs(weights[t, r]) * off
    launch = launches.expert_down(out, given, slots, downs[0], weights, bias=bias, scale=scale, add=True, block=block)
    return Case(f"{launch.kernel} {shape}", (launch,), (Output(out, want, error),))


def expert_cases(rng: np.random.Generator, kind: str, step: int, is_block: bool, block: int) -> Iterator[Case]:
    """Both halves, with activations as numbers and as Q8 blocks."""
    activations = rng.permutation(list(ACTIVATIONS))
    for q8 in (False, True) if is_block else (False,):
        yield gate_up_case(rng, kind, (21, 2 * step), block, str(activations[int(q8)]), q8)
        yield down_case(rng, kind, (37, step), block, q8)


def router_case(rng: np.random.Generator, shape: tuple[int, int, int], block: int, **how: Any) -> Case:
    """shape is (T, E, used). One exact tie for the last place and one flat row, both for the lower id to win."""
    n_tokens, experts, used = shape
    logits = normal(rng, n_tokens, experts) * 2
    order = np.argsort(-logits[0])
    logits[0, order[used : used + 1]] = logits[0, order[used - 1]]
    logits[-1] = 0.5
    logits += np.float32(how.pop("shift", 0))
    bias = None
    if how.pop("with_bias", False):
        bias = (rng.integers(-4, 5, experts) / 8).astype(np.float32)  # steps that no rounding blurs
        logits = np.round(logits * 4) / np.float32(4)
    config: Any = SimpleNamespace(
        gating=how.get("gating", "softmax"), renormalise=how.get("renormalise", True), expert_used_count=used,
        expert_weights_scale=2.5, expert_group_count=how.get("groups", 1),
        expert_group_used_count=how.get("groups_used", 1),
        quirks=SimpleNamespace(select_by="logit" if how.get("select_logits") else "probability"),
    )  # fmt: skip
    want_ids, want = route(logits.astype(np.float64), config, bias)
    ids, weights = unset(n_tokens, used, dtype=np.int32), unset(n_tokens, used)
    error = (experts // 32 + used + 24) * U * 2 * np.maximum(np.abs(want), 2.5 * U)
    launch = launches.router(ids, weights, logits, bias, scale=2.5, block=block, **how)
    return Case(f"router {shape} {how}", (launch,), (Output(ids, want_ids), Output(weights, want, error)))


def router_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """Every gating, groups, ties, all experts used, fewer experts than threads, more than threads."""
    yield router_case(rng, (4, 32, 4), block)
    yield router_case(rng, (3, 256, 8), block, gating="sigmoid", groups=8, groups_used=4, with_bias=True)
    yield router_case(rng, (2, 300, 8), block, gating="softmax over the selected", renormalise=False)
    yield router_case(rng, (2, 160, 6), block, groups=8, groups_used=3)
    yield router_case(rng, (1, 12, 3), block, renormalise=False)
    yield router_case(rng, (3, 4, 4), block)
    yield router_case(rng, (2, 24, 3), block, gating="sigmoid", shift=-18)  # a sum below the floor of divisors
    yield router_case(rng, (2, 16, 1), block, gating="sigmoid", select_logits=True, renormalise=False, shift=20)


# ---------------------------------------------------------------------------------------------------------
# attention


def attention_cases(
    rng: np.random.Generator, shape: tuple[int, ...], past: int, sight: Sight, block: int, kind: str = "F32"
) -> Iterator[Case]:
    """The same queries by both ways; shape is (T, H, G, K, V). V < K with one group: values are part of the keys."""
    n_tokens, heads, groups, k_width, v_width = shape
    seen = past + n_tokens
    shares_rows = groups == 1 and v_width < k_width
    k, keys = cache_of(rng, kind, seen, groups * k_width)
    v, values = (k, keys) if shares_rows else cache_of(rng, kind, seen, groups * v_width)
    keys, values = (a.reshape(seen, groups, -1) for a in (keys, values))
    q, positions = normal(rng, n_tokens, heads, k_width), np.arange(past, seen, dtype=np.int32)
    want, error = attention_expected(q, keys, values[..., :v_width], sight, positions)
    rows, label = CacheRows(k, v, groups), f"{shape} after {past}, {kind}"
    for splits in (1, 3):
        partial_results, out = unset(n_tokens, heads, splits, v_width + 2), unset(n_tokens, heads, v_width)
        first = launches.attention_decode(partial_results, q, rows, positions, sight, block)
        second = launches.attention_combine(out, partial_results, sight.sinks, block)
        yield Case(f"attention_decode {label}", (first, second), (Output(out, want, error),), (partial_results,))
    out = unset(n_tokens, heads, v_width)
    whole = launches.attention_prefill(out, q, rows, positions, sight, block)
    yield Case(f"attention_prefill {label}", (whole,), (Output(out, want, error),))


def cache_of(rng: np.random.Generator, kind: str, seen: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A cache with five rows more than are filled, all NaN, and the numbers of the filled, float64 [seen, width]."""
    if kind == "Q8_0":
        values = random_matrix(rng, "Q8_0", seen, width)
        rows = np.full((seen + 5, width // 32 * 34), 0x7F, np.uint8)  # 0x7f7f is a NaN
        rows[:seen] = values.data.reshape(seen, -1)
        return rows, expand(values)
    rows = normal(rng, seen + 5, width).astype({"F32": np.float32, "F16": np.float16}[kind])
    rows[seen:] = np.nan  # later tokens must not count
    return rows, rows[:seen].astype(np.float64)


def attention_expected(q: Any, k: Any, v: Any, sight: Sight, positions: Any) -> tuple[np.ndarray, np.ndarray]:
    """What attention gives, [T, H, V], and how far off it may be: scores first, then their softmax and the sum."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    mask = visible(positions, np.arange(len(k)), sight.chunk or sight.window, bool(sight.chunk))
    if sight.softcap:  # moe_ref has none: the cap is applied to scores of one-hot "keys" instead
        scores = np.einsum("thk,shk->ths", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1)) * sight.scale
        capped = sight.softcap * np.tanh(scores / sight.softcap)
        want = np.stack([
            attend(capped[:, [h]], np.eye(len(k))[:, None], v[:, [h * v.shape[1] // q.shape[1]]], 1.0, mask)[:, 0]
            for h in range(q.shape[1])
        ], axis=1)  # fmt: skip
    else:
        want = attend(q, k, v, sight.scale, mask, None if sight.sinks is None else sight.sinks.astype(np.float64))
    largest = np.einsum("thk,shk->ths", np.abs(q), np.repeat(np.abs(k), q.shape[1] // k.shape[1], axis=1)).max()
    score = (k.shape[-1] + 6) * U * sight.scale * largest
    return want, np.full(want.shape, (2 * score + (len(k) + 24) * U) * np.abs(v).max())


def all_attention_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """Grouped heads, windows, chunks, sinks, a cap, half precision, latent rows, ragged widths."""
    make = partial(attention_cases, rng, block=block)
    yield from make((3, 4, 2, 16, 16), 70, Sight(0.25, window=37, sinks=normal(rng, 4)))
    yield from make((1, 8, 4, 32, 32), 40, Sight(32**-0.5))
    yield from make((7, 6, 2, 48, 20), 3, Sight(0.2))
    yield from make((1, 1, 1, 16, 16), 0, Sight(0.25))
    yield from make((5, 2, 1, 24, 24), 60, Sight(0.2, chunk=32), kind="F16")
    yield from make((2, 4, 2, 64, 32), 40, Sight(0.3), kind="Q8_0")
    yield from make((2, 3, 1, 72, 64), 33, Sight(0.1))  # MLA: 64 of 72
    yield from make((2, 2, 2, 32, 32), 20, Sight(0.3, softcap=2.0))
    yield from make((5, 2, 1, 256, 256), 20, Sight(256**-0.5), kind="F16")  # tiles of 16 positions
    yield from make((3, 2, 1, 576, 512), 37, Sight(0.05, window=30))  # latent rows of 16
    yield from make((2, 2, 2, 576, 512), 9, Sight(0.05))  # of 8, and of 4 in blocks of 256 threads


def cache_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """New rows into a cache, whole and beside others; both number types."""
    rows = np.array([4, 0, 8], np.int32)
    for dtype in (np.float32, np.float16):
        cache, x = normal(rng, 9, 50).astype(dtype), normal(rng, 3, 45)
        want = cache.copy()
        want[rows, 7:47] = x[:, :40]
        launch = launches.kv_store(cache, x, rows, column=7, width=40, block=block)
        yield Case(f"kv_store {np.dtype(dtype)}", (launch,), (Output(cache, want.astype(np.float64)),))
    x, blocks = normal(rng, 3, 160), np.full((9, 6 * 34), 0xCD, np.uint8)
    x[1, 32:64] = 0
    want = blocks.copy()
    want[rows, 34 : 5 * 34] = quantize(x[:, :128], "Q8_0")
    launch = launches.kv_store(blocks, x, rows, column=32, width=128, block=block)
    yield Case("kv_store_q8_0", (launch,), (Output(blocks, want),))
    for count in (64, 512):
        turned = normal(rng, 3, 1024)
        want, launch = rotated(turned, count), launches.hadamard(turned, count, block)
        yield Case(f"hadamard {count}", (launch,), (Output(turned, want.astype(np.float64)),))


def rope_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """Both styles, a part of the head, tables by row and by position."""
    cos, sin = rope_tables(np.array([0, 7, 4000, 31]), 32, 10000.0)
    for style, offset, positions in (("neox", 0, None), ("norm", 16, np.array([2, 0, 3], np.int32))):
        x = normal(rng, 3, 5, 48)
        rows = np.arange(3) if positions is None else positions
        want = x.astype(np.float64)
        want[..., offset:] = apply_rope(want[..., offset:], cos[rows], sin[rows], style)
        bound = 8 * U * float(np.abs(x).max())
        launch = launches.rope(x, cos, sin, style, positions, offset, block)
        yield Case(f"rope {style}", (launch,), (Output(x, want, bound),))


# ---------------------------------------------------------------------------------------------------------
# norms, recurrence, small ops


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
    best = Output(ids, np.array([20, 3, 0, last])), Output(largest, np.array([9, np.inf, -np.inf, logits[3, last]]))
    yield Case("argmax", (launches.argmax(largest, ids, logits, block),), best)
    yield from top_k_cases(rng, block)


def top_k_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """Ties, NaN and minus infinity; one part, several with a short last one, and all numbers there are."""
    for n, k, splits in ((333, 1, 3), (40, 8, 4), (30, 30, 1), (330, 64, 5)):
        logits = np.round(normal(rng, 3, n) * 8) / np.float32(8)  # many are equal
        logits[0, : n // 2], logits[1, 3], logits[2, n // 3 :] = -np.inf, np.nan, -np.inf
        seen = np.where(np.isnan(logits), np.inf, logits)
        want_ids = np.argsort(-seen, axis=-1, kind="stable")[:, :k]
        shapes = (3, splits, k), (3, 1, k)
        (values, best), (ids, chosen) = ([unset(*shape, dtype=t) for shape in shapes] for t in (np.float32, np.int32))
        first = launches.top_k(values, ids, logits, block=block)
        second = launches.top_k(best, chosen, values, ids, block=block)
        largest = np.take_along_axis(seen, want_ids, -1)
        outputs = Output(best, largest[:, None]), Output(chosen, want_ids[:, None])
        yield Case(f"top_k {k} of {n} in {splits}", (first, second), outputs, (values, ids))


def layer_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """All of this file that is not per format."""
    for make in (norm_cases, rope_cases, cache_cases, router_cases, all_attention_cases, delta_cases, small_cases):
        yield from make(rng, block)
