"""Inputs that exercise each op, and how far float32 may be from float64 on them.

Tolerances are derived, not tuned. With u = 2^-24, a float32 sum of n products is off by at most about
``(n + 2) u`` times the sum of the products' magnitudes, in whatever order it is added; the other bounds
follow from that one by the chain rule. Each case returns the buffers, which of them are outputs, and
a function from the reference's buffers to the allowed error of each output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.reference import expand
from moe_ref.quants import BY_NAME
from moe_ref.rope import rope_tables

U = 2.0**-24
SCALES_AT = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # half-precision scales


@dataclass(frozen=True, slots=True)
class Case:
    """One launch: ``buffers`` by name, ``outputs`` among them, ``allowed()`` -> error bound per output."""

    op: str
    label: str
    buffers: dict[str, Any]
    outputs: tuple[str, ...]
    allowed: Callable[[], dict[str, np.ndarray | float]]


def random_matrix(rng: np.random.Generator, kind: str, rows: int, cols: int) -> Matrix:
    """Random blocks of a format, with scales that make weights of ordinary size (about 0.05)."""
    t = BY_NAME[kind]
    if t.block_elements == 1:
        values = rng.normal(0, 0.05, (rows, cols)).astype(np.float32)
        bits = (values.view(np.uint32) >> 16).astype("<u2")
        data = {"F32": values, "F16": values.astype("<f2"), "BF16": bits}[kind].view(np.uint8)
        return Matrix(kind, rows, cols, np.ascontiguousarray(data).reshape(-1))
    blocks = rng.integers(0, 256, (rows * cols // t.block_elements, t.block_bytes), dtype=np.uint8)
    size = 2.0 ** -(3 + t.row_bytes(t.block_elements) * 8 // t.block_elements)
    for at in SCALES_AT[kind]:
        scales = rng.uniform(-size, size, len(blocks)) / (32 if t.block_elements == 256 else 1)
        blocks[:, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    return Matrix(kind, rows, cols, blocks.reshape(-1))


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, 1, shape).astype(np.float32)


def sum_error(x: np.ndarray, w: Matrix) -> np.ndarray:
    """Allowed error of x W^T, [T, rows]."""
    return (w.cols + 2) * U * (np.abs(x).astype(np.float64) @ np.abs(expand(w)).T)


def swiglu_error(x: np.ndarray, gate: Matrix, up: Matrix, down: Matrix) -> np.ndarray:
    """Allowed error of down(silu(gate x) * up x), [n, D]; silu's slope is below 1.1."""
    x = x.astype(np.float64)
    g, u = x @ expand(gate).T, x @ expand(up).T
    act = g / (1 + np.exp(-g))
    inner = np.abs(u) * 1.1 * sum_error(x, gate) + np.abs(act) * sum_error(x, up) + 8 * U * np.abs(act * u)
    magnitude = np.abs(expand(down))
    return inner @ magnitude.T + (down.cols + 2) * U * (np.abs(act * u) @ magnitude.T)


def matrix_cases(rng: np.random.Generator, kind: str) -> Iterator[Case]:
    """Ops that read a matrix of type ``kind``; sizes are odd multiples of the block."""
    block = BY_NAME[kind].block_elements
    cols, rows = max(block, 32) * 3, 37
    for n_tokens in (1, 5):
        w, x = random_matrix(rng, kind, rows, cols), _normal(rng, n_tokens, cols)
        label, old = f"{kind} {n_tokens}x{cols}x{rows}", _normal(rng, n_tokens, rows)

        def product(x: np.ndarray = x, w: Matrix = w) -> dict[str, Any]:
            return {"out": sum_error(x, w)}

        def added(x: np.ndarray = x, w: Matrix = w, old: np.ndarray = old) -> dict[str, Any]:
            error = sum_error(x, w)
            return {"out": error + 2 * U * (np.abs(old) + np.abs(x @ expand(w).T))}

        yield Case("linear", label, {"x": x, "w": w, "out": np.full_like(old, np.nan)}, ("out",), product)
        yield Case("linear_add", label, {"x": x, "w": w, "out": old.copy()}, ("out",), added)
    ids = np.array([rows - 1, 0, 3], np.int64)
    buffers = {"table": w, "ids": ids, "out": np.full((3, cols), np.nan, np.float32)}
    yield Case("embed", kind, buffers, ("out",), lambda: {"out": 0.0})
    yield from ffn_cases(rng, kind, max(block, 32))


def ffn_cases(rng: np.random.Generator, kind: str, width: int) -> Iterator[Case]:
    """A dense FFN and one routed expert with all three matrices of one type."""
    gate, up, down = (random_matrix(rng, kind, width, width) for _ in range(3))
    x, old = _normal(rng, 4, width), _normal(rng, 4, width)
    buffers = {"x": x, "gate": gate, "up": up, "down": down}
    chosen = (np.array([3, 1]), np.array([0, 2]))
    whole, some = swiglu_error(x, gate, up, down), np.zeros((4, 3, width))
    some[chosen] = whole[chosen[0]]
    yield Case(
        "ffn_add", kind, buffers | {"out": old.copy()}, ("out",), lambda: {"out": whole + 4 * U * (np.abs(old) + 1)}
    )
    parts = np.zeros((4, 3, width), np.float32)
    yield Case("expert", kind, buffers | {"chosen": chosen, "parts": parts}, ("parts",), lambda: {"parts": some})


def attention_case(rng: np.random.Generator, shape: tuple[int, ...], n_past: int) -> Case:
    """Grouped-query attention; shape is (T, H, G, K, V)."""
    t, h, g, k_width, v_width = shape
    q, k, v = _normal(rng, t, h, k_width), _normal(rng, 99, g, k_width), _normal(rng, 99, g, v_width)
    seen, scale = n_past + t, k_width**-0.5

    def allowed() -> dict[str, Any]:
        keys = np.repeat(np.abs(k[:seen]), h // g, axis=1)  # [S, H, K]
        score = (k_width + 3) * U * scale * np.einsum("thk,shk->ths", np.abs(q), keys).max()
        return {"out": (2 * score + (seen + 16) * U) * float(np.abs(v[:seen]).max())}

    buffers = {"q": q, "k": k, "v": v, "n_past": n_past, "scale": scale, "out": np.full((t, h, v_width), np.nan, "f4")}
    return Case("attention", f"{shape} after {n_past}", buffers, ("out",), allowed)


def route_case(rng: np.random.Generator, n_tokens: int, experts: int, used: int, renormalise: bool) -> Case:
    """Router with one exact tie for the last place and one flat row, both for the lower id to win."""
    logits = _normal(rng, n_tokens, experts) * 2
    order = np.argsort(-logits[0])
    logits[0, order[used : used + 1]] = logits[0, order[used - 1]]
    logits[-1] = 0.5
    ids, weights = np.full((n_tokens, used), -1, np.int64), np.full((n_tokens, used), np.nan, np.float32)
    buffers = {"logits": logits, "scale": 2.5, "renormalise": renormalise, "ids": ids, "weights": weights}
    relative = (experts + used + 16) * U * 2.5
    label = f"{n_tokens}x{experts} top-{used}"
    return Case("route", label, buffers, ("ids", "weights"), lambda: {"ids": 0.0, "weights": relative})


def small_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Ops that read no matrix."""
    x, gain = _normal(rng, 3, 5, 96), _normal(rng, 96)
    x[0] *= 1e-3  # rows so small that epsilon counts
    norm = (96 + 8) * U * np.abs(x / np.sqrt(np.mean(x**2, -1, keepdims=True)) * gain)
    buffers = {"x": x, "weight": gain, "epsilon": 1e-6, "out": np.full_like(x, np.nan)}
    yield Case("rms_norm", "3x5x96", buffers, ("out",), lambda: {"out": norm})
    for style in ("neox", "norm"):
        cos, sin = rope_tables(np.array([0, 7, 4000]), 32, 10000.0)
        turned = {"x": _normal(rng, 3, 2, 48), "cos": cos, "sin": sin, "style": style}
        bound = 4 * U * 2 * float(np.abs(turned["x"]).max())
        yield Case("rope", f"{style}, 32 of 48", turned, ("x",), partial(dict, x=bound))
    for dtype in (np.float32, np.float16):
        store = {"cache": np.zeros((9, 2, 8), dtype), "new": _normal(rng, 4, 2, 8), "position": 3}
        yield Case("kv_store", np.dtype(dtype).name, store, ("cache",), lambda: {"cache": 0.0})
    yield attention_case(rng, (1, 8, 4, 32, 32), 40)
    yield attention_case(rng, (7, 6, 2, 48, 20), 3)
    yield attention_case(rng, (1, 1, 1, 16, 16), 0)
    yield from (route_case(rng, *shape) for shape in ((4, 32, 4, True), (1, 12, 3, False), (3, 4, 4, True)))
    parts, weights, old = _normal(rng, 5, 4, 24), _normal(rng, 5, 4), _normal(rng, 5, 24)
    total = 8 * U * (np.einsum("tk,tkd->td", np.abs(weights), np.abs(parts)) + np.abs(old))
    buffers = {"parts": parts, "weights": weights, "out": old}
    yield Case("combine", "5x4x24", buffers, ("out",), lambda: {"out": total})


def all_cases(formats: tuple[str, ...], seed: int = 0) -> Iterator[Case]:
    """Every op on every format."""
    rng = np.random.default_rng(seed)
    yield from small_cases(rng)
    for kind in formats:
        yield from matrix_cases(rng, kind)
