"""The results of ``bench`` in llama-bench's forms; its columns and ours."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from moe_cupy.device.host import usable_cores
from moe_cupy.tools.bench import Test
from moe_cupy.tools.machine import cpu_name

Records = Sequence[dict[str, Any]]
TABLE = "moe_cupy_bench"


def as_json(records: Records) -> str:
    """One list of objects."""
    return json.dumps(records, indent=1)


def columns(records: Records) -> list[str]:
    """The fields that are one value: llama-bench leaves the samples out of tables, too."""
    return [name for name, value in records[0].items() if not isinstance(value, list)]


def as_csv(records: Records) -> str:
    """A line of names, then one a test."""
    out = io.StringIO()
    table = csv.DictWriter(out, columns(records), extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(records)
    return out.getvalue().rstrip("\n")


def as_sql(records: Records) -> str:
    """A table and its rows, as SQLite reads them."""
    kinds = {str: "TEXT", float: "REAL"}
    names = columns(records)
    fields = ",\n  ".join(f"{name} {kinds.get(type(records[0][name]), 'INTEGER')}" for name in names)
    rows = [", ".join(_literal(record[name]) for name in names) for record in records]
    inserts = [f"INSERT INTO {TABLE} ({', '.join(names)}) VALUES ({row});" for row in rows]
    return "\n".join([f"CREATE TABLE IF NOT EXISTS {TABLE} (\n  {fields}\n);", *inserts])


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(int(value) if isinstance(value, bool) else value)


def as_markdown(records: Records) -> str:
    """llama-bench's table with cache columns; which columns are aligned how is Markdown's business."""
    head = ["model", "size", "params", "backend", "threads", "cache", "policy", "prefetch", "test", "t/s", "hit rate",
            "MiB/token", "stall ms/token"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] * len(head)) + "|"]
    for r in records:
        tokens = max(1, r["prompt_tokens"] + r["decoded_tokens"])
        cells = [
            r["model_type"],
            f"{r['model_size'] / 2**20:.2f} MiB",
            f"{r['model_n_params'] / 1e6:.2f} M",
            r["backends"],
            str(r["n_threads"]),
            f"{r['cache_slots']} slots, {r['cache_bytes'] / 2**20:.0f} MiB",
            r["policy"],
            r["prefetch"],
            Test(r["n_prompt"], r["n_gen"], r["n_depth"]).name,
            f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}",
            f"{r['hit_rate']:.3f}" if r["hits"] + r["misses"] else "-",
            f"{r['bytes_per_token'] / 2**20:.2f}",
            "not known" if r["decode"] == "device" and r["n_gen"] else f"{r['stall_us'] / 1000 / tokens:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _footer(records)])


def _footer(records: Records) -> str:
    """In which state the caches were, and on what machine."""
    if not records:
        return ""
    first = records[0]
    warm = "warm: each repetition finds the experts that the one before left"
    cold = "cold: no expert is resident at the start of a repetition"
    how = first["direct_io"] or "no routed experts"
    page = "" if "O_DIRECT" in how or not first["experts"] else "; the system's page cache may hold the file"
    return f"{warm if first['warm'] else cold}; {how}{page}; {cpu_name()}, {usable_cores()} cores"


FORMATS: dict[str, Callable[[Records], str]] = {"csv": as_csv, "json": as_json, "md": as_markdown, "sql": as_sql}
