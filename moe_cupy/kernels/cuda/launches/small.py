"""Small ops, in place unless there is an ``out``; and the recurrent layer's."""

from __future__ import annotations

from typing import Any

from moe_cupy.kernels.cuda.launches.core import ACTIVATIONS, Launch, ceil_div, thread_each


def add_scaled(out: Any, x: Any, scale: float = 1.0, block: int = 256) -> Launch:
    """out += scale * x."""
    return thread_each("add_scaled", out.size, block, out, x, scale, out.size)


def multiply(x: Any, factor: Any = None, *, is_gate: bool = False, scale: float = 1.0, block: int = 256) -> Launch:
    """x *= scale * factor (or its sigmoid); a number of ``factor`` serves as many neighbours of x as there are each."""
    span = 1 if factor is None else x.size // factor.size
    return thread_each("multiply", x.size, block, x, factor, span, int(is_gate), scale, x.size)


def activate(out: Any, gate: Any, up: Any, activation: str = "silu", block: int = 256) -> Launch:
    """out = act(gate, up)."""
    return thread_each("activate", out.size, block, out, gate, up, ACTIVATIONS[activation], out.size)


def softcap(x: Any, limit: float, block: int = 256) -> Launch:
    """x = limit * tanh(x / limit)."""
    return thread_each("softcap", x.size, block, x, limit, x.size)


def clamp(x: Any, limit: float, block: int = 256) -> Launch:
    """x within -limit..limit."""
    return thread_each("clamp", x.size, block, x, limit, x.size)


def combine(out: Any, parts: Any, weights: Any, add: bool = True, block: int = 256) -> Launch:
    """out [T, D] (+)= sum over rank of weights [T, used] * parts [T, used, D]."""
    args = (out, parts, weights, weights.shape[-1], out.shape[-1], int(add), out.size)
    return thread_each("combine", out.size, block, *args)


def delta_convolve(out: Any, x: Any, states: tuple[Any, Any], kernel: Any, block: int = 128) -> Launch:
    """out, x [T, channels]; states: inputs before and after, [C - 1, channels]; kernel [channels, C], C <= 8."""
    channels, taps = kernel.shape
    return thread_each("delta_convolve", channels, block, out, x, *states, kernel, len(x), channels, taps)


def delta_gates(alpha: Any, beta: Any, dt: Any, a: Any, block: int = 128) -> Launch:
    """alpha [T, heads] becomes the fade, beta [T, heads] its sigmoid."""
    return thread_each("delta_gates", alpha.size, block, alpha, beta, dt, a, dt.size, alpha.size)


def delta_recur(
    out: Any, mixed: Any, gates: tuple[Any, Any], states: tuple[Any, Any], key_heads: int, *, epsilon: float = 1e-6,
    tiled: bool = False, block: int = 128,
) -> Launch:  # fmt: skip
    """mixed [T, (2 key_heads + H) width], out [T, H, width]; gates: fade, beta [T, H]; states [H, width, width]."""
    n_tokens, heads, width = out.shape
    args = (out, mixed, *gates, *states, n_tokens, heads, key_heads, width, epsilon, int(tiled))
    shared = 4 * (34 * width + block)
    return Launch("delta_recur", (ceil_div(width, 32), heads, 1), block, args, shared)
