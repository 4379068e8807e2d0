"""What the file says about the model, and what its architecture implies without saying.

Numbers come from the GGUF metadata under their own names. Quirks that no key records (which rotary
pairing, which norms, whether router weights are renormalised) are one row an architecture in
``ARCHITECTURES``: code elsewhere asks for the feature, never for the architecture's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """Metadata that is missing, contradictory, or asks for something not supported; names the key."""


@dataclass(frozen=True, slots=True)
class Quirks:
    """Facts about an architecture that its GGUF files do not carry (source: llama.cpp's graph for it)."""

    rope: str  # "neox": pairs (i, i + n_rot/2); "norm": pairs (2i, 2i + 1)
    qk_norm: str  # "head": RMS norm over each query and key head; "none"
    moe: bool  # the FFN is routed experts
    gating: str = "softmax"  # router logits -> probabilities
    renormalise: bool = True  # selected weights are divided by their sum


GATING_FUNCS = {"softmax": 1}  # values of expert_gating_func

ARCHITECTURES: dict[str, Quirks] = {
    "qwen3": Quirks(rope="neox", qk_norm="head", moe=False),
    "qwen3moe": Quirks(rope="neox", qk_norm="head", moe=True),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Hyper-parameters of one model; every field is a GGUF key of the same name unless noted."""

    architecture: str
    quirks: Quirks
    block_count: int
    embedding_length: int
    context_length: int
    vocab_size: int  # rows of token_embd.weight
    head_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    rope_dimension_count: int
    rope_freq_base: float
    layer_norm_rms_epsilon: float
    expert_count: int  # 0 in a dense model
    expert_used_count: int
    expert_weights_scale: float

    @property
    def attention_scale(self) -> float:
        """Factor on q.k: one over the square root of the key length."""
        return self.key_length**-0.5


class _Keys:
    """Typed reads of ``{arch}.*`` keys; every complaint names the whole key."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self.metadata, self.architecture = metadata, architecture

    def number(self, key: str, kind: type, default: Any = None, least: float = 1) -> Any:
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise ConfigError(f"{name}: missing, and {self.architecture} cannot run without it")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name}: expected one number, found {type(value).__name__}")
        if not least <= value < 2**40:  # false for NaN too
            raise ConfigError(f"{name}: {value} is out of range (at least {least})")
        if kind is int and value != int(value):
            raise ConfigError(f"{name}: expected a whole number, found {value}")
        return kind(value)

    def refuse_unless(self, key: str, accepted: tuple[Any, ...]) -> None:
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, accepted[0])
        if value not in accepted:
            raise ConfigError(f"{name}: {value!r} is not supported; supported: {', '.join(map(repr, accepted))}")


def _quirks(metadata: Mapping[str, Any]) -> tuple[str, Quirks]:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ConfigError("general.architecture: missing; this file describes no model")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"general.architecture: {architecture!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return architecture, ARCHITECTURES[architecture]


def _check(config: ModelConfig) -> ModelConfig:
    arch = config.architecture
    if config.head_count % config.head_count_kv:
        raise ConfigError(
            f"{arch}.attention.head_count: {config.head_count} is not a multiple of "
            f"attention.head_count_kv {config.head_count_kv}"
        )
    if config.rope_dimension_count % 2 or config.rope_dimension_count > config.key_length:
        raise ConfigError(
            f"{arch}.rope.dimension_count: {config.rope_dimension_count} must be even and at most "
            f"attention.key_length {config.key_length}"
        )
    if config.expert_used_count > config.expert_count:
        raise ConfigError(
            f"{arch}.expert_used_count: {config.expert_used_count} exceeds expert_count {config.expert_count}"
        )
    return config


def load_config(metadata: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    """Read a ModelConfig from GGUF metadata; raises ConfigError naming the key that is wrong or unsupported."""
    architecture, quirks = _quirks(metadata)
    keys = _Keys(metadata, architecture)
    keys.refuse_unless("rope.scaling.type", ("none",))
    keys.refuse_unless("rope.scaling.factor", (1, 0))
    keys.refuse_unless("rope.scale_linear", (1, 0))
    keys.refuse_unless("attention.sliding_window", (0,))
    keys.refuse_unless("expert_gating_func", (GATING_FUNCS[quirks.gating], 0))
    keys.refuse_unless("expert_weights_norm", (quirks.renormalise,))
    heads = keys.number("attention.head_count", int)
    width = keys.number("embedding_length", int)
    key_length = keys.number("attention.key_length", int, default=width // heads)
    scale = keys.number("expert_weights_scale", float, default=1.0, least=0)
    return _check(
        ModelConfig(
            architecture=architecture,
            quirks=quirks,
            block_count=keys.number("block_count", int),
            embedding_length=width,
            context_length=keys.number("context_length", int),
            vocab_size=vocab_size,
            head_count=heads,
            head_count_kv=keys.number("attention.head_count_kv", int, default=heads),
            key_length=key_length,
            value_length=keys.number("attention.value_length", int, default=width // heads),
            rope_dimension_count=keys.number("rope.dimension_count", int, default=key_length),
            rope_freq_base=keys.number("rope.freq_base", float, default=10000.0, least=1e-3),
            layer_norm_rms_epsilon=keys.number("attention.layer_norm_rms_epsilon", float, least=0),
            expert_count=keys.number("expert_count", int) if quirks.moe else 0,
            expert_used_count=keys.number("expert_used_count", int) if quirks.moe else 0,
            expert_weights_scale=scale or 1.0,
        )
    )
