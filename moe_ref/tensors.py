"""Which tensors a model of some configuration has, and of what shape: files are refused early, by name.

Some files hold several matrices in one tensor (attn_qkv, ffn_gate_up_exps): ``views`` gives each matrix its usual
name, so that the model never knows.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from math import prod

from moe_ref.architectures import UNREAD_WIDTHS
from moe_ref.config import ConfigError, ModelConfig, quirks_of
from moe_ref.gguf import GGUFFile, TensorInfo
from moe_ref.layers import Layer
from moe_ref.quants import FORMATS, unsupported

Shape = tuple[int, ...]
Shapes = dict[str, Shape]  # a name that ends in "?" may be missing


@dataclass(frozen=True, slots=True)
class View:
    """Rows ``first``.. of a stored tensor (of each expert's matrix, if it holds several) under a name of their own."""

    stored: TensorInfo
    shape: Shape
    first: int = 0

    def segment(self, index: int | None = None) -> tuple[int, int]:
        """Where in the stored tensor all of this lies, or slice ``index`` of its first axis: first byte and count.

        As a whole, a view of a part of each expert's matrix has no such place: its slices lie apart.
        """
        stored, shape = self.stored, self.shape if index is None else self.shape[1:]
        unit = stored.nbytes // (stored.shape[0] if len(stored.shape) < 3 else prod(stored.shape[:-1]))  # a row
        start = (index or 0) * (stored.nbytes // stored.shape[0]) + self.first * unit
        return start, stored.nbytes * prod(shape) // prod(stored.shape)


# What each part of a layer has. ``block`` is "blk.N.", ``names`` the tensors there are.


def gqa_shapes(c: ModelConfig, layer: Layer, block: str, names: Container[str]) -> Shapes:
    """Grouped-query attention. Without a matrix of their own, gemma4's values are the keys before their norm."""
    width, q = c.embedding_length, c.quirks
    rows_q, rows_k = layer.head_count * layer.key_length, layer.head_count_kv * layer.key_length
    shapes: Shapes = {
        block + "attn_q.weight": (rows_q * (2 if q.output_gate else 1), width),
        block + "attn_k.weight": (rows_k, width),
        block + "attn_v.weight" + "?" * q.value_norm: (layer.head_count_kv * layer.value_length, width),
        block + "attn_output.weight": (width, layer.head_count * layer.value_length),
    }
    if q.qk_norm in ("head", "row"):
        end, whole = ".weight" + "?" * q.qk_norm_optional, q.qk_norm == "row"
        shapes[block + "attn_q_norm" + end] = (rows_q if whole else layer.key_length,)
        shapes[block + "attn_k_norm" + end] = (rows_k if whole else layer.key_length,)
    if q.sinks:
        shapes[block + "attn_sinks.weight"] = (layer.head_count,)
    return shapes


def mla_shapes(c: ModelConfig, layer: Layer, block: str, names: Container[str]) -> Shapes:
    """Multi-head latent attention; old files hold ``attn_kv_b`` where new ones hold ``attn_k_b`` and ``attn_v_b``."""
    assert c.mla is not None and layer.rope is not None
    width, rank, q_rank, heads = c.embedding_length, c.mla.kv_lora_rank, c.mla.q_lora_rank, layer.head_count
    plain = layer.key_length - layer.rope.n_rot
    shapes: Shapes = {
        block + "attn_kv_a_mqa.weight": (rank + layer.rope.n_rot, width),
        block + "attn_kv_a_norm.weight": (rank,),
        block + "attn_output.weight": (width, heads * layer.value_length),
    }
    if q_rank and block + "attn_q.weight" not in names:
        shapes[block + "attn_q_a.weight"] = (q_rank, width)
        shapes[block + "attn_q_a_norm.weight"] = (q_rank,)
        shapes[block + "attn_q_b.weight"] = (heads * layer.key_length, q_rank)
    else:
        shapes[block + "attn_q.weight"] = (heads * layer.key_length, width)
    if block + "attn_kv_b.weight" in names:
        shapes[block + "attn_kv_b.weight"] = (heads * (plain + layer.value_length), rank)
    else:
        shapes[block + "attn_k_b.weight"] = (heads, rank, plain)
        shapes[block + "attn_v_b.weight"] = (heads, layer.value_length, rank)
    return shapes


def delta_shapes(c: ModelConfig, layer: Layer, block: str, names: Container[str]) -> Shapes:
    """A gated delta net; qwen3next interleaves alpha and beta (ssm_ba), and in old files q, k, v and z (ssm_in)."""
    assert c.delta is not None
    d, width = c.delta, c.embedding_length
    channels, heads = 2 * d.key_width + d.value_width, d.time_step_rank
    shapes: Shapes = {
        block + "ssm_conv1d.weight": (channels, d.conv_kernel),
        block + "ssm_dt.bias": (heads,),
        block + "ssm_a": (heads,),
        block + "ssm_norm.weight": (d.state_size,),
        block + "ssm_out.weight": (width, d.value_width),
    }
    if block + "ssm_in.weight" in names:
        shapes[block + "ssm_in.weight"] = (channels + d.value_width, width)
    else:
        shapes[block + "attn_qkv.weight"] = (channels, width)
        shapes[block + "attn_gate.weight"] = (d.value_width, width)
    if c.quirks.recurrent == "repeat":
        shapes[block + "ssm_ba.weight"] = (2 * heads, width)
    else:
        shapes[block + "ssm_alpha.weight"] = shapes[block + "ssm_beta.weight"] = (heads, width)
    return shapes


def network_shapes(c: ModelConfig, block: str, kind: str, inner: int, experts: tuple[int, ...] = ()) -> Shapes:
    """A gated feed-forward network of inner width ``inner``; ``kind`` is "", "_exps" or "_shexp"."""
    width = c.embedding_length
    return {
        block + f"ffn_gate{kind}.weight": (*experts, inner, width),
        block + f"ffn_up{kind}.weight": (*experts, inner, width),
        block + f"ffn_down{kind}.weight": (*experts, width, inner),
    }


def ffn_shapes(c: ModelConfig, layer: Layer, block: str, file: GGUFFile) -> Shapes:
    """The feed-forward part of a layer: a dense network, or a router, experts and what stands beside them."""
    if not layer.is_moe:
        return network_shapes(c, block, "", inner_width(file, block + "ffn_up"))
    shapes: Shapes = {
        block + "ffn_gate_inp.weight": (c.expert_count, c.embedding_length),
        block + "exp_probs_b.bias?": (c.expert_count,),
        **network_shapes(c, block, "_exps", inner_width(file, block + "ffn_down_exps", -1), (c.expert_count,)),
    }
    if c.shared:
        shapes |= network_shapes(c, block, "_shexp", inner_width(file, block + "ffn_up_shexp"))
    if c.quirks.shared_gate:
        shapes[block + "ffn_gate_inp_shexp.weight"] = (1, c.embedding_length)
    if c.quirks.dense_beside:
        shapes |= network_shapes(c, block, "", inner_width(file, block + "ffn_up"))
        shapes |= dict.fromkeys((block + f"{name}.weight" for name in BESIDE_NORMS), (c.embedding_length,))
        shapes[block + "ffn_gate_inp.scale"] = (c.embedding_length,)
    return shapes


WIDTHS = (  # matrix, the axis that is the inner width, and the key that may say it too
    ("up", -2, "feed_forward_length"),
    ("down_exps", -1, "expert_feed_forward_length"),
    ("up_shexp", -2, "expert_shared_feed_forward_length"),
)
BESIDE_NORMS = ("post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2")
MIXER_SHAPES = {"gqa": gqa_shapes, "mla": mla_shapes, "delta": delta_shapes}


def layer_shapes(c: ModelConfig, layer: Layer, file: GGUFFile) -> Shapes:
    """All tensors of one layer; any matrix may have a bias and a scale for its result."""
    block = f"blk.{layer.index}."
    norms = ["attn_norm", c.quirks.ffn_norm]
    if c.quirks.post_norms:
        norms += ["post_attention_norm", "post_ffw_norm"]
    shapes: Shapes = dict.fromkeys((block + f"{name}.weight" for name in norms), (c.embedding_length,))
    shapes |= MIXER_SHAPES[layer.mixer](c, layer, block, file.tensors) | ffn_shapes(c, layer, block, file)
    shapes[block + "layer_output_scale.weight?"] = (1,)
    biases = _with_biases(shapes)
    if c.quirks.dense_beside:  # its router's scale is of another kind, and a bias has no place in its sum
        biases.pop(block + "ffn_gate_inp.bias?", None)  # a dense layer has no router
    return biases | shapes


def _with_biases(shapes: Shapes) -> Shapes:
    extra: Shapes = {}
    for name, shape in shapes.items():
        stem = name.removesuffix("?").removesuffix(".weight")
        if len(shape) > 1:
            extra[stem + ".scale?"] = shape[:-2] or (1,)
        extra[stem + ".bias?"] = shape if len(shape) == 1 else shape[:-1]
    return {name: shape for name, shape in extra.items() if name[:-1] not in shapes}


def inner_width(file: GGUFFile, stem: str, axis: int = -2) -> int:
    """Inner width F of a feed-forward network, read off its matrix (files disagree on which key holds it)."""
    info = file.tensors.get(stem + ".weight")
    if info is None or len(info.shape) < 2:
        raise ConfigError(f"{stem}.weight: missing from {file.path}, or not a matrix")
    return info.shape[axis]


def check_widths(c: ModelConfig, file: GGUFFile) -> None:
    """Raise ConfigError where a key that llama.cpp reads says another inner width than the matrix."""
    for part, axis, key in WIDTHS:
        said = None if c.architecture in UNREAD_WIDTHS.get(key, ()) else file.get(f"{c.architecture}.{key}")
        for layer in c.layers if said else ():
            name = f"blk.{layer.index}.ffn_{part}.weight"
            width = file.tensors[name].shape[axis] if name in file.tensors else None
            one = said[layer.index] if isinstance(said, Sequence) and layer.index < len(said) else said
            if one and width and one != width:
                raise ConfigError(f"{c.architecture}.{key}: {one}, but by {name} the width is {width}")


def expected_shapes(c: ModelConfig, file: GGUFFile) -> Shapes:
    """Every tensor this model may have; without ``output.weight`` the embedding matrix is the output head too."""
    width = c.embedding_length
    shapes: Shapes = {"token_embd.weight": (c.vocab_size, width), "output_norm.weight": (width,)}
    shapes |= {"output_norm.bias?": (width,), "output.weight?": (c.vocab_size, width), "output.bias?": (c.vocab_size,)}
    full = next((layer.rope for layer in c.layers if layer.rope and not layer.window), c.layers[0].rope)
    if full is not None:
        shapes |= {name + "?": (full.n_rot // 2,) for name in c.quirks.rope_factors}
    for layer in c.layers:
        shapes |= layer_shapes(c, layer, file)
    return shapes


# Matrices stored together


def fused_shapes(shapes: Shapes, names: Container[str]) -> dict[str, tuple[str, ...]]:
    """Stored tensor -> the names of its parts in order, for all that this file stores together."""
    fused = {}
    for name in shapes:
        stem, dot, end = name.removesuffix("?").partition(".attn_k.")
        whole = f"{stem}.attn_qkv.{end}"
        if dot and whole in names and f"{stem}.attn_q.{end}" not in names:
            fused[whole] = tuple(f"{stem}.attn_{part}.{end}" for part in "qkv")
        stem, dot, end = name.removesuffix("?").partition(".ffn_gate_exps.")
        whole = f"{stem}.ffn_gate_up_exps.{end}"
        if dot and end == "weight" and whole in names:
            fused[whole] = (f"{stem}.ffn_gate_exps.{end}", f"{stem}.ffn_up_exps.{end}")
    return fused


def views(shapes: Shapes, file: GGUFFile) -> dict[str, View]:
    """Every tensor of the file that ``shapes`` names, and the parts of those that hold several."""
    found = {name: View(info, info.shape) for name, info in file.tensors.items()}
    for whole, parts in fused_shapes(shapes, file.tensors).items():
        info, first = found.pop(whole).stored, 0
        axis = max(0, len(info.shape) - 2)
        for part in parts:
            shape = shapes[part] if part in shapes else shapes[part + "?"]
            found[part] = View(info, shape, first)
            first += shape[axis]
        if info.shape != (*info.shape[:axis], first, *shape[axis + 1 :]):
            raise ConfigError(f"{whole}: shape {list(info.shape)}, but its parts {', '.join(parts)} have {first} rows")
    return found


def check_tensors(c: ModelConfig, file: GGUFFile) -> dict[str, View]:
    """The tensors of a model by name.

    Raises ConfigError or FormatError for the first that is missing, misshapen, of an unknown type, or of no use.
    """
    check_widths(c, file)
    shapes = expected_shapes(c, file)
    found = views(shapes, file)
    for marked, shape in shapes.items():
        name = marked.removesuffix("?")
        view = found.get(name)
        if view is None and name == marked:
            raise ConfigError(f"{name}: missing from {file.path}")
        if view is None:
            continue
        if _without_ones(view.shape) != _without_ones(shape):
            raise ConfigError(f"{name}: shape {list(view.shape)}, but the metadata says {list(shape)}")
        if view.shape != shape:
            found[name] = View(replace(view.stored, shape=shape), shape)
        if view.stored.type not in FORMATS:
            raise unsupported(name, view.stored.type)
    for name in found:
        if name not in shapes and name + "?" not in shapes and not predicts_further(c, name):
            raise ConfigError(f"{name}: {c.architecture} has no use for this tensor; leaving it out would be a guess")
    return found


def _without_ones(shape: Shape) -> Shape:
    """Leading ones say nothing: GGUF files may have them or not, as in ggml."""
    return _without_ones(shape[1:]) if shape[:1] == (1,) else shape


def predicts_further(c: ModelConfig, name: str) -> bool:
    """Whether a tensor belongs to a layer behind the trunk, which predicts tokens after the next (nextn, MTP)."""
    number = name.removeprefix("blk.").partition(".")[0]
    behind = name.startswith("blk.") and number.isdecimal() and int(number) >= c.block_count
    return c.quirks.predicting and behind and int(number) < c.block_count + c.nextn_predict_layers


def vocab_rows(file: GGUFFile) -> int:
    """Rows of the embedding matrix: the vocabulary size.

    Raises ConfigError for one part of a split file, which has it or not by chance, for what is no known model, and
    where the file has another number of tokens. ``vocab_size`` counts them where there is no list.
    """
    if file.get("split.count", 1) not in (0, 1) and not file.is_whole:
        raise ConfigError("split.count: this is one part of a split GGUF; open its first part, or merge it "
                          "(llama-gguf-split --merge)")  # fmt: skip
    architecture, _ = quirks_of(file.metadata)
    info = file.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise ConfigError(f"token_embd.weight: missing from {file.path}, or not a matrix")
    rows, size = info.shape[0], f"{architecture}.vocab_size"
    key = "tokenizer.ggml.tokens" if "tokenizer.ggml.tokens" in file.metadata else size
    value = file.get(key, rows)
    count = len(value) if isinstance(value, Sequence) else value
    if count != rows:
        raise ConfigError(f"{key}: {count} tokens, but token_embd.weight has {rows} rows")
    if file.get(size, rows) != rows:
        warnings.warn(f"{size}: {file.get(size)!r} has no effect: the file has {rows} tokens", stacklevel=2)
    return rows
