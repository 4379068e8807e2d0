"""The numbers of a run as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence

from moe_cupy.engine import Engine
from moe_cupy.engine.stats import Stats
from moe_cupy.plan.report import PLACES
from moe_cupy.plan.rules import GPU
from moe_ref.generation import rows_text

ON_NONE = "-"  # a number that launches are given


def _figures(s: Stats) -> list[tuple[str, str]]:
    """Without experts of the device's own, what its cache did is left out; without any, who decided too."""
    stall = f"{s.stall_us * 1e-3 / max(1, s.tokens):.2f} ms waiting for experts"
    if s.decode == "device" and s.generated_tokens:
        stall = "not known: copies are part of the device's graph"
    wasted = s.bytes_wasted / max(1, s.tokens)
    share = 100 * s.cache_slots / s.experts if s.experts else 100.0
    figures = [
        ("experts resident", f"{s.cache_slots} of {s.experts} ({share:.0f}%)"),
        ("cache memory", f"{s.cache_bytes / 2**20:.1f} MiB"),
        ("prompt", f"{s.prompt_tokens} tokens, {s.prompt_tok_s:.1f} tok/s"),
        ("decode", f"{s.generated_tokens} tokens, {s.decode_tok_s:.1f} tok/s"),
        ("hit rate", f"{s.hit_rate:.1%} ({s.hits} hits, {s.misses} misses, {s.late} late)"),
        ("read per token", f"{s.bytes_per_token / 2**20:.2f} MiB ({wasted / 2**20:.2f} wasted)"),
        ("stall per token", stall),
        ("policy, prefetch", f"{s.policy}, {s.prefetch}"),
    ]
    if s.experts:
        return figures
    return figures[2:4] + (figures[6:] if s.cpu_experts else [])


def side_by_side(columns: Sequence[tuple[str, Stats]]) -> str:
    """One column of figures for each (heading, stats)."""
    rows = [_figures(stats) for _, stats in columns]
    if any(stats.host_hits + stats.host_misses for _, stats in columns):
        for row, (_, s) in zip(rows, columns, strict=True):
            row.append(("of those loads", f"{s.host_hits} from page-locked memory, {s.host_misses} from the file"))
    if any(stats.cpu_experts for _, stats in columns):
        for row, (_, s) in zip(rows, columns, strict=True):
            row.append(("experts by the CPU", f"{s.cpu_experts} ({s.cpu_misses} read from the file first)"))
    cells = [["", *(heading for heading, _ in columns)]]
    cells += [[name, *(row[i][1] for row in rows)] for i, (name, _) in enumerate(rows[0])]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def run_report(stats: Stats, more: Sequence[tuple[str, str]]) -> str:
    """The figures of one run, the time that was no part of its speeds, and ``more`` rows."""
    once = [("kernels", f"{stats.warmup_seconds:.2f} s to load at their first use; not part of the speeds")]
    lines = side_by_side([("", stats)]).splitlines()[1:]
    return "\n".join([*lines, rows_text([*(once if stats.warmup_seconds >= 0.005 else []), *more], width=16)])


def places(engine: Engine) -> dict[str, str]:
    """Tensor of the file -> the device that has it, by what was loaded: experts are where they are computed."""
    found = dict(engine.weights.lies)
    for at, store in engine.stores.items():
        for tensors in store.layout.layers:
            found |= {engine.views[tensor.name].stored.name: at for tensor in tensors}
    return found


def tensor_lines(engine: Engine) -> list[str]:
    """Every tensor, its bytes, place and the rule that put it there, as ``plan --tensors`` writes them."""
    found, width = places(engine), max(map(len, engine.file.tensors))
    cached = {engine.views[t.name].stored.name for s in engine.stores.values() for ts in s.layout.layers for t in ts}
    lines = []
    for t in engine.file.tensors.values():
        at = found.get(t.name, ON_NONE)
        why = engine.split.why.get(t.name, "")
        why += ", by the expert cache" if t.name in cached and at == GPU else ""
        lines.append(f"{t.name:{width}}  {t.type:8} {t.nbytes:>14,}  {PLACES.get(at, at):5} {why}".rstrip())
    return lines
