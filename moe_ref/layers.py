"""What each layer of a model is: its kind, its heads, what it sees, and how its positions are rotated."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from moe_ref.architectures import LLAMA4_CHUNK, Quirks
from moe_ref.keys import ConfigError, Keys
from moe_ref.rope import Rope

MAX_LAYERS = 4096
DEFAULT_BASE = 10000.0  # of rope.freq_base
SCALINGS = {name: name for name in ("none", "linear", "yarn", "longrope")}  # values of rope.scaling.type


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer is; most models repeat one kind."""

    index: int
    mixer: str  # "gqa", "mla", "delta"
    is_moe: bool
    head_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    scale: float  # factor on q.k
    rope: Rope | None
    window: int = 0  # positions a query sees, its own included; 0: all
    chunked: bool = False  # the window begins at a multiple of its length instead


def read_layers(keys: Keys, quirks: Quirks, width: int, experts: int) -> tuple[Layer, ...]:
    blocks = keys.number("block_count", int)
    n = blocks - keys.number("nextn_predict_layers", int, default=0, least=0)  # the last ones predict further tokens
    if not 1 <= n <= blocks <= MAX_LAYERS:
        raise ConfigError(f"{keys.architecture}.block_count: {blocks} layers, {n} of them in the trunk; at most 4096")
    heads = keys.per_layer("attention.head_count", blocks)
    heads_kv = keys.per_layer("attention.head_count_kv", blocks, default=heads)
    is_moe = _moe_layers(keys, quirks, n, experts)
    recurrent = _recurrent(keys, quirks, n)
    window, windowed = _windows(keys, quirks, n)
    layers = []
    for i in range(n):
        key, value = _head_widths(keys, quirks, width // heads[i], windowed[i])
        rope = _rope(keys, quirks, key, windowed[i])
        has_rope = not (quirks.no_rope_every and (i + 1) % quirks.no_rope_every == 0)
        layers.append(
            Layer(
                index=i, mixer="delta" if recurrent[i] else quirks.mixer, is_moe=is_moe[i],
                head_count=heads[i], head_count_kv=heads_kv[i], key_length=key, value_length=value,
                scale=_scale(keys, quirks, key, rope), rope=rope if has_rope else None,
                window=window if windowed[i] else 0, chunked=quirks.window == "chunked" and windowed[i],
            )
        )  # fmt: skip
        _check(keys, layers[-1], rope)
    if not quirks.part_rope:
        _warn_of_parts(keys, layers)
    return tuple(layers)


def _moe_layers(keys: Keys, quirks: Quirks, n: int, experts: int) -> list[bool]:
    """Which layers have routed experts: not the leading dense ones, and of the others each ``step``-th."""
    lead = keys.number("leading_dense_block_count", int, default=0, least=0)
    step = keys.number("interleave_moe_layer_step", int, default=1)
    return [bool(experts) and i >= lead and (i + 1) % step == 0 for i in range(n)]


def _recurrent(keys: Keys, quirks: Quirks, n: int) -> list[bool]:
    if not quirks.recurrent:
        return [False] * n
    if (flags := keys.flags("attention.recurrent_layers", n)) is not None:
        return flags
    every = keys.number("full_attention_interval", int, default=4)
    return [(i + 1) % every != 0 for i in range(n)]


def _windows(keys: Keys, quirks: Quirks, n: int) -> tuple[int, list[bool]]:
    """The window's length and which layers have it; pattern m: layer i has it if i % m < m - 1."""
    if quirks.window == "none":
        return 0, [False] * n
    if quirks.window == "chunked":
        if keys.metadata.get(f"{keys.architecture}.attention.sliding_window") == 0:
            raise ConfigError(f"{keys.architecture}.attention.sliding_window: 0 is not supported: leave the key out")
        length = LLAMA4_CHUNK
    else:
        length = keys.number("attention.sliding_window", int)
    windowed = keys.flags("attention.sliding_window_pattern", n)
    if windowed is None:
        every = keys.number("attention.sliding_window_pattern", int, default=quirks.window_every or None, least=0)
        windowed = [every == 0 or i % every < every - 1 for i in range(n)]
    if not any(windowed):
        raise ConfigError(f"{keys.architecture}.attention.sliding_window_pattern: no layer has a window")
    return length, windowed


def _head_widths(keys: Keys, quirks: Quirks, default: int, windowed: bool) -> tuple[int, int]:
    """Widths of a key and of a value head."""
    key = keys.number("attention.key_length", int, default=default)
    value = keys.number("attention.value_length", int, default=default)
    if quirks.mixer == "mla":  # the plain keys count the cached vector where these are there
        return keys.number("attention.key_length_mla", int, key), keys.number("attention.value_length_mla", int, value)
    if windowed:
        key = keys.number("attention.key_length_swa", int, default=key)
        value = keys.number("attention.value_length_swa", int, default=value)
    return key, value


def _rope(keys: Keys, quirks: Quirks, key_length: int, windowed: bool) -> Rope:
    n_rot = keys.number("rope.dimension_count", int, default=key_length)
    base = keys.number("rope.freq_base", float, default=DEFAULT_BASE, least=1e-3)
    kind = keys.choice("rope.scaling.type", SCALINGS, default="linear")
    old = keys.number("rope.scale_linear", float, default=0.0, least=0)
    factor = keys.number("rope.scaling.factor", float, default=old, least=0) or 1.0
    if windowed:  # their factor has no key, and "none" does not switch it off
        base, factor = (DEFAULT_BASE, 1.0) if quirks.window_rope == "default" else (base, factor)
        n_rot = keys.number("rope.dimension_count_swa", int, default=n_rot)
        base = keys.number("rope.freq_base_swa", float, default=base, least=1e-3)
    elif kind == "none":
        factor = 1.0
    attn_factor = keys.number("rope.scaling.attn_factor", float, default=1.0, least=0)
    if kind == "yarn" and _log_multiplier(keys):  # DeepSeek scales q.k instead: YaRN's own correction is cancelled
        attn_factor /= 1 + 0.1 * math.log(max(factor, 1.0))
    context = keys.number("context_length", int)
    original = keys.number("rope.scaling.original_context_length", int, default=context, least=0)
    return Rope(
        style=quirks.rope, n_rot=n_rot, freq_base=base, factor=factor, yarn=kind == "yarn", attn_factor=attn_factor,
        original_context_length=original or context * (kind == "yarn"),  # 0 in longrope: any context is longer
        beta_fast=32.0, beta_slow=1.0,  # llama.cpp reads the keys of these for grok alone
        text_pairs=_text_pairs(keys, quirks, n_rot),
    )  # fmt: skip


def _log_multiplier(keys: Keys) -> float:
    """DeepSeek's ``mscale_all_dim``; its key holds a tenth of it."""
    return keys.number("rope.scaling.yarn_log_multiplier", float, default=0.0, least=0) / 0.1


def _text_pairs(keys: Keys, quirks: Quirks, n_rot: int) -> tuple[bool, ...]:
    """Pairs that turn with a text's position, where sections give some to a picture's rows, columns and frames."""
    sections = keys.numbers("rope.dimension_sections") if quirks.rope_sections else []
    total = sum(sections[:4])
    if len(sections) < 3 or not total or (quirks.rope_sections == "blocks" and not (sections[0] and sections[1])):
        return ()
    sector = [i % total for i in range(n_rot // 2)]
    if quirks.rope_sections == "blocks":
        return tuple(s < sum(sections[:3]) for s in sector)
    return tuple(s < 3 * sections[s % 3] for s in sector)


def _scale(keys: Keys, quirks: Quirks, key_length: int, rope: Rope) -> float:
    given = quirks.attention_scale or keys.number("attention.scale", float, default=0.0, least=0)
    if quirks.mixer != "mla":
        return given or key_length**-0.5
    mscale = rope.attn_factor * rope.stretch * (1 + 0.1 * _log_multiplier(keys) * math.log(rope.factor))
    return mscale**2 * key_length**-0.5


def _check(keys: Keys, layer: Layer, rope: Rope) -> None:
    arch = keys.architecture
    if layer.mixer == "gqa" and layer.head_count % layer.head_count_kv:
        raise ConfigError(
            f"{arch}.attention.head_count: {layer.head_count} is not a multiple of "
            f"attention.head_count_kv {layer.head_count_kv}"
        )
    if rope.n_rot % 2 or rope.n_rot > layer.key_length:
        raise ConfigError(
            f"{arch}.rope.dimension_count: {rope.n_rot} must be even and at most "
            f"attention.key_length {layer.key_length}"
        )
    if rope.yarn and (rope.freq_base <= 1 or rope.factor < 1):
        raise ConfigError(f"{arch}.rope.scaling.factor: YaRN needs a factor of at least 1 and a base above 1")


def _warn_of_parts(keys: Keys, layers: list[Layer]) -> None:
    for rope, length in ((layer.rope, layer.key_length) for layer in layers):
        if rope and rope.n_rot < length:
            name = f"{keys.architecture}.rope.dimension_count"
            warnings.warn(f"{name}: {rope.n_rot} of {length} are rotated; llama.cpp refuses this file", stacklevel=4)
            return
