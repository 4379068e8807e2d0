"""What the file says about the model, and what its architecture implies without saying.

Numbers come from the GGUF metadata under their own names. Quirks that no key records are one row an architecture in
``architectures.py``: code elsewhere asks for the feature, never for the architecture's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_ref.architectures import ARCHITECTURES, LLAMA4_TEMPERATURE, SELECTED, Quirks
from moe_ref.keys import ConfigError, Keys
from moe_ref.layers import Layer, read_layers

__all__ = ["ARCHITECTURES", "ConfigError", "Layer", "ModelConfig", "load_config"]

GATING_FUNCS = {1: "softmax", 2: "sigmoid", 3: SELECTED}  # values of expert_gating_func
UNSUPPORTED = {  # keys of features that nothing here computes, and the values that switch them off
    "attn_logit_softcapping": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.causal": (True,),
    "embedding_length_per_layer_input": (0,),
    "rope.scaling.alpha": (0,),
}


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention: what is cached is one vector [kv_lora_rank] and one rotated key a position."""

    q_lora_rank: int  # 0: queries are projected directly
    kv_lora_rank: int


@dataclass(frozen=True, slots=True)
class Delta:
    """The gated delta net of recurrent layers; widths of key and value heads are equal."""

    conv_kernel: int
    state_size: int  # width of a head
    group_count: int  # key heads
    time_step_rank: int  # value heads

    @property
    def key_width(self) -> int:
        return self.state_size * self.group_count

    @property
    def value_width(self) -> int:
        return self.state_size * self.time_step_rank


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Hyper-parameters of one model; every field is a GGUF key of the same name unless noted."""

    architecture: str
    quirks: Quirks
    layers: tuple[Layer, ...]
    nextn_predict_layers: int  # behind these, and not run: they predict tokens after the next
    embedding_length: int
    context_length: int
    vocab_size: int  # rows of token_embd.weight
    norm_epsilon: float  # attention.layer_norm_rms_epsilon or attention.layer_norm_epsilon
    expert_count: int  # 0 in a dense model
    expert_used_count: int
    expert_group_count: int
    expert_group_used_count: int
    expert_weights_scale: float
    gating: str  # expert_gating_func
    renormalise: bool  # expert_weights_norm
    shared: bool  # there is a shared expert
    mla: Mla | None
    delta: Delta | None
    qk_norm: str  # as in Quirks
    clamp_kqv: float  # 0: none
    temperature: tuple[float, int, float] | None  # of attention: scale, positions a step, offset
    embedding_scale: float
    residual_scale: float
    logit_scale: float  # logits are divided by it
    final_logit_softcapping: float  # 0: none

    block_count = property(lambda self: len(self.layers))  # without the layers that predict further tokens
    is_moe = property(lambda self: any(layer.is_moe for layer in self.layers))
    # The first layer's, which is every layer's in most models.
    head_count = property(lambda self: self.layers[0].head_count)
    head_count_kv = property(lambda self: self.layers[0].head_count_kv)
    key_length = property(lambda self: self.layers[0].key_length)
    value_length = property(lambda self: self.layers[0].value_length)
    attention_scale = property(lambda self: self.layers[0].scale)
    rope_dimension_count = property(lambda self: self.layers[0].rope.n_rot)
    rope_freq_base = property(lambda self: self.layers[0].rope.freq_base)


def load_config(metadata: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    """Read a ModelConfig from GGUF metadata; raises ConfigError naming the key that is wrong or unsupported."""
    architecture, quirks = quirks_of(metadata)
    keys = Keys(metadata, architecture)
    for key, accepted in UNSUPPORTED.items():
        keys.refuse_unless(key, accepted)
    width = keys.number("embedding_length", int)
    experts = _expert_count(keys, quirks)
    layers = read_layers(keys, quirks, width, experts)
    epsilon = "attention.layer_norm_rms_epsilon" if quirks.norm == "rms" else "attention.layer_norm_epsilon"
    return ModelConfig(
        architecture=architecture,
        quirks=quirks,
        layers=layers,
        nextn_predict_layers=keys.number("nextn_predict_layers", int, default=0, least=0),
        embedding_length=width,
        context_length=keys.number("context_length", int),
        vocab_size=vocab_size,
        norm_epsilon=keys.number(epsilon, float, least=0),
        **_routing(keys, quirks, experts, vocab_size, layers),
        mla=_mla(keys) if quirks.mixer == "mla" else None,
        delta=_delta(keys) if quirks.recurrent else None,
        qk_norm="none" if quirks.qk_norm == "unit" and experts == 128 else quirks.qk_norm,  # llama4 Maverick has none
        clamp_kqv=keys.number("attention.clamp_kqv", float, default=0.0, least=0),
        temperature=_temperature(keys, quirks),
        embedding_scale=math.sqrt(width) if quirks.embedding_scale == "root" else _factor(keys, "embedding_scale"),
        residual_scale=_factor(keys, "residual_scale"),
        logit_scale=_factor(keys, "logit_scale"),
        final_logit_softcapping=keys.number("final_logit_softcapping", float, default=quirks.softcap, least=0),
    )


def quirks_of(metadata: Mapping[str, Any]) -> tuple[str, Quirks]:
    """Name and row of the architecture; raises ConfigError for a file that is no model or one of an unknown kind."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ConfigError(f"general.type: {kind!r} is not supported; supported: 'model' (others only go with one)")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ConfigError("general.architecture: missing; this file describes no model")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"general.architecture: {architecture!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return architecture, ARCHITECTURES[architecture]


def _factor(keys: Keys, key: str) -> float:
    """A number by which something is multiplied; absent and 0 both mean: it is not."""
    return keys.number(key, float, default=1.0, least=0) or 1.0


# Experts


def _expert_count(keys: Keys, quirks: Quirks) -> int:
    if quirks.experts == "never":
        return 0
    always = quirks.experts == "always"
    return keys.number("expert_count", int, default=None if always else 0, least=int(always))


def _routing(keys: Keys, quirks: Quirks, experts: int, vocab_size: int, layers: tuple[Layer, ...]) -> dict[str, Any]:
    counts = {"expert_count": experts, "expert_group_count": 1, "expert_group_used_count": 1}
    shared = quirks.shared
    if shared is None:
        names = ("expert_shared_count", "expert_shared_feed_forward_length")
        shared = any(keys.number(name, int, default=0, least=0) for name in names)
    if experts:
        counts |= _groups(keys, experts)
    return counts | {
        "expert_used_count": _used(keys, experts) if experts else 0,
        "expert_weights_scale": _factor(keys, "expert_weights_scale"),
        "gating": _gating(keys, quirks, len(layers), keys.number("vocab_size", int, default=vocab_size, least=0)),
        "renormalise": _renormalise(keys, quirks),
        "shared": bool(shared and experts),
    }


def _used(keys: Keys, experts: int) -> int:
    used: int = keys.number("expert_used_count", int)
    if used > experts:
        raise ConfigError(f"{keys.architecture}.expert_used_count: {used} exceeds expert_count {experts}")
    return used


def _groups(keys: Keys, experts: int) -> dict[str, int]:
    groups = keys.number("expert_group_count", int, default=1, least=0) or 1
    used = keys.number("expert_group_used_count", int, default=0, least=0) if groups > 1 else 1
    if experts % groups or experts // groups < 2 <= groups or not 1 <= used <= max(1, groups - 1):
        raise ConfigError(
            f"{keys.architecture}.expert_group_count: {experts} experts in {groups} groups, {used} of them used "
            "(expert_group_used_count); expected groups of two experts or more, of which one or more are not used"
        )
    return {"expert_group_count": groups, "expert_group_used_count": used}


def _gating(keys: Keys, quirks: Quirks, n_layers: int, vocab_size: int) -> str:
    if quirks.gating is not None:
        return quirks.gating
    default = quirks.default_gating or None
    if quirks.mixer == "mla" and n_layers in (47, 48) and vocab_size == 154880:
        default = "sigmoid"  # GLM-4.7-Flash, whose files lack the key
    return keys.choice("expert_gating_func", {**GATING_FUNCS, **({0: default} if default else {})}, default)


def _renormalise(keys: Keys, quirks: Quirks) -> bool:
    if quirks.renormalise is not None:
        return quirks.renormalise
    return keys.choice("expert_weights_norm", {True: True, False: False}, default=False)


# Mixers


def _mla(keys: Keys) -> Mla:
    return Mla(
        q_lora_rank=keys.number("attention.q_lora_rank", int, default=0, least=0),
        kv_lora_rank=keys.number("attention.kv_lora_rank", int),
    )


def _delta(keys: Keys) -> Delta:
    delta = Delta(
        conv_kernel=keys.number("ssm.conv_kernel", int),
        state_size=keys.number("ssm.state_size", int),
        group_count=keys.number("ssm.group_count", int),
        time_step_rank=keys.number("ssm.time_step_rank", int),
    )
    inner = keys.number("ssm.inner_size", int)
    if delta.time_step_rank % delta.group_count or inner != delta.value_width:
        raise ConfigError(
            f"{keys.architecture}.ssm.inner_size: {inner} is not time_step_rank {delta.time_step_rank} x state_size "
            f"{delta.state_size}, or time_step_rank is not a multiple of group_count {delta.group_count}"
        )
    return delta


def _temperature(keys: Keys, quirks: Quirks) -> tuple[float, int, float] | None:
    """llama4's is fixed; elsewhere two keys, and no offset."""
    if quirks.no_rope_every:
        return LLAMA4_TEMPERATURE
    scale = keys.number("attention.temperature_scale", float, default=0.0, least=0)
    return (scale, keys.number("attention.temperature_length", int), 0.0) if scale else None
