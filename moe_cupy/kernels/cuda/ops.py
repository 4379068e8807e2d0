"""The ops of the kernel table as CUDA launches: each takes a workspace and the op's buffers, in device memory.

What an op needs beside its buffers it takes from the workspace: memory that is its own until the launches have
run, small arrays from the host, and the numbers 0, 1, 2 … as positions and rows. Where it rounds activations ("q8"),
products with block formats take Q8 blocks of 32 (quantize_q8.cu); those with plain numbers take activations as they
are. The ops of routed experts are in expert_ops.py.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from moe_cupy.kernels.cuda import launches as to
from moe_cupy.kernels.cuda.choice import product_variant
from moe_cupy.kernels.cuda.launches import CacheRows, Launch, Sight, ceil_div
from moe_cupy.kernels.cuda.sources import BLOCK_FORMATS
from moe_cupy.kernels.matrix import Matrix

Launches = Iterator[Launch]
LaunchesAnd = Generator[Launch, None, Any]  # and what they lead to
MAX_GRID = 65535  # blocks along y and z
MANY_TOKENS = 8  # from here on a matrix is read once for several of them
PREFILL_QUERIES = 8  # from here on several queries share the rows of the cache
SPLIT_ROWS = 256  # rows of the cache that one block of decode attention takes at least
MAX_SPLITS = 32


class Workspace(Protocol):
    """What ops may use of a device; everything happens in the order of one stream."""

    @property
    def act(self) -> str:
        """Whether activations are rounded where they meet block formats ("q8") or not ("f32")."""

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability of the device."""

    def rounding(self, x: Any) -> tuple[Any, bool]:
        """Room for the Q8 blocks of x, uint8 [..., cols / 32, 40], and whether they are there since x was written."""

    def scratch(self, name: str, *shape: int, dtype: Any = np.float32) -> Any:
        """Device memory under this name and shape; holds what was last written."""

    def put(self, name: str, values: np.ndarray) -> Any:
        """``values``, which may change at once, in device memory under this name and shape."""

    def numbers(self, first: int, count: int) -> Any:
        """int32 [count] in device memory: first, first + 1, …"""

    def positions(self, first: int, count: int) -> Any:
        """int32 [count] in device memory: the positions first, first + 1, … of the tokens of this pass."""

    def horizon(self, seen: int, capacity: int) -> int:
        """For how many positions attention is launched, which sees ``seen`` of ``capacity``."""

    def constant(self, name: str, values: np.ndarray) -> Any:
        """``values``, always the same under this name and shape, in device memory."""

    def addresses(self, arrays: Sequence[Any]) -> np.ndarray:
        """uint64 [n]: where arrays begin in device memory."""


# Activations


def taken(work: Workspace, x: Any, kind: str) -> LaunchesAnd:
    """x [..., cols] as a matrix of type ``kind`` takes it: as it is, or its Q8 blocks, made once for all products."""
    if not is_rounded(work, kind) or x.shape[-1] % 32:
        return x
    blocks, are_there = work.rounding(x)
    if not are_there:
        yield to.quantize_q8(blocks, x)
    return blocks


def is_rounded(work: Workspace, kind: str) -> bool:
    """Whether products with matrices of type ``kind`` take Q8 blocks."""
    return work.act == "q8" and kind in BLOCK_FORMATS


# Matrices


def embed(work: Workspace, table: Matrix, ids: Any, out: Any) -> Launches:
    yield to.embed(out, table, ids)


def linear(
    work: Workspace, x: Any, w: Matrix, out: Any, scale: float = 1.0, bias: Any = None, add: bool = False
) -> Launches:
    """A tile of rows and tokens at a time where tokens are many, else a row."""
    given = yield from taken(work, x, w.type)
    if len(x) < MANY_TOKENS:
        yield to.gemv(out, w, given, bias, scale=scale, add=add)
        return
    table, variant = work.put("matrix", work.addresses([w.data])), product_variant(*seen_by(work, given), len(x))
    factor = None if scale == 1.0 else work.constant(f"factor {scale}", np.array([scale], np.float32))
    yield to.gemm(out, table, w, given, scale=factor, bias=bias, add=add, variant=variant)


def seen_by(work: Workspace, given: Any) -> tuple[tuple[int, int], bool]:
    """What the choice of a kernel for a product with ``given`` depends on, beside how many vectors it is."""
    return work.capability, to.is_q8(given)


def linear_add(work: Workspace, x: Any, w: Matrix, out: Any, scale: float = 1.0, bias: Any = None) -> Launches:
    yield from linear(work, x, w, out, scale, bias, add=True)


def linear_heads(work: Workspace, x: Any, w: Matrix, out: Any, scale: Any = 1.0, bias: Any = None) -> Launches:
    one_for_all, given = np.isscalar(scale), (yield from taken(work, x, w.type))
    yield to.gemv(
        out, w, given, bias, heads=x.shape[1], scales=None if one_for_all else scale,
        scale=scale if one_for_all else 1.0,
    )  # fmt: skip


# Rows and elements


def norm(
    work: Workspace, x: Any, weight: Any, epsilon: float, out: Any, bias: Any = None, centred: bool = False
) -> Launches:
    width = x.shape[-1] if weight is None else weight.size
    yield to.rms_norm(out, x, weight, epsilon, bias=bias, kind="layer" if centred else "rms", width=width)


def columns(work: Workspace, x: Any, first: int, out: Any, at: int, count: int) -> Launches:
    (n, width), flat = x.shape, x.reshape(-1)
    for row in range(0, n, MAX_GRID):
        some = min(MAX_GRID, n - row)
        args = (out, flat[first + row * width :], work.numbers(row, some), count, width, out.shape[1], at, 0)
        yield Launch("kv_store", (ceil_div(count, 128), some, 1), 128, args)


def copied(work: Workspace, out: Any, x: Any) -> Launches:
    """out = x, all of it."""
    yield from columns(work, x.reshape(1, -1), 0, out.reshape(1, -1), 0, x.size)


def scale(work: Workspace, x: Any, factor: float) -> Launches:
    yield to.multiply(x, scale=factor)


def add(work: Workspace, x: Any, factor: float, out: Any) -> Launches:
    yield to.add_scaled(out, x, factor)


def clamp(work: Workspace, x: Any, limit: float) -> Launches:
    yield to.clamp(x, limit)


def softcap(work: Workspace, x: Any, limit: float) -> Launches:
    yield to.softcap(x, limit)


def activate(work: Workspace, gate: Any, up: Any, kind: str) -> Launches:
    yield to.activate(gate, gate, up, kind)


def sigmoid_gate(work: Workspace, x: Any, gate: Any) -> Launches:
    yield to.multiply(x, gate, is_gate=True)


# Attention


def rope(work: Workspace, x: Any, cos: Any, sin: Any, style: str, first: int = 0) -> Launches:
    yield to.rope(x, cos, sin, style, offset=first)


def hadamard(work: Workspace, x: Any, count: int) -> Launches:
    yield to.hadamard(x, count)


def kv_store(work: Workspace, cache: Any, new: Any, position: int) -> Launches:
    yield to.kv_store(cache, new, work.positions(position, len(new)))


def attention(
    work: Workspace, q: Any, k: Any, v: Any, n_past: int, scale: float, out: Any, *, window: int = 0,
    chunked: bool = False, sinks: Any = None, temperature: Any = None,
) -> Launches:  # fmt: skip
    (t, heads, _), v_width = q.shape, out.shape[-1]
    if temperature is not None:
        cooled = work.scratch("cooled", *q.shape)
        yield from copied(work, cooled, q)
        yield to.multiply(cooled, temperature)
        q = cooled
    rows, positions = CacheRows(k, v, k.shape[1]), work.positions(n_past, t)
    sight = Sight(scale, 0 if chunked else window, window if chunked else 0, sinks=sinks)
    if t >= PREFILL_QUERIES:
        yield to.attention_prefill(out, q, rows, positions, sight)
        return
    partial = work.scratch("partial", t, heads, splits(work.horizon(n_past + t, len(k))), v_width + 2)
    yield to.attention_decode(partial, q, rows, positions, sight)
    yield to.attention_combine(out, partial, sinks)


def splits(seen: int) -> int:
    """Into how many parts decode attention over ``seen`` positions is divided."""
    return min(MAX_SPLITS, ceil_div(seen, SPLIT_ROWS))


# Recurrence


def convolve(work: Workspace, x: Any, before: Any, kernel: Any, after: Any, out: Any) -> Launches:
    yield to.delta_convolve(out, x, (before, after), kernel)


def delta_gates(work: Workspace, alpha: Any, beta: Any, dt: Any, a: Any, fade: Any, share: Any) -> Launches:
    yield from copied(work, fade, alpha)
    yield from copied(work, share, beta)
    yield to.delta_gates(fade, share, dt, a)


def delta_rule(
    work: Workspace, qkv: Any, fade: Any, share: Any, key_heads: int, epsilon: float, out: Any, *, tiled: bool,
    before: Any, after: Any,
) -> Launches:  # fmt: skip
    yield to.delta_recur(out, qkv, (fade, share), (before, after), key_heads, epsilon=epsilon, tiled=tiled)


# Sampling


def top_k(work: Workspace, logits: Any, values: Any, ids: Any) -> Launches:
    (n_tokens, k), n = ids.shape, logits.shape[1]
    if k == 1:
        yield to.argmax(values, ids, logits)
        return
    parts = to.top_k_parts(n, k)
    shape = n_tokens, parts, k
    some, which = work.scratch("best values", *shape), work.scratch("best ids", *shape, dtype=np.int32)
    yield to.top_k(some, which, logits)
    yield to.top_k(values.reshape(n_tokens, 1, k), ids.reshape(n_tokens, 1, k), some, which)


# Routed experts (and expert_ops.py)


def route(
    work: Workspace, logits: Any, scale: float, renormalise: bool, ids: Any, weights: Any, *, gating: str = "softmax",
    by_logit: bool = False, bias: Any = None, groups: int = 1, groups_used: int = 1,
) -> Launches:  # fmt: skip
    yield to.router(
        ids, weights, logits, bias, gating=gating, select_logits=by_logit, groups=groups, groups_used=groups_used,
        renormalise=renormalise, scale=scale,
    )  # fmt: skip


def combine(work: Workspace, parts: Any, weights: Any, out: Any, add: bool = True) -> Launches:
    if weights is None:
        weights = work.constant("ones", np.ones(parts.shape[:2], np.float32))
    yield to.combine(out, parts, weights, add)
