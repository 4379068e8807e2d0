"""The numbers of a run as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence

from moe_cupy.engine.stats import Stats
from moe_ref.command import counted


def _figures(s: Stats) -> list[tuple[str, str]]:
    """Without experts of the device's own, what its cache did is left out; without any, who decided too."""
    stall = f"{s.stall_us * 1e-3 / max(1, s.tokens):.2f} ms waiting for experts"
    if s.decode == "device" and s.decoded_tokens:
        stall = "not known: copies are part of the device's graph"
    hits, misses = counted(s.hits, "hit"), counted(s.misses, "miss", "misses")
    wasted = s.bytes_wasted / max(1, s.tokens)
    share = 100 * s.cache_slots / s.experts if s.experts else 100.0
    figures = [
        ("experts resident", f"{s.cache_slots} of {s.experts} ({share:.0f}%)"),
        ("cache memory", f"{s.cache_bytes / 2**20:.1f} MiB"),
        ("prompt", f"{counted(s.prompt_tokens, 'token')}, {s.prompt_tok_s:.1f} tok/s"),
        ("decode", _decoded(s)),
        ("hit rate", f"{s.hit_rate:.1%} ({hits}, {misses}, {s.late} late)"),
        ("read per token", f"{s.bytes_per_token / 2**20:.2f} MiB ({wasted / 2**20:.2f} wasted)"),
        ("stall per token", stall),
        ("policy, prefetch", f"{s.policy}, {s.prefetch}"),
    ]
    if s.experts:
        return figures
    return figures[2:4] + (figures[6:] if s.cpu_experts else [])


def _decoded(s: Stats) -> str:
    """The first token comes from the prompt's pass: without another there is no rate."""
    rate = f", {s.decode_tok_s:.1f} tok/s" if s.decoded_tokens else ""
    return counted(s.generated_tokens, "token") + rate


def side_by_side(columns: Sequence[tuple[str, Stats]]) -> str:
    """One column of figures for each (heading, stats); no line of headings where there are none."""
    rows = [_figures(stats) for _, stats in columns]
    if any(stats.host_hits + stats.host_misses for _, stats in columns):
        for row, (_, s) in zip(rows, columns, strict=True):
            row.append(("of those loads", f"{s.host_hits} from page-locked memory, {s.host_misses} from the file"))
    if any(stats.cpu_experts for _, stats in columns):
        for row, (_, s) in zip(rows, columns, strict=True):
            row.append(("experts by the CPU", f"{s.cpu_experts} ({s.cpu_misses} read from the file first)"))
    if any(stats.warmup_seconds >= 0.005 for _, stats in columns):
        for row, (_, s) in zip(rows, columns, strict=True):
            row.append(("kernels loaded", f"in {s.warmup_seconds:.2f} s at their first use, not part of the speeds"))
    cells = [["", *(heading for heading, _ in columns)]] if any(heading for heading, _ in columns) else []
    cells += [[name, *(row[i][1] for row in rows)] for i, (name, _) in enumerate(rows[0])]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)
