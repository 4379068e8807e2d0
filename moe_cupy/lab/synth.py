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
from moe_cupy.plan.mixes import types_of
from moe_cupy.plan.shapes import facts_of
from moe_cupy.plan.tables import table
from moe_ref.config import load_config
from moe_ref.gguf_write import header, padding, tensor_bytes
from moe_ref.quants import quantize

ARCHITECTURE, EMBEDDING = "qwen3moe", "token_embd.weight"
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
    """The shape of a model to write. Raises ValueError for one that cannot be.

    ``quant`` is a mix of llama-quantize, such as Q4_K_M or Q8_0, or, where no mix is called so (Q4_K), the type of all
    matrices but the routers, in F32, and the embedding, in F16.
    """

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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, in the order of the file."""
        d, (heads, groups) = self.hidden, self.heads
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.tokens, d), "output_norm.weight": (d,), "output.weight": (self.tokens, d),
        }  # fmt: skip
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (d,), "ffn_norm": (d,), "attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,),
            "attn_q": (heads * HEAD, d), "attn_k": (groups * HEAD, d), "attn_v": (groups * HEAD, d),
            "attn_output": (d, heads * HEAD), "ffn_gate_inp": (self.experts, d),
            "ffn_gate_exps": (self.experts, self.ffn, d), "ffn_up_exps": (self.experts, self.ffn, d),
            "ffn_down_exps": (self.experts, d, self.ffn),
        }  # fmt: skip
        for layer in range(self.layers):
            shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        return shapes

    def tensors(self) -> list[Tensor]:
        """Name, type and shape of every tensor, in the order of the file."""
        shapes, is_mix = self.shapes(), self.quant in table("mixes")
        config = load_config(self.keys() | {"general.architecture": ARCHITECTURE}, self.tokens)
        types = types_of(shapes, self.quant if is_mix else "F16", facts_of(config, shapes))
        own = {name for name, kind in types.items() if kind == "F16" and name != EMBEDDING and not is_mix}
        return [(name, self.quant if name in own else types[name], shape) for name, shape in shapes.items()]

    def keys(self) -> dict[str, Any]:
        """Metadata that describes the shape."""
        heads, groups = self.heads
        values = {
            "block_count": self.layers, "context_length": max(4096, self.tokens), "embedding_length": self.hidden,
            "feed_forward_length": self.ffn, "expert_feed_forward_length": self.ffn, "attention.head_count": heads,
            "attention.head_count_kv": groups, "attention.key_length": HEAD, "attention.value_length": HEAD,
            "rope.freq_base": 1e6, "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": self.experts,
            "expert_used_count": self.used, "vocab_size": self.tokens,
        }  # fmt: skip
        return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}

    def metadata(self, name: str) -> dict[str, bytes]:
        """Keys of a file with a vocabulary of numbers, encoded."""
        general = {
            "general.architecture": ARCHITECTURE, "general.name": name, "general.alignment": ALIGNMENT,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [f"<{i}>" for i in range(self.tokens)],
            "tokenizer.ggml.token_type": [1] * self.tokens, "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": self.tokens - 1,
        }  # fmt: skip
        return {key: value_bytes(value) for key, value in (general | self.keys()).items()}


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
        self._pools: dict[tuple[str, int, float], np.ndarray] = {}

    def parts(self, name: str, kind: str, shape: tuple[int, ...]) -> Iterator[bytes]:
        """The bytes of a tensor, an expert at a time where it has experts."""
        words = name.split(".")
        if words[-2].endswith("norm"):
            yield np.ones(shape, np.float32).tobytes()
        elif name == EMBEDDING:
            yield quantize(self.embedding, kind).tobytes()
        elif words[-2] == "ffn_gate_inp":
            yield self.router(int(words[1])).tobytes()
        else:
            spread = SPREAD.get(words[-2], shape[-1] ** -0.5)
            for _ in range(shape[0] if len(shape) == 3 else 1):
                pool = self._pool(kind, shape[-1], spread)
                yield pool[self.rng.integers(0, len(pool), shape[-2])].tobytes()

    def router(self, layer: int) -> np.ndarray:
        """Float32 [E, D] with ``router @ embedding[t]`` highest for the experts of token t, in their order."""
        plan = self.plan
        wanted = OTHERS + NOISE * self.rng.standard_normal((plan.tokens, plan.experts), np.float32)
        ids = self.trace.experts[: plan.tokens, layer].astype(np.int64)  # [T, k]
        np.put_along_axis(wanted, ids, np.linspace(*CHOSEN, plan.used, dtype=np.float32)[None], axis=1)
        return wanted.T @ self.embedding / np.float32(plan.hidden)

    def _pool(self, kind: str, width: int, spread: float) -> np.ndarray:
        """Encoded rows [n, row bytes] of ``width`` normal weights."""
        if (kind, width, spread) not in self._pools:
            rows = self.rng.standard_normal((max(64, POOL_ELEMENTS // width), width), np.float32) * np.float32(spread)
            self._pools[kind, width, spread] = quantize(rows, kind)
        return self._pools[kind, width, spread]


def synthesise(out: IO[bytes], trace: RouteTrace, plan: Plan, seed: int, name: str = "route-replay") -> int:
    """Write the model; returns its bytes. Never holds more than one expert's tensor and the pools.

    Raises FormatError for a quantization that nothing here encodes or that the widths do not fit.
    """
    listed = plan.tensors()
    for tensor, kind, shape in listed:
        if kind != "F32":
            quantize(np.zeros((1, shape[-1]), np.float32), kind, tensor)
    written = out.write(header(plan.metadata(name), listed, ALIGNMENT))
    weights = Weights(plan, trace, seed)
    for tensor, kind, shape in listed:
        for part in weights.parts(tensor, kind, shape):
            written += out.write(part)
        written += out.write(padding(tensor_bytes(kind, shape), ALIGNMENT))
    return written
