"""Results of replays as tables and pictures that a person can read who has never seen the project."""

from __future__ import annotations

import base64
import html
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
COLUMNS = ["routes", "capacity", "policy", "prefetch", "hits %", "MiB/token", "fetched ahead", "wasted %", "late",
           "stall ms/token", "tok/s"]  # fmt: skip
STYLES = {"belady": ("black", "--", 1.5), "belady-admit": ("black", ":", 1.5), "echo": ("crimson", "-", 2.6)}
INTRO = """<p>A mixture-of-experts model has many <em>experts</em>, pieces of its weights of which every token uses a
few in each layer. Here they do not all fit into fast memory: a <em>cache</em> holds a share of them (the
<em>capacity</em>). An expert that is there when a layer wants it is a <em>hit</em>; one that is not must be copied
first, and compute waits: that wait is the <em>stall</em>. A <em>policy</em> says which expert to give up for a new
one. The routes below were recorded from real models and are replayed exactly; <em>Belady</em> knows the future and is
the best that any policy could do; a name that ends in <em>-admit</em> need not keep a newcomer. A <em>prefetcher</em>
guesses what comes next and fetches it before it is asked for.</p>"""


def pyplot() -> Any:
    """matplotlib, without a window unless somebody (a notebook) has begun to draw already.

    Raises RuntimeError, naming the remedy, where it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: .venv/bin/pip install matplotlib") from error
    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def table(rows: Rows) -> str:
    """Plain text, one line a row, best hit rate first within a trace and capacity."""
    cells = [COLUMNS, *(_cells(row) for row in ordered(rows))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def ordered(rows: Rows) -> list[dict[str, Any]]:
    """Rows by trace and capacity, then by stall."""
    order = {name: i for i, name in enumerate(dict.fromkeys(row["routes"] for row in rows))}
    return sorted(rows, key=lambda r: (order[r["routes"]], r["capacity"], r["stall_ms_per_token"], -r["hit_rate"]))


def _cells(row: dict[str, Any]) -> list[str]:
    ahead = row["prefetched"]
    return [
        row["routes"].removesuffix(".npz"),
        f"{100 * row['capacity']:g}%",
        row["policy"],
        row["prefetch"],
        f"{100 * row['hit_rate']:.2f}",
        f"{(row['demand_bytes'] + row['prefetch_bytes']) / row['tokens'] / 2**20:.1f}",
        str(ahead),
        f"{100 * row['wasted'] / ahead:.0f}" if ahead else "-",
        str(row["late"]),
        f"{row['stall_ms_per_token']:.3f}",
        f"{row['tok_s']:.1f}",
    ]


def figure(rows: Rows, routes: str) -> Any:
    """Hit rate and stall against capacity, one line a policy (and predictor)."""
    plt = pyplot()
    drawn, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    kinds = dict.fromkeys((row["policy"], row["prefetch"]) for row in rows if row["routes"] == routes)
    colours = plt.get_cmap("tab20")
    for i, (policy, prefetch) in enumerate(kinds):
        line = sorted(
            (row for row in rows if (row["routes"], row["policy"], row["prefetch"]) == (routes, policy, prefetch)),
            key=lambda row: row["capacity"],
        )
        colour, style, width = STYLES.get(policy, (colours(i % 20), "-", 1.2)) if prefetch == "none" else (
            colours(i % 20), "-.", 1.2)  # fmt: skip
        label = policy if prefetch == "none" else f"{policy} + {prefetch}"
        x = [100 * row["capacity"] for row in line]
        look = {"color": colour, "ls": style, "lw": width, "zorder": 2 + width, "marker": "o", "ms": 3, "label": label}
        left.plot(x, [100 * row["hit_rate"] for row in line], **look)
        right.plot(x, [row["stall_ms_per_token"] for row in line], **look)
    left.set(xlabel="experts that fit (%)", ylabel="hits (%)", title="Hit rate: higher is better")
    right.set(xlabel="experts that fit (%)", ylabel="stall (ms a token)", title="Waiting: lower is better")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    drawn.suptitle(routes.removesuffix(".npz"))
    return drawn


def png(drawn: Any) -> bytes:
    """A figure as a PNG file, and closed."""
    out = io.BytesIO()
    drawn.savefig(out, format="png", dpi=100)
    pyplot().close(drawn)
    return out.getvalue()


def page(rows: Rows, command: str) -> str:
    """One HTML file with its pictures inside."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Expert caches on real routes</title>", _CSS,
             "<h1>Expert caches on real routes</h1>", INTRO,
             f"<p>Made by <code>{html.escape(command)}</code></p>"]  # fmt: skip
    for routes in dict.fromkeys(row["routes"] for row in rows):
        here = [row for row in rows if row["routes"] == routes]
        picture = base64.b64encode(png(figure(rows, routes))).decode()
        parts += [f"<h2>{html.escape(routes)}</h2>", f"<p>{_summary(here)}</p>"]
        parts.append(f"<img alt='hit rate and stall against capacity' src='data:image/png;base64,{picture}'>")
        parts.append(_table(here))
    return "\n".join(parts) + "\n"


_CSS = """<style>body{font:16px/1.5 sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}
table{border-collapse:collapse;font-size:13px}td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #ddd}
tr.limit{background:#eee}tr.best{background:#fde}</style>"""


def _summary(rows: Rows) -> str:
    sentences = []
    for capacity in sorted({row["capacity"] for row in rows}):
        plain = [row for row in rows if row["capacity"] == capacity and row["prefetch"] == "none"]
        causal = [row for row in plain if not row["offline"]]
        if not causal:
            continue
        best = max(causal, key=lambda row: row["hit_rate"])
        limit = max(plain, key=lambda row: row["hit_rate"])
        sentences.append(
            f"With {100 * capacity:g}% of the experts in the cache, {html.escape(best['policy'])} hits most: "
            f"{100 * best['hit_rate']:.1f}% (with the future known: {100 * limit['hit_rate']:.1f}%)."
        )
    return " ".join(sentences)


def _table(rows: Rows) -> str:
    head = "".join(f"<th>{name}" for name in COLUMNS[1:])
    body = []
    for capacity in sorted({row["capacity"] for row in rows}):
        here = [row for row in ordered(rows) if row["capacity"] == capacity]
        causal = [row for row in here if not row["offline"]]
        for row in here:
            kind = "best" if causal and row is causal[0] else "limit" if row["offline"] else ""
            cells = "".join(f"<td>{html.escape(cell)}" for cell in _cells(row)[1:])
            body.append(f"<tr class='{kind}'>{cells}")
    return f"<table><tr>{head}\n" + "\n".join(body) + "</table>"


def markdown(rows: Rows, command: str, path: str) -> str:
    """A page in Markdown; its pictures are written beside ``path``, one a trace."""
    parts = ["# Expert caches on real routes", "", _plain(INTRO), "", f"Made by `{command}`", ""]
    for i, routes in enumerate(dict.fromkeys(row["routes"] for row in rows)):
        here = [row for row in rows if row["routes"] == routes]
        picture = Path(path).with_suffix(f".{i}.png")
        picture.write_bytes(png(figure(rows, routes)))
        lines = [COLUMNS[1:], ["---"] * len(COLUMNS[1:]), *(_cells(row)[1:] for row in ordered(here))]
        parts += [f"## {routes}", "", _summary(here), "", f"![hit rate and stall]({picture.name})", ""]
        parts += ["| " + " | ".join(cells) + " |" for cells in lines] + [""]
    return "\n".join(parts)


def _plain(text: str) -> str:
    return re.sub(r"</?p>", "", text).replace("<em>", "*").replace("</em>", "*")
