"""Traces that other tools wrote, turned into ours: CSV, JSONL, and llama.cpp's dumps of ``ffn_moe_topk``."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moe_cupy.lab.trace import RouteTrace, TraceError, checked

Row = tuple[int, int, int, list[int], list[float]]  # sequence, token, layer, expert ids, weights (may be empty)
NAMES = {
    "sequence": ("sequence", "seq", "seq_id", "sequence_id", "request", "request_id"),
    "token": ("token", "token_idx", "token_index", "pos", "position", "step", "t"),
    "layer": ("layer", "layer_idx", "layer_id", "l", "il"),
    "experts": ("experts", "ids", "expert_ids", "topk", "topk_ids", "selected_experts", "expert"),
    "weights": ("weights", "topk_weights", "gates", "probs", "scores", "weight", "prob"),
}


def import_csv(text: str) -> Iterator[Row]:
    """A header names columns for token, layer and experts (several ids in a cell, e0…e7, or one row an expert)."""
    reader = csv.DictReader(text.splitlines())
    for number, row in enumerate(reader, 2):
        fields = {(name or "").strip().lower(): value or "" for name, value in row.items() if isinstance(value, str)}
        columns = sorted((n for n in fields if re.fullmatch(r"(e|expert|id|expert_id)_?\d+", n)), key=_trailing)
        ids = [fields[n] for n in columns] if columns else _words(_pick(fields, "experts", number))
        yield _row(fields, ids, _words(_pick(fields, "weights", number, "")), number)


def import_jsonl(text: str) -> Iterator[Row]:
    """One JSON object a line with token, layer and a list of experts."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = {str(name).lower(): value for name, value in json.loads(line).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise TraceError(f"line {number}: expected a JSON object, found {line[:60]!r}") from error
        ids, weights = (_as_list(_pick(fields, name, number, [])) for name in ("experts", "weights"))
        yield _row(fields, ids, weights, number)


def import_llama(text: str) -> Iterator[Row]:
    """What llama.cpp's eval callback prints of ``ffn_moe_topk-N``: ids [k, T], a bracketed row a token.

    The callback shortens long rows with "..."; those are refused, since ids are missing from them.
    """
    token, width, last = 0, 0, -1
    blocks = list(re.finditer(r"ffn_moe_topk-(\d+)(?![\d-]).*?\n(?P<body>(?:\s*[\[\]\d\s,.\-]+\n)+)", text + "\n"))
    for block in blocks:
        layer, body = int(block[1]), block["body"]
        if "..." in body:
            raise TraceError(f"ffn_moe_topk-{layer}: the dump is shortened (...); print all elements of the tensor")
        rows = [_words(row) for row in re.findall(r"\[([^\[\]]+)\]", body)]
        if layer <= last:
            token += width
        last, width = layer, len(rows)
        for i, ids in enumerate(rows):
            yield 0, token + i, layer, [_whole(word, "id", layer) for word in ids], []


FORMATS: dict[str, Callable[[str], Iterator[Row]]] = {
    "csv": import_csv,
    "jsonl": import_jsonl,
    "llama.cpp": import_llama,
}


def guess_format(name: str, text: str) -> str:
    """The format of a file by its name, or by how it begins."""
    if name.endswith((".jsonl", ".ndjson")) or text.lstrip().startswith("{"):
        return "jsonl"
    return "llama.cpp" if "ffn_moe_topk-" in text else "csv"


def import_trace(text: str, kind: str, n_experts: int | None = None, **meta: Any) -> RouteTrace:
    """Rows in any order -> a trace. Raises TraceError for rows that are missing, double or of unequal length."""
    rows: dict[tuple[int, int], dict[int, tuple[list[int], list[float]]]] = {}
    for sequence, token, layer, ids, weights in FORMATS[kind](text):
        ids_so_far, weights_so_far = rows.setdefault((sequence, token), {}).setdefault(layer, ([], []))
        ids_so_far += ids
        weights_so_far += weights
    if not rows:
        raise TraceError(f"no routes found in a {kind} file; expected rows of token, layer and expert ids")
    order = sorted(rows)
    layers = sorted({layer for by_layer in rows.values() for layer in by_layer})
    experts = _array([[rows[at].get(layer, ([], []))[0] for layer in layers] for at in order], order, layers, np.int64)
    has_weights = all(len(w) == experts.shape[2] for by_layer in rows.values() for _, w in by_layer.values())
    gates = np.array([[rows[at][layer][1] for layer in layers] for at in order], np.float32) if has_weights else None
    starts = [i for i, at in enumerate(order) if i == 0 or at[0] != order[i - 1][0]]
    count = n_experts or int(experts.max()) + 1
    about = {"layer_ids": layers, "source_format": kind} | meta
    return checked(RouteTrace(experts, count, np.array(starts, np.int64), about, gates))


def _array(rows: list[list[list[int]]], order: list[tuple[int, int]], layers: list[int], kind: type) -> np.ndarray:
    k = len(rows[0][0])
    for at, row in zip(order, rows, strict=True):
        for layer, ids in zip(layers, row, strict=True):
            if len(ids) != k or not k:
                raise TraceError(f"sequence {at[0]}, token {at[1]}, layer {layer}: {len(ids)} experts, others have {k}")
    return np.array(rows, kind)


def _row(fields: dict[str, Any], ids: list[Any], weights: list[Any], number: int) -> Row:
    whole = [_whole(value, "expert", number) for value in ids]
    sequence = _whole(_pick(fields, "sequence", number, 0), "sequence", number)
    token, layer = (_whole(_pick(fields, name, number), name, number) for name in ("token", "layer"))
    try:
        return sequence, token, layer, whole, [float(value) for value in weights]
    except (TypeError, ValueError) as error:
        raise TraceError(f"line {number}: weights {str(weights)[:60]} are not numbers") from error


def _pick(fields: dict[str, Any], meaning: str, number: int, default: Any = None) -> Any:
    for name in NAMES[meaning]:
        if name in fields and fields[name] not in ("", None):
            return fields[name]
    if default is None:
        found = ", ".join(sorted(fields))[:80]
        raise TraceError(f"line {number}: no {meaning}; expected one of {', '.join(NAMES[meaning])}, found {found}")
    return default


def _whole(value: Any, what: str, number: int) -> int:
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = -1
    if not 0 <= whole < 1 << 40 or isinstance(value, bool):
        raise TraceError(f"line {number}: {what} {str(value)[:40]!r} is not a whole number from 0")
    return whole


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s,;|\[\]()\"']+", text)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else _words(value) if isinstance(value, str) else [value]


def _trailing(name: str) -> int:
    return int(re.findall(r"\d+", name)[-1])
