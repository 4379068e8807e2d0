"""Which type each tensor of a quantized model has: llama-quantize's rules, read from ``data/mixes.toml``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from moe_cupy.plan.tables import PlanError, table
from moe_ref.quants import BY_NAME

Shape = tuple[int, ...]
# Where rows are no whole blocks of a type: what llama-quantize takes instead, and F16 where that fails too.
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
# Matrices that keep the type of the unquantized file, which for these is F32.
KEPT = re.compile(r"_norm\.weight|ffn_gate_inp\.weight|ssm_conv1d|rope_freqs")
PARTS = {
    "value": r"attn_(v|qkv|kv_b)\.weight", "key": r"attn_k\.weight", "query": r"attn_q\.weight",
    "attn_output": r"attn_output\.weight", "down": r"ffn_down", "gate": r"ffn_gate", "up": r"ffn_up",
}  # fmt: skip
UNQUANTIZED = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules ask about a model."""

    experts: int
    queries_per_key: int
    layers: int
    tied: bool
    values: tuple[str, ...]  # names of all projections to values, in the order of the layers
    downs: tuple[str, ...]  # names of all matrices called ffn_down…, in that order


def mix_called(name: str) -> tuple[str, str]:
    """The mix of a name in any case, and a remark where it stands for another. Raises PlanError listing the nearest."""
    mixes = table("mixes")
    known = {key.upper(): key for key in (*mixes, *mixes["alias"]) if key != "alias"}
    key = known.get(name.upper())
    if key is None:
        near = difflib.get_close_matches(name.upper(), known, 3, 0.4) or ["Q4_K_M"]
        raise PlanError(f"--quant {name}: unknown; nearest: {', '.join(near)}; all: {', '.join(sorted(known))}")
    if alias := mixes["alias"].get(key):
        return alias["is"], f"{key} is counted as {alias['is']}: {alias['why']}"
    return key, ""


def types_of(shapes: Mapping[str, Shape], mix: str, facts: Facts) -> dict[str, str]:
    """Tensor name -> type, for a model whose tensors have these shapes (NumPy order)."""
    return {name: _type(name, shape, mix, facts) for name, shape in shapes.items()}


def _type(name: str, shape: Shape, mix: str, facts: Facts) -> str:
    rows = table("mixes")[mix]
    base: str = rows["base"]
    is_matrix = any(size > 1 for size in shape[:-1]) and name.endswith("weight")
    if not is_matrix or KEPT.search(name) or base == "F32":
        return "F32"
    if base in UNQUANTIZED:
        return base
    wanted = base
    for part in _parts(name, shape, facts):
        rules = (rule.split() for rule in rows.get("rules", ()))
        chosen = next((t for p, condition, t in rules if p == part and _holds(condition, name, facts)), None)
        if chosen:
            wanted = chosen
            break
    if _parts(name, shape, facts)[0] == "output" and shape[-1] % BY_NAME[base].block_elements:
        wanted = "Q8_0"
    return fitting(wanted, shape[-1])


def _parts(name: str, shape: Shape, facts: Facts) -> list[str]:
    """What a tensor counts as, the most special first."""
    if name == "output.weight" or (name == "token_embd.weight" and facts.tied):
        return ["output"]
    if name == "token_embd.weight":
        return ["embedding"]
    part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")
    return ["stack", part] if len(shape) == 3 and shape[0] > 1 else [part]


def _holds(condition: str, name: str, facts: Facts) -> bool:
    layer, n = layer_of(name) or 0, facts.layers
    value = facts.values.index(name) if name in facts.values else None
    i, count = (layer, n) if value is None else (value, len(facts.values))
    holds = {
        "-": True,
        "8": facts.experts == 8,
        "gqa4": facts.queries_per_key >= 4,
        "more": more_bits(i, count),
        "8more": facts.experts == 8 and more_bits(i, count),
        "<8": layer < n // 8,
        "d<8": name in facts.downs[: n // 8],
        "<16": layer < n // 16,
        "mid": n // 8 <= layer < 7 * n // 8,
        "#2": i < 2,
        "#4": i < 4,
    }
    return holds[condition]


def more_bits(i: int, n: int) -> bool:
    """Whether item i of n is in the first or last eighth, or every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def fitting(wanted: str, width: int) -> str:
    """``wanted`` where rows of ``width`` are whole blocks of it, otherwise what stands in for it."""
    for name in (wanted, FALLBACKS.get(wanted, wanted)):
        if width % BY_NAME[name].block_elements == 0:
            return name
    return "F16"


@lru_cache(maxsize=1 << 16)
def layer_of(name: str) -> int | None:
    """N of a tensor called blk.N.…, otherwise None."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None
