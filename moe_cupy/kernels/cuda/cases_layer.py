"""Cases of the kernels that read no single matrix: experts, router, attention, caches, and those of `cases_small`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_cupy.kernels.cuda import launches
from moe_cupy.kernels.cuda.cases import Case, Output, as_input, sum_error
from moe_cupy.kernels.cuda.cases_small import delta_cases, norm_cases, small_cases
from moe_cupy.kernels.cuda.launches import CacheRows, Pointers, Sight, Slots
from moe_cupy.kernels.kept import CACHES, numbers_of, stored
from moe_cupy.kernels.reference import expand
from moe_cupy.kernels.samples import U, normal, random_matrix, unset
from moe_ref.attention import attend, visible
from moe_ref.experts import ACTIVATIONS
from moe_ref.kv_types import rotated
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
    items, _, numbers, size = CACHES[kind.lower()]
    nbytes = width // numbers * size * np.dtype(items).itemsize
    rows = np.full((seen + 5, nbytes), 0xFF, np.uint8).view(items)  # NaN in each type: later tokens must not count
    rows[:seen] = stored(normal(rng, seen, width), rows)
    return rows, numbers_of(rows[:seen]).astype(np.float64)


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
    for kind in ("Q8_0", "Q4_0", "BF16"):
        yield from make((2, 4, 2, 64, 32), 40, Sight(0.3), kind=kind)
        yield from make((5, 4, 2, 32, 32), 3, Sight(0.3), kind=kind)  # few positions: more of the tolerance is used
    yield from make((2, 3, 1, 72, 64), 33, Sight(0.1))  # MLA: 64 of 72
    yield from make((2, 2, 2, 32, 32), 20, Sight(0.3, softcap=2.0))
    yield from make((5, 2, 1, 256, 256), 20, Sight(256**-0.5), kind="F16")  # tiles of 16 positions
    yield from make((3, 2, 1, 576, 512), 37, Sight(0.05, window=30))  # latent rows of 16
    yield from make((2, 2, 2, 576, 512), 9, Sight(0.05))  # of 8, and of 4 in blocks of 256 threads


def cache_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """New rows into a cache, whole and beside others; both number types."""
    rows = np.array([4, 0, 8], np.int32)
    for kind in ("f32", "f16", "bf16"):
        empty = np.empty(0, CACHES[kind][0])
        cache, x = stored(normal(rng, 9, 50), empty).astype(empty.dtype), normal(rng, 3, 45)
        want = cache.copy()
        want[rows, 7:47] = stored(x[:, :40], empty)
        launch = launches.kv_store(cache, x, rows, column=7, width=40, block=block)
        yield Case(f"kv_store {kind}", (launch,), (Output(cache, want.astype(np.float64)),))
    for kind in ("q8_0", "q4_0"):
        items, _, _, size = CACHES[kind]
        x, blocks = normal(rng, 3, 160), np.full((9, 6 * size), 0xCD, np.uint8).view(items)
        x[1, 32:64], x[2, 7], x[2, 9] = 0, 5, -5  # two of one magnitude: the first says which end is code 0
        want = blocks.copy()
        want[rows, size : 5 * size] = stored(x[:, :128], blocks)
        launch = launches.kv_store(blocks, x, rows, column=32, width=128, block=block)
        yield Case(f"kv_store_{kind}", (launch,), (Output(blocks, want),))
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


def layer_cases(rng: np.random.Generator, block: int) -> Iterator[Case]:
    """All that is not per format."""
    for make in (norm_cases, rope_cases, cache_cases, router_cases, all_attention_cases, delta_cases, small_cases):
        yield from make(rng, block)
