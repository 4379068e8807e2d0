"""What an architecture implies and its GGUF files do not say: one row each; no other file branches on a name.

Two columns decide most of a MoE's character. DeepSeek routes by ``gating`` from the file's key (sigmoid in V3, softmax
in V2), a bias that steers selection only, groups, ``renormalise`` from the file; Qwen3 by softmax, top-k, renormalise.
Source of each row: llama.cpp's loader and graph for it (``src/models/<name>.cpp``, version 0.5.0-dev).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT = 1.702, 7.0
LLAMA4_CHUNK = 8192  # positions; llama.cpp fixes it, whatever the file says
LLAMA4_TEMPERATURE = (0.1, 8192, 1.0)  # scale, positions a step, offset
SELECTED = "softmax over the selected"


@dataclass(frozen=True, slots=True)
class Quirks:
    """One architecture. ``None`` where the file's own key decides."""

    # Attention
    mixer: str = "gqa"  # "mla": keys and values are rebuilt from one small vector a position
    rope: str = "neox"  # pairs (i, i + n_rot/2); "norm": pairs (2i, 2i + 1)
    part_rope: bool = False  # llama.cpp runs files in which only a part of each head is rotated
    rope_sections: str = ""  # "interleaved", "blocks": of rope.dimension_sections; which pairs follow the text position
    rope_factors: tuple[str, ...] = ()  # tensors of divisors of the frequencies that a file may have
    qk_norm: str = "none"  # RMS norm of q and k: "head", "row" (before the split), "unit" (weightless, after RoPE)
    qk_norm_optional: bool = False  # only in files that have its tensors
    no_rope_every: int = 0  # each n-th layer has no rotary positions; its q is scaled by temperature instead
    window: str = "none"  # "sliding", "chunked"
    window_every: int = 0  # each n-th layer sees all positions, where the file gives no pattern
    window_rope: str = "model"  # layers with a window turn by the model's base and factor; "default": 10000 and 1
    sinks: bool = False  # a learned logit per head that takes part in the softmax and carries no value
    attention_scale: float = 0.0  # 0: the file's key, else one over the root of the key length
    value_norm: bool = False  # weightless RMS norm of v
    output_gate: bool = False  # attn_q holds [q, gate] per head; the mixed values are multiplied by sigmoid(gate)
    recurrent: str = ""  # most layers are gated delta nets: v head h has k head h // r ("repeat") or h % n ("tile")

    # Layer
    predicting: bool = False  # files may have layers behind the trunk, which predict tokens after the next
    norm: str = "rms"  # "layer": the mean is subtracted too
    ffn_norm: str = "ffn_norm"  # which tensor is the norm before the feed-forward network
    post_norms: bool = False  # each branch is normalised again before it is added
    embedding_scale: str = "key"  # "root": times the root of the width
    softcap: float = 0.0  # of the logits, where the file has no key for it

    # Feed-forward
    experts: str = "always"  # "never"; "optional": if expert_count is there
    shared: bool | None = False  # an expert that every token uses; None: if the keys count one
    shared_gate: bool = False  # its output times sigmoid(ffn_gate_inp_shexp . x)
    dense_beside: bool = False  # a dense network in parallel to the experts, each with its own norms
    activation: str = "silu"  # "gelu", "swiglu_oai" (clamped)
    gating: str | None = "softmax"  # "sigmoid", SELECTED
    default_gating: str = "softmax"  # where the key is absent; "" makes it required
    renormalise: bool | None = True  # weights of the selected are divided by their sum
    select_by: str = "probability"  # "logit"
    weigh: str = "output"  # "input": the weight multiplies what goes into the expert


_QWEN_HYBRID: dict[str, Any] = dict(
    part_rope=True, qk_norm="head", output_gate=True, predicting=True, ffn_norm="post_attention_norm", shared=True,
    shared_gate=True,
)  # fmt: skip

ARCHITECTURES: dict[str, Quirks] = {
    "llama": Quirks(rope="norm", rope_factors=ROPE_FACTORS, experts="optional", shared=None),
    "llama4": Quirks(
        rope="norm", rope_factors=ROPE_FACTORS[:1], qk_norm="unit", no_rope_every=4, window="chunked", window_every=4,
        shared=True, gating="sigmoid", renormalise=False, select_by="logit", weigh="input",
    ),
    "qwen2moe": Quirks(shared=True, shared_gate=True, renormalise=False),
    "qwen3": Quirks(qk_norm="head", experts="never"),
    "qwen3moe": Quirks(qk_norm="head"),
    "qwen3next": Quirks(recurrent="repeat", **_QWEN_HYBRID),
    "qwen35moe": Quirks(recurrent="tile", rope_sections="interleaved", **_QWEN_HYBRID),
    "olmoe": Quirks(qk_norm="row", renormalise=False),
    "deepseek": Quirks(rope="norm", rope_factors=ROPE_FACTORS[:1], shared=True, renormalise=False),
    "deepseek2": Quirks(
        mixer="mla", rope="norm", part_rope=True, predicting=True, shared=True, gating=None, renormalise=None
    ),
    "glm4moe": Quirks(
        part_rope=True, rope_sections="blocks", qk_norm="head", qk_norm_optional=True, predicting=True,
        ffn_norm="post_attention_norm", shared=None, gating=None, default_gating="sigmoid", renormalise=None,
    ),
    "gpt-oss": Quirks(
        window="sliding", window_every=2, sinks=True, ffn_norm="post_attention_norm", activation="swiglu_oai",
        gating=SELECTED, renormalise=False,
    ),
    "granitemoe": Quirks(rope="norm", rope_factors=ROPE_FACTORS, experts="optional", shared=None),
    "phimoe": Quirks(part_rope=True, rope_factors=ROPE_FACTORS[1:]),
    "minimax-m2": Quirks(part_rope=True, qk_norm="row", gating=None, default_gating=""),
    "ernie4_5-moe": Quirks(rope="norm", shared=None),
    "dbrx": Quirks(norm="layer", ffn_norm="attn_output_norm"),
    "gemma4": Quirks(
        part_rope=True, rope_factors=ROPE_FACTORS[:1], qk_norm="head", window="sliding", window_rope="default",
        attention_scale=1.0, value_norm=True, post_norms=True, embedding_scale="root", softcap=30.0, experts="optional",
        dense_beside=True, activation="gelu",
    ),
}  # fmt: skip

# Keys that llama.cpp reads for these architectures alone: in a file of another one they have no effect.
READ_BY: dict[str, tuple[str, ...]] = {
    "attention.clamp_kqv": ("dbrx",),
    "attention.scale": ("granitemoe",),
    "attention.sliding_window": ("gemma4", "gpt-oss", "llama4"),
    "attention.temperature_length": ("deepseek2",),
    "attention.temperature_scale": ("deepseek2",),
    "embedding_scale": ("granitemoe",),
    "expert_gating_func": ("deepseek2", "glm4moe", "minimax-m2"),
    "expert_weights_norm": ("deepseek2", "glm4moe"),
    "expert_weights_scale": ("deepseek", "deepseek2", "glm4moe"),
    "final_logit_softcapping": ("gemma4",),
    "interleave_moe_layer_step": ("ernie4_5-moe", "llama4"),
    "leading_dense_block_count": ("deepseek", "deepseek2", "ernie4_5-moe", "glm4moe"),
    "logit_scale": ("granitemoe",),
    "residual_scale": ("granitemoe",),
    "rope.freq_base_swa": ("gemma4", "gpt-oss", "llama4"),
    "rope.scaling.yarn_log_multiplier": ("deepseek2",),
}

# Keys without which llama.cpp loads no file of these architectures, where no other file shows their value.
REQUIRED: dict[str, tuple[str, ...]] = {
    "attention.clamp_kqv": ("dbrx",),
    "interleave_moe_layer_step": ("ernie4_5-moe", "llama4"),
    "logit_scale": ("granitemoe",),
    "rope.dimension_sections": ("qwen35moe",),
}

# Keys of inner widths, and the architectures that llama.cpp does not read them for: the tensors alone say it there.
UNREAD_WIDTHS: dict[str, tuple[str, ...]] = {
    "expert_feed_forward_length": ("dbrx", "granitemoe", "llama", "olmoe", "phimoe"),
    "expert_shared_feed_forward_length": ("deepseek", "deepseek2", "glm4moe", "llama", "llama4"),
}
