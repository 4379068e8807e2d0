"""What this runtime computes of what the reference can: anything else is refused by name before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moe_ref.config import ConfigError, ModelConfig
from moe_ref.gguf import GGUFFile
from moe_ref.rope import Rope
from moe_ref.tensors import View


def is_plain(rope: Rope | None) -> bool:
    """Rotary positions as they were in training."""
    return rope is not None and (rope.factor, rope.yarn, rope.attn_factor, rope.text_pairs) == (1.0, False, 1.0, ())


def features(c: ModelConfig) -> Iterator[tuple[str, bool]]:
    """(what it is called, whether this model has it) for each feature that is missing here."""
    q, first = c.quirks, c.layers[0]
    yield "attention other than grouped-query", any(layer.mixer != "gqa" for layer in c.layers) or q.output_gate
    yield "sliding or chunked attention windows", any(layer.window for layer in c.layers)
    yield "layers of different shapes", any(replace(layer, index=0) != first for layer in c.layers)
    yield "scaled rotary positions", not is_plain(first.rope)
    yield f"{c.qk_norm} norms of queries and keys", c.qk_norm not in ("none", "head")
    yield "attention sinks", q.sinks
    yield "clamped queries, keys and values", bool(c.clamp_kqv)
    yield "attention temperature", c.temperature is not None
    yield "norms that subtract the mean", q.norm != "rms"
    yield "norms in other places", q.ffn_norm != "ffn_norm" or q.post_norms or q.value_norm
    yield "scaled embeddings, residuals or logits", (c.embedding_scale, c.residual_scale, c.logit_scale) != (1, 1, 1)
    yield "capped logits", bool(c.final_logit_softcapping)
    yield "shared experts", c.shared
    yield f"{c.gating} gating", c.is_moe and c.gating != "softmax"
    yield "expert groups", c.expert_group_count > 1
    yield f"{q.activation} experts", q.activation != "silu" or q.weigh != "output" or q.dense_beside


def check_runs(c: ModelConfig, file: GGUFFile, views: Mapping[str, View]) -> None:
    """Raise ConfigError naming the first thing in the model that needs moe_ref."""
    missing = [name for name, has in features(c) if has]
    missing += [f"{name} (a tensor this runtime has no use for)" for name in views if _is_unused(name)]
    parts = [view.stored.name for view in views.values() if view.shape != view.stored.shape]
    missing += [f"{name} (matrices stored as one)" for name in parts]
    if missing:
        raise ConfigError(
            f"{file.path}: {c.architecture}: the runtime does not compute {missing[0]} yet; "
            f"the reference does: python -m moe_ref generate {file.path} -p TEXT"
        )


def _is_unused(name: str) -> bool:
    return name.endswith((".bias", ".scale", "layer_output_scale.weight")) or name.startswith("rope_f")
