"""Facts about a GGUF file: what it is, where its bytes are, and what of it cannot be run here."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

from moe_ref.config import load_config
from moe_ref.gguf import GGUFArray, GGUFFile
from moe_ref.gguf_bytes import show
from moe_ref.quants import FORMATS
from moe_ref.tensors import check_tensors, vocab_rows
from moe_ref.tokenizer import NO_VOCABULARY, load_tokenizer
from moe_ref.vocabulary import KEY

ROUTED = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps\.")  # llama.cpp's pattern for --cpu-moe
SHARED = re.compile(r"\.ffn_(up|down|gate)_shexp\.|\.ffn_gate_inp_shexp\.")


def part_of(name: str) -> str:
    """Which part of the model a tensor belongs to: "routed", "shared" or "dense"."""
    if ROUTED.search(name):
        return "routed"
    return "shared" if SHARED.search(name) else "dense"


def describe(file: GGUFFile, remarks: Sequence[str] = ()) -> dict[str, Any]:
    """Everything ``inspect`` prints, ready for JSON. Never raises for a file that merely cannot be run.

    ``remarks`` of whoever opened the file become warnings, before those about its keys and its tokenizer.
    """
    arch = _text(file, "general.architecture")
    experts = _number(file, arch, "expert_count")
    parts = {part: sum(t.nbytes for t in file.tensors.values() if part_of(t.name) == part) for part in PARTS}
    layers = len({layer_of(name) for name in file.tensors if part_of(name) == "routed"})
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        reasons = unsupported(file)
        tokenizer, doubts, refusals = _tokenizer(file)
    return {
        "file": str(file.path),
        "version": file.version,
        "architecture": arch,
        "kind": _text(file, "general.type"),
        "name": _text(file, "general.name"),
        "layers": _number(file, arch, "block_count"),
        "experts": experts,
        "experts_used": _number(file, arch, "expert_used_count"),
        "embedding_length": _number(file, arch, "embedding_length"),
        "context_length": _number(file, arch, "context_length"),
        "tokenizer": tokenizer,
        "parameters": sum(prod(t.shape) for t in file.tensors.values()),
        "bytes": {**parts, "total": sum(parts.values())},
        "moe_layers": layers,
        "bytes_per_expert": parts["routed"] // (experts * layers) if experts and layers else 0,
        "types": _types(file),
        "warnings": [*remarks, *doubts, *(str(warning.message) for warning in heard)],
        "unsupported": reasons + refusals,
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
    reasons = [f"tensor type {kind} ({count} tensors)" for kind, count in _types(file).items() if kind not in FORMATS]
    try:
        check_tensors(load_config(file.metadata, vocab_rows(file)), file)
    except ValueError as error:
        if str(error).split(":")[0] not in file.tensors or not reasons:
            reasons.append(str(error))
    return reasons


def table(facts: dict[str, Any]) -> str:
    """The facts as a person reads them."""
    total = facts["bytes"]["total"] or 1
    parts = [f"{part:8} {facts['bytes'][part]:>15,} bytes  {facts['bytes'][part] / total:6.1%}" for part in PARTS]
    tensors = [(show(t["name"]), t) for t in facts["tensors"]]
    width, kinds = (max(map(len, column), default=4) for column in ([n for n, _ in tensors], facts["types"]))
    rows = [
        f"{name:{width}}  {t['type']:{kinds}} {t['bytes']:>14,}  {t['part']:6}  {' x '.join(map(str, t['shape']))}"
        for name, t in tensors
    ]
    remarks = [f"warning: {warning}" for warning in facts["warnings"]]
    verdict = [f"cannot be run here: {reason}" for reason in facts["unsupported"]] or ["can be run here"]
    return "\n".join([*_head(facts), "", *parts, "", *rows, "", *remarks, *verdict])


def _head(facts: dict[str, Any]) -> list[str]:
    """The first lines: what the file is, leaving out what it does not say."""
    kind = [facts["kind"]] if facts["kind"] not in (None, "model") else []
    title = [facts["architecture"] or "no architecture", *kind, *([facts["name"]] if facts["name"] else [])]
    sizes = {"{} layers": "layers", "width {}": "embedding_length", "context {}": "context_length"}
    said = [text.format(facts[key]) for text, key in sizes.items() if facts[key] is not None]
    head = [
        f"{facts['file']}: GGUF v{facts['version']}, {', '.join(map(show, title))}",
        ", ".join([*said, f"{facts['parameters'] / 1e6:.1f} M parameters"]),
    ]
    if facts["experts"]:
        used = f"{facts['experts_used']} used per token, {facts['bytes_per_expert']:,} bytes each (average)"
        head.append(f"{facts['experts']} experts a layer, {used}")
    tokenizer = facts["tokenizer"]
    if tokenizer["model"]:
        names = " ".join(show(tokenizer[key]) for key in ("model", "pre") if tokenizer[key])
        head.append(f"tokenizer {names}, {tokenizer['tokens']} tokens")
    return head


def _tokenizer(file: GGUFFile) -> tuple[dict[str, Any], list[str], list[str]]:
    """The tokenizer's names, remarks about it, and why it is not supported. A file need not have one."""
    tokens = file.get(KEY + "tokens")
    model, count = _text(file, KEY + "model"), len(tokens) if isinstance(tokens, GGUFArray) else 0
    facts = {"model": model, "pre": _text(file, KEY + "pre"), "tokens": count}
    if not any(key.startswith(KEY) for key in file.metadata) or model in NO_VOCABULARY:
        is_model = "token_embd.weight" in file.tensors
        return facts, ["there is no tokenizer: token ids can be used, text cannot"] * is_model, []
    try:
        load_tokenizer(file.metadata)
    except ValueError as error:  # TokenizerError, or GGUFError of an array that cannot be read
        ours = isinstance(error.__cause__, ImportError)  # nothing is wrong with the file
        return facts, [str(error)] * ours, [str(error)] * (not ours)
    return facts, [], []


def _number(file: GGUFFile, arch: str | None, key: str) -> int | None:
    value = file.get(f"{arch}.{key}")
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(file: GGUFFile, key: str) -> str | None:
    value = file.get(key)
    return value if isinstance(value, str) else None


def _types(file: GGUFFile) -> dict[str, int]:
    return dict(Counter(tensor.type for tensor in file.tensors.values()))
