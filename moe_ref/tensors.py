"""Which tensors a model of some configuration must have, and of what shape: files are refused early."""

from __future__ import annotations

from moe_ref.config import ConfigError, ModelConfig
from moe_ref.gguf import GGUFFile
from moe_ref.quants import FORMATS, unsupported

Shapes = dict[str, tuple[int, ...]]


def attention_shapes(c: ModelConfig, block: str) -> Shapes:
    """Tensors of one layer's attention; ``block`` is "blk.N."."""
    width = c.embedding_length
    shapes: Shapes = {
        block + "attn_norm.weight": (width,),
        block + "attn_q.weight": (c.head_count * c.key_length, width),
        block + "attn_k.weight": (c.head_count_kv * c.key_length, width),
        block + "attn_v.weight": (c.head_count_kv * c.value_length, width),
        block + "attn_output.weight": (width, c.head_count * c.value_length),
    }
    if c.quirks.qk_norm == "head":
        shapes[block + "attn_q_norm.weight"] = shapes[block + "attn_k_norm.weight"] = (c.key_length,)
    return shapes


def ffn_shapes(c: ModelConfig, block: str, inner: int) -> Shapes:
    """Tensors of one layer's feed-forward network of inner width ``inner``, dense or routed."""
    width, experts = c.embedding_length, (c.expert_count,) if c.quirks.moe else ()
    kind = "_exps" if c.quirks.moe else ""
    shapes: Shapes = {
        block + "ffn_norm.weight": (width,),
        block + f"ffn_gate{kind}.weight": (*experts, inner, width),
        block + f"ffn_up{kind}.weight": (*experts, inner, width),
        block + f"ffn_down{kind}.weight": (*experts, width, inner),
    }
    if c.quirks.moe:
        shapes[block + "ffn_gate_inp.weight"] = (c.expert_count, width)
    return shapes


def inner_width(c: ModelConfig, file: GGUFFile, block: str) -> int:
    """Inner width F of a layer's FFN, read off its gate tensor (files disagree on which key holds it)."""
    name = block + ("ffn_gate_exps.weight" if c.quirks.moe else "ffn_gate.weight")
    if name not in file.tensors or len(file.tensors[name].shape) < 2:
        raise ConfigError(f"{name}: missing from {file.path}, or not a matrix")
    return file.tensors[name].shape[-2]


def expected_shapes(c: ModelConfig, file: GGUFFile) -> Shapes:
    """Every tensor this model needs; ``output.weight`` only if the file has one (otherwise it is tied)."""
    shapes: Shapes = {
        "token_embd.weight": (c.vocab_size, c.embedding_length),
        "output_norm.weight": (c.embedding_length,),
    }
    if "output.weight" in file.tensors:
        shapes["output.weight"] = (c.vocab_size, c.embedding_length)
    for layer in range(c.block_count):
        block = f"blk.{layer}."
        shapes |= attention_shapes(c, block) | ffn_shapes(c, block, inner_width(c, file, block))
    return shapes


def check_tensors(c: ModelConfig, file: GGUFFile) -> None:
    """Raise ConfigError or FormatError for the first tensor that is missing, misshapen, or of an unknown type."""
    if c.block_count > len(file.tensors):
        raise ConfigError(f"{c.architecture}.block_count: {c.block_count} layers, but only {len(file.tensors)} tensors")
    shapes = expected_shapes(c, file)
    for name, shape in shapes.items():
        info = file.tensors.get(name)
        if info is None:
            raise ConfigError(f"{name}: missing from {file.path}")
        if info.shape != shape:
            raise ConfigError(f"{name}: shape {list(info.shape)}, but the metadata says {list(shape)}")
        if info.type not in FORMATS:
            raise unsupported(name, info.type)
    for name in file.tensors:
        if name not in shapes:
            raise ConfigError(f"{name}: {c.architecture} has no use for this tensor; leaving it out would be a guess")


def vocab_rows(file: GGUFFile) -> int:
    """Rows of the embedding matrix, the one place where a file states its true vocabulary size.

    Raises ConfigError for one part of a split file, which has it or not by chance.
    """
    if file.get("split.count", 1) not in (0, 1):
        raise ConfigError("split.count: this is one part of a split GGUF; merge it first (llama-gguf-split --merge)")
    info = file.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise ConfigError(f"token_embd.weight: missing from {file.path}, or not a matrix")
    return info.shape[0]
