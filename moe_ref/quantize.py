"""A copy of a model with its weight matrices in other types: which tensor becomes what, and the copying.

Source of the choices: ``llama-quant.cpp`` of llama.cpp 0.5.0-dev (no importance matrix).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from moe_ref.gguf import GGUFFile, TensorInfo
from moe_ref.gguf_write import header, padding, tensor_bytes, uint32
from moe_ref.quants import BY_NAME, ENCODERS, FormatError, dequantize, quantize

QUANTIZATION_VERSION = 2  # of ggml's block formats
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
PIECE_ELEMENTS = 1 << 22  # converted at a time: 16 MB of float32

# What ``general.file_type`` says (``enum llama_ftype``) of a file that is mostly of a type.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
TYPES = tuple(name for name in ENCODERS if name in FILE_TYPES)  # Q8_K is for activations
# Mixes of llama-quantize: the type of most tensors and the file type; ``mixed_type`` has the exceptions.
MIXES = {"Q3_K_M": ("Q3_K", 12), "Q4_K_M": ("Q4_K", 15), "Q5_K_M": ("Q5_K", 17), "MXFP4_MOE": ("Q8_0", 38)}
# Where rows do not fit a block of 256; where they do not fit one of 32 either, F16.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Small or delicate matrices that stay as they are: norms, routers, convolutions and the like.
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|^position_embd|"
    r"^token_types|attn_rel_b\.weight|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|"
    r"time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
)


class Rule(NamedTuple):
    """Tensors whose name has a match of ``pattern`` become ``type``."""

    pattern: re.Pattern[str]
    type: str


def type_called(text: str, accepted: Sequence[str], flag: str) -> str:
    """A type's name whatever its case; raises FormatError for any other."""
    if text.upper() not in accepted:
        raise FormatError(f"{flag}: type {text!r} cannot be written; accepted: {', '.join(accepted)}")
    return text.upper()


def parse_rule(text: str) -> Rule:
    """``REGEX=TYPE``; the regular expression may match anywhere in a name, in any case."""
    pattern, equals, name = text.rpartition("=")
    if not pattern or not equals:
        raise FormatError(f"--tensor-type {text}: expected REGEX=TYPE, such as ffn_down_exps=Q6_K")
    try:
        return Rule(re.compile(pattern, re.IGNORECASE), type_called(name, TYPES, f"--tensor-type {text}"))
    except re.error as error:
        raise FormatError(f"--tensor-type {text}: {pattern!r} is no regular expression: {error}") from error


def is_weight(info: TensorInfo) -> bool:
    """Whether llama-quantize would touch this tensor: a matrix or a stack of them, and none of KEPT."""
    is_matrix = any(size > 1 for size in info.shape[:-1])
    return is_matrix and info.name.endswith("weight") and not KEPT.search(info.name)


def more_bits(i: int, n: int) -> bool:
    """Whether item i of n is among the first or last eighth, or every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def mixed_type(mix: str, info: TensorInfo, file: GGUFFile) -> str:
    """The type that llama-quantize gives a tensor in one of MIXES."""
    base, name = MIXES[mix][0], info.name
    if name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in file.tensors):
        return "Q8_0" if base == "Q8_0" or info.shape[-1] % BY_NAME[base].block_elements else "Q6_K"
    if mix == "MXFP4_MOE":
        return "MXFP4" if len(info.shape) == 3 and info.shape[0] > 1 else base
    arch = file.get("general.architecture")
    has_8_experts = file.get(f"{arch}.expert_count") == 8
    if match := re.search(r"attn_(v|qkv|kv_b|k)\.weight", name):
        if has_8_experts:
            return "Q8_0"
        return base if match[1] == "k" else _value_type(mix, base, name, file)
    if "ffn_down" in name:
        layers = int(file.get(f"{arch}.block_count", 0))
        return _down_type(mix, base, _layer(name), layers)
    if "attn_output.weight" in name and mix != "Q5_K_M":
        return "Q5_K" if has_8_experts else "Q4_K"
    return base


def _value_type(mix: str, base: str, name: str, file: GGUFFile) -> str:
    """Of the projection to values, which many queries share: its place among all of them decides."""
    names = sorted((n for n in file.tensors if re.search(r"attn_(v|qkv|kv_b)\.weight", n)), key=_layer)
    i = names.index(name)
    if mix == "Q3_K_M":
        return "Q5_K" if i < 2 else "Q4_K"
    return "Q6_K" if more_bits(i, len(names)) else base


def _down_type(mix: str, base: str, layer: int, layers: int) -> str:
    if mix == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    return "Q6_K" if more_bits(layer, layers) else base


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else 0


def fitting_type(wanted: str, width: int) -> str:
    """``wanted`` if rows of ``width`` are whole blocks of it, otherwise what llama-quantize falls back to."""
    for name in (wanted, FALLBACKS.get(wanted, wanted)):
        if width % BY_NAME[name].block_elements == 0:
            return name
    return "F16"


def choose_types(file: GGUFFile, type_name: str, rules: Sequence[Rule]) -> tuple[dict[str, str], list[str]]:
    """Tensor name -> type, in the file's order, and remarks about what is not as asked.

    ``type_name`` is one of TYPES, for every weight matrix, or one of MIXES; the first rule that matches a name decides.
    """
    chosen, remarks, unused = {}, [], list(rules)
    for name, info in file.tensors.items():
        chosen[name] = info.type
        if not is_weight(info):
            continue
        wanted = mixed_type(type_name, info, file) if type_name in MIXES else type_name
        if rule := next((rule for rule in rules if rule.pattern.search(name)), None):
            wanted, unused = rule.type, [r for r in unused if r is not rule]
        chosen[name] = fitting_type(wanted, info.shape[-1])
        if chosen[name] != wanted:
            remarks.append(f"{name}: rows of {info.shape[-1]} are no whole blocks of {wanted}; {chosen[name]} instead")
    remarks += [f"--tensor-type {r.pattern.pattern}={r.type}: decides no weight matrix of this file" for r in unused]
    return chosen, remarks


def write_quantized(file: GGUFFile, chosen: dict[str, str], file_type: int, out: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Write the copy tensor by tensor, yielding name, types and relative error (0 if copied) of each once done."""
    metadata = {key: file.value_bytes(key) for key in file.metadata if key not in SPLIT_KEYS}
    metadata["general.quantization_version"] = uint32(QUANTIZATION_VERSION)
    metadata["general.file_type"] = uint32(file_type)
    out.write(header(metadata, ((n, t, file.tensors[n].shape) for n, t in chosen.items()), file.alignment))
    for name, target in chosen.items():
        info = file.tensors[name]
        error = 0.0
        if target == info.type:
            _copy(file, info, out)
        else:
            error = _convert(file, info, target, out)
        out.write(padding(tensor_bytes(target, info.shape), file.alignment))
        yield {"name": name, "from": info.type, "to": target, "error": error}


def _copy(file: GGUFFile, info: TensorInfo, out: IO[bytes]) -> None:
    step = 4 * PIECE_ELEMENTS
    for start in range(0, info.nbytes, step):
        out.write(file.read(info.name, start, min(step, info.nbytes - start)).data)


def _convert(file: GGUFFile, info: TensorInfo, target: str, out: IO[bytes]) -> float:
    """Some rows at a time; returns the root-mean-square error over the root mean square."""
    width = info.shape[-1]
    row_bytes, rows = BY_NAME[info.type].row_bytes(width), int(np.prod(info.shape[:-1]))
    step, wrong, power = max(1, PIECE_ELEMENTS // width), 0.0, 0.0
    for start in range(0, rows, step):
        shape = min(step, rows - start), width
        x = dequantize(file.read(info.name, start * row_bytes, shape[0] * row_bytes), info.type, shape, info.name)
        raw = quantize(x, target, info.name)
        out.write(raw.data)
        with np.errstate(invalid="ignore"):
            x64 = x.astype(np.float64)
            wrong += float(np.square(x64 - dequantize(raw.ravel(), target, shape, info.name)).sum())
            power += float(np.square(x64).sum())
        if not np.isfinite(wrong):
            raise FormatError(
                f"{info.name}: holds NaN, infinity, or numbers beyond {target}; accepted: finite numbers that do not "
                f"overflow its scales; keep it with --tensor-type {re.escape(info.name)}=F32"
            )
    return float(np.sqrt(wrong / power)) if power else 0.0
