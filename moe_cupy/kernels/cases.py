"""Inputs that exercise each op, and how far float32 may be from float64 on them.

Tolerances are derived, not tuned. With u = 2^-24, a float32 sum of n products is off by at most about
``(n + 2) u`` times the sum of the products' magnitudes, in whatever order it is added; the other bounds
follow from that one by the chain rule. Each case returns the buffers, which of them are outputs, and
a function from the reference's buffers to the allowed error of each output. Here are the ops that read
matrices; ``layer_cases.py`` has the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.kernels.case import Case
from moe_cupy.kernels.layer_cases import layer_cases
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.reference import expand
from moe_cupy.kernels.samples import U, normal, random_matrix, unset
from moe_ref.experts import ACTIVATIONS
from moe_ref.quants import BY_NAME


def sum_error(x: np.ndarray, w: Matrix) -> np.ndarray:
    """Allowed error of x W^T, [T, rows]."""
    return (w.cols + 2) * U * (np.abs(x).astype(np.float64) @ np.abs(expand(w)).T)


def linear_error(x: np.ndarray, w: Matrix, scale: float = 1.0, bias: Any = None) -> np.ndarray:
    """Allowed error of scale * x W^T + bias, [T, rows]: after the sum, a rounding each."""
    product = np.abs(scale * x @ expand(w).T) + (0 if bias is None else np.abs(bias))
    return abs(scale) * sum_error(x, w) + 4 * U * product * (scale != 1.0 or bias is not None)


def ffn_error(x: np.ndarray, three: dict[str, Matrix], kind: str, scales: Any, biases: Any) -> np.ndarray:
    """Allowed error of a gated network's result, [n, D]; the slope of every activation is below 1.13."""
    x = x.astype(np.float64)
    (g, eg), (u, eu) = (
        (x @ expand(three[n]).T * scales.get(n, 1) + biases.get(n, 0),
         linear_error(x, three[n], scales.get(n, 1.0), biases.get(n))) for n in ("gate", "up")
    )  # fmt: skip
    act, lifted = ACTIVATIONS[kind], kind == "swiglu_oai"  # which multiplies with up + 1
    alone, factor = np.abs(act(g, np.full_like(u, not lifted))), np.abs(u) + lifted
    inner = factor * 1.13 * eg + alone * eu + 12 * U * np.abs(g) * factor
    down, scale = np.abs(expand(three["down"])), abs(scales.get("down", 1.0))
    return scale * inner @ down.T + linear_error(act(g, u), three["down"], scales.get("down", 1.0), biases.get("down"))


def linear_cases(rng: np.random.Generator, kind: str, cols: int, rows: int) -> Iterator[Case]:
    """Products, alone and added, with and without scale and bias; and the rows themselves."""
    extras: list[dict[str, Any]] = [{}, {}, {"scale": 0.375, "bias": normal(rng, rows)}]
    for n_tokens, extra in zip((1, 5, 3), extras, strict=True):
        w, x = random_matrix(rng, kind, rows, cols), normal(rng, n_tokens, cols)
        label, old = f"{kind} {n_tokens}x{cols}x{rows}{' + bias' * bool(extra)}", normal(rng, n_tokens, rows)
        error, buffers = linear_error(x, w, **extra), {"x": x, "w": w, **extra}
        yield Case("linear", label, buffers | {"out": unset(n_tokens, rows)}, ("out",), partial(dict, out=error))
        added = error + 2 * U * (np.abs(old) + np.abs(x @ expand(w).T) + np.abs(extra.get("bias", 0)))
        yield Case("linear_add", label, buffers | {"out": old}, ("out",), partial(dict, out=added))
    buffers = {"table": w, "ids": np.array([rows - 1, 0, 3], np.int32), "out": unset(3, cols)}
    yield Case("embed", kind, buffers, ("out",), lambda: {"out": 0.0})


def heads_case(rng: np.random.Generator, kind: str, cols: int, extra: dict[str, Any]) -> Case:
    """Two tokens, three heads with a matrix of five rows each; features of x and out beyond them are left alone."""
    w, x, out = random_matrix(rng, kind, 15, cols), normal(rng, 2, 3, cols + 4), normal(rng, 2, 3, 7)
    whole = [Matrix(kind, 5, cols, part) for part in w.data.reshape(3, -1)]
    each = [(extra.get("scale", [1.0] * 3)[h], extra["bias"][h] if "bias" in extra else None) for h in range(3)]
    error = np.zeros(out.shape)
    for h in range(3):
        error[:, h, :5] = linear_error(x[:, h, :cols], whole[h], *each[h])
    buffers = {"x": x, "w": w, "out": out, **extra}
    return Case("linear_heads", f"{kind} 2x3x{cols}x5 {list(extra)}", buffers, ("out",), lambda: {"out": error})


def experts_case(
    rng: np.random.Generator, kind: str, width: int, activation: str, full: bool, n_tokens: int = 4
) -> Case:
    """Two of five routed experts, all matrices of one type; ``full`` has scales, biases and weights of the input."""
    wanted, ids = np.array([3, 1]), np.argsort(rng.random((n_tokens, 5)), axis=1)[:, :3].astype(np.int32)
    three = {name: [random_matrix(rng, kind, width, width) for _ in wanted] for name in ("gate", "up", "down")}
    x, weights = normal(rng, n_tokens, width) * 2, np.abs(normal(rng, n_tokens, 3)) if full else None
    factors = {"down": (0.5, 1.5, 2, 1, 3), "up": (2, 0.75, 1, 0.25, 1)} if full else {}
    scales = {name: np.array(values, np.float32) for name, values in factors.items()}
    biases = {name: normal(rng, 5, width) for name in three} if full else {}
    parts = np.zeros((n_tokens, 3, width), np.float32)
    error = np.zeros(parts.shape)
    for i, e in enumerate(wanted):
        t, r = np.nonzero(ids == e)
        given = x[t] if weights is None else x[t] * weights[t, r][:, None] * (1 + 2 / width)  # one rounding more
        own = {n: w[i] for n, w in three.items()}, activation, {n: s[e] for n, s in scales.items()}
        error[t, r] = ffn_error(given, *own, {n: b[e] for n, b in biases.items()})
    buffers = {"x": x, "ids": ids, "wanted": wanted, "parts": parts, "activation": activation, "weights": weights}
    label = f"{kind} {activation}{' with all' * full} of {n_tokens}"
    every = buffers | three | {"scales": scales, "biases": biases}
    return Case("experts", label, every, ("parts",), lambda: {"parts": error})


def matrix_cases(rng: np.random.Generator, kind: str) -> Iterator[Case]:
    """Ops that read a matrix of type ``kind``; sizes are odd multiples of the block."""
    block = max(BY_NAME[kind].block_elements, 32)
    yield from linear_cases(rng, kind, 3 * block, 37)
    yield heads_case(rng, kind, block, {})
    yield experts_case(rng, kind, block, "silu", False)
    yield experts_case(rng, kind, block, "silu", False, n_tokens=16)
    if kind == "F32":
        yield heads_case(rng, kind, block, {"scale": np.array([0.5, -2, 3], np.float32), "bias": normal(rng, 3, 5)})
        for activation in ACTIVATIONS:
            yield experts_case(rng, kind, block, activation, False)
            yield experts_case(rng, kind, block, activation, True)
            yield experts_case(rng, kind, block, activation, True, n_tokens=16)


def all_cases(formats: tuple[str, ...], seed: int = 0) -> Iterator[Case]:
    """Every op on every format."""
    rng = np.random.default_rng(seed)
    yield from layer_cases(rng)
    for kind in formats:
        yield from matrix_cases(rng, kind)
