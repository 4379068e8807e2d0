"""Cases of the ops that read no matrix; how tolerances come about is said in ``cases.py``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.kernels.case import Case
from moe_cupy.kernels.kept import CACHES, numbers_of, stored
from moe_cupy.kernels.samples import U, normal, unset
from moe_ref.experts import ACTIVATIONS
from moe_ref.rope import rope_tables


def norm_case(rng: np.random.Generator, width: int, gain: bool, bias: bool, centred: bool) -> Case:
    """Rows of 96 of which ``width`` count, the first so small that epsilon counts."""
    x = normal(rng, 3, 5, 96) + (2 if centred else 0)
    x[0] *= 1e-3
    weight, shift = normal(rng, width) if gain else None, normal(rng, width) if bias else None
    seen = x[..., :width].astype(np.float64)
    if centred:
        seen -= seen.mean(-1, keepdims=True)
    factor = (1 if weight is None else np.abs(weight)) / np.sqrt(np.mean(seen**2, -1, keepdims=True) + 1e-6)
    error = np.zeros(x.shape)
    error[..., :width] = (width + 8) * U * np.abs(seen) * factor
    if centred:  # the mean's own error, in every element and in the spread
        error[..., :width] += 2 * (width + 2) * U * np.abs(x[..., :width]).mean(-1, keepdims=True) * factor
    if shift is not None:
        error[..., :width] += 2 * U * (np.abs(seen) * factor + np.abs(shift))
    buffers = {"x": x, "weight": weight, "epsilon": 1e-6, "bias": shift, "centred": centred, "out": x.copy()}
    label = f"{width} of 96{' gain' * gain}{' bias' * bias}{' centred' * centred}"
    return Case("norm", label, buffers, ("out",), lambda: {"out": error})


def element_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Ops on single elements."""
    x, y, limit = 3 * normal(rng, 5, 24), normal(rng, 5, 24), 1.5
    columns = {"x": x, "first": 3, "out": y, "at": 7, "count": 16}
    yield Case("columns", "16 of 24", columns, ("out",), lambda: {"out": 0.0})
    yield Case("scale", "5x24", {"x": x, "factor": 0.3}, ("x",), lambda: {"x": 2.5 * U * np.abs(x)})
    added = 2.5 * U * (np.abs(x) + np.abs(y))
    yield Case("add", "5x24", {"x": x, "factor": 0.3, "out": y}, ("out",), lambda: {"out": added})
    yield Case("clamp", "5x24", {"x": x, "limit": limit}, ("x",), lambda: {"x": 0.0})
    capped = 8 * U * np.abs(limit * np.tanh(x / limit))
    yield Case("softcap", "5x24", {"x": x, "limit": limit}, ("x",), lambda: {"x": capped})
    for kind in ACTIVATIONS:
        gate, up = 5 * normal(rng, 5, 24), 5 * normal(rng, 5, 24)
        error = 12 * U * np.abs(gate) * (np.abs(up) + (kind == "swiglu_oai"))
        buffers = {"gate": gate, "up": up, "kind": kind}
        yield Case("activate", kind, buffers, ("gate",), partial(dict, gate=error))
    for width in (24, 1):
        gated = {"x": x, "gate": 4 * normal(rng, 5, width)}
        yield Case("sigmoid_gate", f"by {width}", gated, ("x",), lambda: {"x": 6 * U * np.abs(x)})


def rope_cases(rng: np.random.Generator) -> Iterator[Case]:
    """32 of 48 features, the first or the last."""
    for style in ("neox", "norm"):
        for first in (0, 16):
            cos, sin = rope_tables(np.array([0, 7, 4000]), 32, 10000.0)
            turned = {"x": normal(rng, 3, 2, 48), "cos": cos, "sin": sin, "style": style, "first": first}
            bound = 4 * U * 2 * float(np.abs(turned["x"]).max())
            yield Case("rope", f"{style}, 32 of 48 from {first}", turned, ("x",), partial(dict, x=bound))


def attention_case(rng: np.random.Generator, shape: tuple[int, ...], n_past: int, **options: Any) -> Case:
    """Grouped-query attention; shape is (T, H, G, K, V). "temperature", "sinks" and "shared" are drawn if named.

    "kept": the type of keys and values, by its name on the command line.
    """
    t, h, g, k_width, v_width = shape
    q, k, v = normal(rng, t, h, k_width), normal(rng, 99, g, k_width), normal(rng, 99, g, v_width)
    seen, scale, heat = n_past + t, k_width**-0.5, 1.0
    if options.pop("shared", False):  # latent attention: values are the first features of what serves as keys
        v = k
    like = np.empty(0, CACHES[options.pop("kept", "f32")][0])
    kept = [stored(k, like)]
    kept.append(kept[0] if v is k else stored(v, like))
    k, v = map(numbers_of, kept)
    if options.pop("temperature", False):
        options["temperature"] = 1 + np.abs(normal(rng, t))
        heat = float(options["temperature"].max())
    if options.pop("sinks", False):
        options["sinks"] = 2 * normal(rng, h)

    def allowed() -> dict[str, Any]:
        keys = np.repeat(np.abs(k[:seen]), h // g, axis=1)  # [S, H, K]
        score = (k_width + 4) * U * scale * heat * np.einsum("thk,shk->ths", np.abs(q), keys).max()
        return {"out": (2 * score + (seen + 16) * U) * float(np.abs(v[:seen]).max())}

    buffers = {"q": q, "k": kept[0], "v": kept[1], "n_past": n_past, "scale": scale, "out": unset(t, h, v_width)}
    buffers |= options
    return Case("attention", f"{shape} after {n_past} {' '.join(options)}", buffers, ("out",), allowed)


def attention_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Plain, and with each of the options where it counts."""
    yield attention_case(rng, (1, 8, 4, 32, 32), 40)
    yield attention_case(rng, (7, 6, 2, 48, 20), 3)
    yield attention_case(rng, (1, 1, 1, 16, 16), 0)
    yield attention_case(rng, (7, 4, 1, 24, 16), 20, shared=True)
    yield attention_case(rng, (7, 4, 2, 16, 16), 20, window=5)
    yield attention_case(rng, (7, 4, 2, 16, 16), 2, window=5)
    yield attention_case(rng, (7, 4, 2, 16, 16), 22, window=8, chunked=True)
    yield attention_case(rng, (5, 4, 2, 16, 16), 9, sinks=True)
    yield attention_case(rng, (5, 4, 2, 16, 16), 9, temperature=True, sinks=True, window=6)
    for kind in ("q8_0", "q4_0", "bf16"):
        yield attention_case(rng, (3, 10, 2, 64, 96), 20, window=9, kept=kind)
    yield attention_case(rng, (9, 4, 1, 96, 64), 0, shared=True, kept="q8_0")
    for kind, (dtype, _, numbers, items) in CACHES.items():
        store = {"cache": np.zeros((9, 2, 96 // numbers * items), dtype), "new": normal(rng, 4, 2, 96), "position": 3}
        yield Case("kv_store", kind, store, ("cache",), lambda: {"cache": 0.0})
    for count in (64, 256):
        x = normal(rng, 3, 512)
        error = (np.log2(count) + 2) * U * count**-0.5 * np.abs(x).reshape(-1, count).sum(-1).max()
        yield Case("hadamard", f"runs of {count}", {"x": x, "count": count}, ("x",), partial(dict, x=error))


def delta_cases(rng: np.random.Generator) -> Iterator[Case]:
    """A recurrent layer: five tokens, and one, fewer than the convolution looks back on."""
    for t in (5, 1):
        x, before, kernel = normal(rng, t, 12), normal(rng, 3, 12), normal(rng, 12, 4)
        rows = np.abs(np.concatenate([before, x]))
        total = 6 * U * sum(rows[i : i + t] * np.abs(kernel[:, i]) for i in range(4))
        convolved = 1.1 * total + 8 * U * total / (6 * U)
        buffers = {"x": x, "before": before, "kernel": kernel, "after": unset(3, 12), "out": unset(t, 12)}
        yield Case("convolve", f"{t}x12x4", buffers, ("out", "after"), partial(dict, out=convolved, after=0.0))
    alpha, beta, dt, a = normal(rng, 5, 6), normal(rng, 5, 6), normal(rng, 6), -np.abs(normal(rng, 6))
    product = np.abs(np.logaddexp(0, alpha + dt) * a)
    fade = np.exp(-product) * U * (np.abs(a) * (np.abs(alpha) + np.abs(dt)) + 8 * (product + 1))
    buffers = {"alpha": alpha, "beta": beta, "dt": dt, "a": a, "fade": unset(5, 6), "share": unset(5, 6)}
    yield Case("delta_gates", "5x6", buffers, ("fade", "share"), lambda: {"fade": fade, "share": 6 * U})
    yield from (delta_rule_case(rng, t, tiled) for t, tiled in ((5, False), (1, True), (9, True)))


def delta_rule_case(rng: np.random.Generator, t: int, tiled: bool) -> Case:
    """Six value heads on two key heads of width 8.

    A step takes no column of a matrix further from what it should be, for k has length one, fade and share are below
    one. It adds its own roundings, at most (2 S + 16) u of the column's length, which v makes longer.
    """
    heads, keys, s = 6, 2, 8
    qkv, before = normal(rng, t, (2 * keys + heads) * s), normal(rng, heads, s, s)
    fade, share = (rng.uniform(0.1, 0.9, (t, heads)).astype(np.float32) for _ in range(2))
    longest = float(np.linalg.norm(before, axis=1).max() + np.abs(qkv).sum(axis=0).max())
    matrix = t * (2 * s + 16) * U * longest
    buffers = {
        "qkv": qkv, "fade": fade, "share": share, "key_heads": keys, "epsilon": 1e-6, "tiled": tiled,
        "before": before, "after": unset(heads, s, s), "out": unset(t, heads, s),
    }  # fmt: skip
    bounds: Any = partial(dict, after=matrix, out=s**-0.5 * (matrix + (s + 6) * U * longest))
    return Case("delta_rule", f"{t}x6x8{' tiled' * tiled}", buffers, ("out", "after"), bounds)


def route_case(rng: np.random.Generator, shape: tuple[int, int, int], renormalise: bool, **options: Any) -> Case:
    """Router of shape (T, E, k) with an exact tie for the last place and a flat row, both for the lower id to win."""
    n_tokens, experts, used = shape
    logits = normal(rng, n_tokens, experts) * 2
    order = np.argsort(-logits[0])
    logits[0, order[used : used + 1]] = logits[0, order[used - 1]]
    logits[-1] = 0.5
    label = f"{n_tokens}x{experts} top-{used} {options or ''}"
    if options.pop("bias", False):
        options["bias"] = normal(rng, experts) / 2
    ids, weights = np.full((n_tokens, used), -1, np.int32), unset(n_tokens, used)
    buffers = {"logits": logits, "scale": 2.5, "renormalise": renormalise, "ids": ids, "weights": weights, **options}
    relative = (experts + used + 16) * U * 2.5
    return Case("route", label, buffers, ("ids", "weights"), lambda: {"ids": 0.0, "weights": relative})


def route_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Every gating, with and without renormalisation, selection bias and groups."""
    yield route_case(rng, (4, 32, 4), True)
    yield route_case(rng, (1, 12, 3), False)
    yield route_case(rng, (3, 4, 4), True)
    yield route_case(rng, (4, 32, 4), True, gating="sigmoid")
    yield route_case(rng, (4, 16, 2), False, gating="sigmoid", by_logit=True)
    yield route_case(rng, (4, 32, 4), False, gating="softmax over the selected")
    for gating in ("softmax", "sigmoid"):
        yield route_case(rng, (9, 32, 4), True, gating=gating, bias=True)
        yield route_case(rng, (9, 32, 4), True, gating=gating, bias=True, groups=8, groups_used=3)
        yield route_case(rng, (9, 32, 6), False, gating=gating, groups=4, groups_used=2)


def combine_cases(rng: np.random.Generator) -> Iterator[Case]:
    """The weighted sum of experts, and the plain one."""
    for weighted, add in ((True, True), (True, False), (False, True)):
        parts, old, weights = normal(rng, 5, 4, 24), normal(rng, 5, 24), normal(rng, 5, 4)
        total = 8 * U * (np.einsum("tk,tkd->td", np.abs(weights) if weighted else np.ones((5, 4)), np.abs(parts)))
        buffers = {"parts": parts, "weights": weights if weighted else None, "out": old, "add": add}
        bounds: Any = partial(dict, out=total + 8 * U * np.abs(old))
        yield Case("combine", f"5x4x24 weighted {weighted}, add {add}", buffers, ("out",), bounds)


def top_k_cases(rng: np.random.Generator) -> Iterator[Case]:
    """The largest, and several, of rows with ties; of one part and of several."""
    for n, k in ((300, 1), (300, 40), (9000, 64), (40, 40)):
        logits = np.round(normal(rng, 3, n) * 8) / np.float32(8)
        buffers = {"logits": logits, "values": unset(3, k), "ids": np.full((3, k), -1, np.int32)}
        yield Case("top_k", f"{k} of {n}", buffers, ("values", "ids"), lambda: {"values": 0.0, "ids": 0.0})


def layer_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Ops that read no matrix."""
    yield norm_case(rng, 96, True, False, False)
    yield norm_case(rng, 96, False, False, False)
    yield norm_case(rng, 40, True, True, False)
    yield norm_case(rng, 96, True, True, True)
    for cases in (element_cases, rope_cases, attention_cases, delta_cases, route_cases, combine_cases, top_k_cases):
        yield from cases(rng)
