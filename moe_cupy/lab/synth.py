"""Route-replay models: random weights of a real shape whose routers take recorded routes, in any engine.

Token t of the trace gets id t and an embedding of its own, all orthogonal; router l is solved so that embedding t
ranks the recorded experts first; what attention and experts add to the residual stream is too small to matter. An
engine that decodes ids 0, 1, 2, … then takes the recorded routes. Everything else is as heavy as in a real model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from moe_cupy.lab.trace import RouteTrace
from moe_ref.gguf_write import header, padding, tensor_bytes
from moe_ref.quants import quantize

ALIGNMENT = 32
HEAD = 128  # width of a head
CHOSEN, OTHERS, NOISE = (3.0, 2.0), -3.0, 0.5  # router logits: of the chosen, first to last; of all others
POOL_ELEMENTS = 1 << 21  # of encoded random rows that tensors draw theirs from: encoding all would take hours
# Standard deviations of weights. Inputs are about 1 in size, so that gates are O(1); the last two feed the residual
# stream, through a sum of thousands: together they must stay far below 1.
SPREAD = {"attn_v": 1e-3, "attn_output": 3e-5, "ffn_down_exps": 3e-5}

Tensor = tuple[str, str, tuple[int, ...]]  # name, type, shape in NumPy order


@dataclass(frozen=True, slots=True)
class Plan:
    """The shape of a model to write. Raises ValueError for one that cannot be."""

    tokens: int
    layers: int
    experts: int
    used: int
    hidden: int
    ffn: int
    quant: str

    def __post_init__(self) -> None:
        if self.hidden % HEAD:
            raise ValueError(f"--hidden {self.hidden}: expected a multiple of {HEAD}, the width of a head")
        if not 2 <= self.tokens <= self.hidden:
            raise ValueError(
                f"{self.tokens} tokens: expected 2 to {self.hidden}, the orthogonal directions that --hidden has"
            )

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads, and heads of keys and values."""
        heads = self.hidden // HEAD
        return heads, next(g for g in (4, 2, 1) if heads % g == 0)

    def tensors(self) -> list[Tensor]:
        """Name, type and shape of every tensor, in the order of the file."""
        d, (heads, groups) = self.hidden, self.heads
        listed: list[Tensor] = [
            ("token_embd.weight", "F16", (self.tokens, d)),
            ("output_norm.weight", "F32", (d,)),
            ("output.weight", self.quant, (self.tokens, d)),
        ]
        for layer in range(self.layers):
            block = f"blk.{layer}."
            listed += [(f"{block}{name}.weight", "F32", (d,)) for name in ("attn_norm", "ffn_norm")]
            listed += [(f"{block}{name}.weight", "F32", (HEAD,)) for name in ("attn_q_norm", "attn_k_norm")]
            listed += [
                (f"{block}attn_q.weight", self.quant, (heads * HEAD, d)),
                (f"{block}attn_k.weight", self.quant, (groups * HEAD, d)),
                (f"{block}attn_v.weight", self.quant, (groups * HEAD, d)),
                (f"{block}attn_output.weight", self.quant, (d, heads * HEAD)),
                (f"{block}ffn_gate_inp.weight", "F32", (self.experts, d)),
                (f"{block}ffn_gate_exps.weight", self.quant, (self.experts, self.ffn, d)),
                (f"{block}ffn_up_exps.weight", self.quant, (self.experts, self.ffn, d)),
                (f"{block}ffn_down_exps.weight", self.quant, (self.experts, d, self.ffn)),
            ]
        return listed

    def metadata(self, name: str) -> dict[str, bytes]:
        """Keys of a qwen3moe file with a vocabulary of numbers."""
        heads, groups = self.heads
        values = {
            "block_count": self.layers, "context_length": max(4096, self.tokens), "embedding_length": self.hidden,
            "feed_forward_length": self.ffn, "expert_feed_forward_length": self.ffn, "attention.head_count": heads,
            "attention.head_count_kv": groups, "attention.key_length": HEAD, "attention.value_length": HEAD,
            "rope.freq_base": 1e6, "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": self.experts,
            "expert_used_count": self.used, "vocab_size": self.tokens,
        }  # fmt: skip
        general = {
            "general.architecture": "qwen3moe", "general.name": name, "general.alignment": ALIGNMENT,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [f"<{i}>" for i in range(self.tokens)],
            "tokenizer.ggml.token_type": [1] * self.tokens, "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": self.tokens - 1,
        }  # fmt: skip
        return {key: value_bytes(v) for key, v in general.items()} | {
            f"qwen3moe.{key}": value_bytes(v) for key, v in values.items()
        }


def value_bytes(value: Any) -> bytes:
    """A metadata value as GGUF stores it: whole numbers as uint32 (int32 in arrays), others as float32, text, lists."""
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else 5
        items = b"".join(_text(v) if kind == 8 else struct.pack("<i", v) for v in value)
        return struct.pack("<IIQ", 9, kind, len(value)) + items
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


class Weights:
    """Bytes of the tensors, made when they are written, the same for the same seed."""

    def __init__(self, plan: Plan, trace: RouteTrace, seed: int):
        self.plan, self.trace, self.rng = plan, trace, np.random.default_rng(seed)
        square = self.rng.standard_normal((plan.hidden, plan.tokens), np.float32)
        self.embedding = np.linalg.qr(square)[0].T * np.float32(np.sqrt(plan.hidden))  # [T, D], rms of a row 1
        self._pools: dict[tuple[int, float], np.ndarray] = {}

    def parts(self, name: str, kind: str, shape: tuple[int, ...]) -> Iterator[bytes]:
        """The bytes of a tensor, an expert at a time where it has experts."""
        words = name.split(".")
        if words[-2].endswith("norm"):
            yield np.ones(shape, np.float32).tobytes()
        elif name == "token_embd.weight":
            yield quantize(self.embedding, kind).tobytes()
        elif words[-2] == "ffn_gate_inp":
            yield self.router(int(words[1])).tobytes()
        else:
            spread = SPREAD.get(words[-2], shape[-1] ** -0.5)
            for _ in range(shape[0] if len(shape) == 3 else 1):
                pool = self._pool(shape[-1], spread)
                yield pool[self.rng.integers(0, len(pool), shape[-2])].tobytes()

    def router(self, layer: int) -> np.ndarray:
        """Float32 [E, D] with ``router @ embedding[t]`` highest for the experts of token t, in their order."""
        plan = self.plan
        wanted = OTHERS + NOISE * self.rng.standard_normal((plan.tokens, plan.experts), np.float32)
        ids = self.trace.experts[: plan.tokens, layer].astype(np.int64)  # [T, k]
        np.put_along_axis(wanted, ids, np.linspace(*CHOSEN, plan.used, dtype=np.float32)[None], axis=1)
        return wanted.T @ self.embedding / np.float32(plan.hidden)

    def _pool(self, width: int, spread: float) -> np.ndarray:
        """Encoded rows [n, row bytes] of ``width`` normal weights."""
        if (width, spread) not in self._pools:
            rows = self.rng.standard_normal((max(64, POOL_ELEMENTS // width), width), np.float32) * np.float32(spread)
            self._pools[width, spread] = quantize(rows, self.plan.quant)
        return self._pools[width, spread]


def synthesise(out: IO[bytes], trace: RouteTrace, plan: Plan, seed: int, name: str = "route-replay") -> int:
    """Write the model; returns its bytes. Never holds more than one expert's tensor and the pools.

    Raises FormatError for a quantization that nothing here encodes or that the widths do not fit.
    """
    listed = plan.tensors()
    for tensor, kind, shape in listed:
        if kind == plan.quant:
            quantize(np.zeros((1, shape[-1]), np.float32), kind, tensor)
    written = out.write(header(plan.metadata(name), listed, ALIGNMENT))
    weights = Weights(plan, trace, seed)
    for tensor, kind, shape in listed:
        for part in weights.parts(tensor, kind, shape):
            written += out.write(part)
        written += out.write(padding(tensor_bytes(kind, shape), ALIGNMENT))
    return written
