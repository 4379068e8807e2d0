"""Facts about a GGUF file: what it is, where its bytes are, and what of it cannot be run here."""

from __future__ import annotations

import re
from typing import Any

from moe_ref.config import load_config
from moe_ref.gguf import GGUFFile
from moe_ref.quants import FORMATS
from moe_ref.tensors import check_tensors, vocab_rows

ROUTED = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps\.")  # llama.cpp's pattern for --cpu-moe
SHARED = re.compile(r"\.ffn_(up|down|gate)_shexp\.|\.ffn_gate_inp_shexp\.")


def part_of(name: str) -> str:
    """Which part of the model a tensor belongs to: "routed", "shared" or "dense"."""
    if ROUTED.search(name):
        return "routed"
    return "shared" if SHARED.search(name) else "dense"


def describe(file: GGUFFile) -> dict[str, Any]:
    """Everything ``inspect`` prints, ready for JSON. Never raises for a file that merely cannot be run."""
    arch = file.get("general.architecture")
    experts = _number(file, arch, "expert_count")
    parts = {part: sum(t.nbytes for t in file.tensors.values() if part_of(t.name) == part) for part in PARTS}
    layers = len({layer_of(name) for name in file.tensors if part_of(name) == "routed"})
    return {
        "file": str(file.path),
        "version": file.version,
        "architecture": arch,
        "name": file.get("general.name"),
        "layers": _number(file, arch, "block_count"),
        "experts": experts,
        "experts_used": _number(file, arch, "expert_used_count"),
        "embedding_length": _number(file, arch, "embedding_length"),
        "context_length": _number(file, arch, "context_length"),
        "parameters": sum(_count(t.shape) for t in file.tensors.values()),
        "bytes": {**parts, "total": sum(parts.values())},
        "moe_layers": layers,
        "bytes_per_expert": parts["routed"] // (experts * layers) if experts and layers else 0,
        "types": _types(file),
        "unsupported": unsupported(file),
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.nbytes, "part": part_of(t.name)}
            for t in file.tensors.values()
        ],
    }


PARTS = ("dense", "shared", "routed")


def layer_of(name: str) -> int | None:
    """N of a tensor called blk.N.…, otherwise None."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


def unsupported(file: GGUFFile) -> list[str]:
    """Why this file cannot be run here, one sentence each; empty if it can."""
    reasons = [
        f"tensor type {kind} ({count} tensors)" for kind, count in _types(file).items() if kind not in FORMATS
    ]
    try:
        check_tensors(load_config(file.metadata, vocab_rows(file)), file)
    except ValueError as error:
        if str(error).split(":")[0] not in file.tensors or not reasons:
            reasons.append(str(error))
    return reasons


def table(facts: dict[str, Any]) -> str:
    """The facts as a person reads them."""
    head = [
        f"{facts['file']}: GGUF v{facts['version']}, {facts['architecture'] or 'no architecture'}"
        + (f", {facts['name']}" if facts["name"] else ""),
        f"{facts['layers']} layers, width {facts['embedding_length']}, context {facts['context_length']}, "
        f"{facts['parameters'] / 1e6:.1f} M parameters",
    ]
    if facts["experts"]:
        head.append(
            f"{facts['experts']} experts a layer, {facts['experts_used']} used per token, "
            f"{facts['bytes_per_expert']:,} bytes each (average)"
        )
    total = facts["bytes"]["total"] or 1
    parts = [f"{part:8} {facts['bytes'][part]:>15,} bytes  {facts['bytes'][part] / total:6.1%}" for part in PARTS]
    width = max((len(t["name"]) for t in facts["tensors"]), default=4)
    rows = [
        f"{t['name']:{width}}  {t['type']:8} {t['bytes']:>14,}  {t['part']:6}  {' x '.join(map(str, t['shape']))}"
        for t in facts["tensors"]
    ]
    verdict = [f"cannot be run here: {reason}" for reason in facts["unsupported"]] or ["can be run here"]
    return "\n".join([*head, "", *parts, "", *rows, "", *verdict])


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _number(file: GGUFFile, arch: Any, key: str) -> Any:
    value = file.get(f"{arch}.{key}")
    return value if isinstance(value, int | float) else None


def _types(file: GGUFFile) -> dict[str, int]:
    types: dict[str, int] = {}
    for tensor in file.tensors.values():
        types[tensor.type] = types.get(tensor.type, 0) + 1
    return types
