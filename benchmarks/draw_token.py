"""Draw docs/token.png: one token's way through the engine, and the time line that its schedule gives.

    python benchmarks/draw_token.py  (needs matplotlib: `make test` and `make notebooks` install it)

The time line is no sketch: the engine decodes one token of the bundled model on the virtual device, with
costs chosen to make the overlap visible (attention 2, one expert 1.5, one read 2.5 units, two reads at once).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from moe_cupy.device.virtual import Span, VirtualDevice
from moe_cupy.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "data" / "moe-40m-Q4_K_M.gguf"
COSTS = {"attention": 2.0, "experts": 1.5}
READ = 2.5
LAYERS_SHOWN = 3
COLOURS = {"attention": "#4878a8", "experts": "#e08a3c", "read": "#7fae6b", "wait": "#d9d9d9"}
BOXES = (  # x, y, width, text, colour
    (0.0, 1.0, 1.0, "token\nembedding", "#eeeeee"),
    (1.5, 1.0, 1.3, "attention\n(KV cache)", "#c9d8e8"),
    (3.3, 1.0, 1.2, "router:\nk of E ids", "#c9d8e8"),
    (5.0, 1.0, 1.5, "cache plans:\nhits, loads, evicts", "#f2f2f2"),
    (7.0, 1.0, 1.6, "experts\nfrom their slots", "#f6dcc2"),
    (9.1, 1.0, 1.2, "residual,\nnext layer", "#eeeeee"),
    (10.8, 1.0, 1.2, "logits,\nsampler", "#eeeeee"),
    (5.0, -0.4, 1.5, "demand loads\n(then prefetch)", "#d5e6cd"),
    (7.0, -0.4, 1.6, "GGUF on disk,\nslice by slice", "#d5e6cd"),
)
ARROWS = (  # from, to, text
    ((1.0, 1.35), (1.5, 1.35)),
    ((2.8, 1.35), (3.3, 1.35)),
    ((4.5, 1.35), (5.0, 1.35)),
    ((6.5, 1.35), (7.0, 1.35)),
    ((8.6, 1.35), (9.1, 1.35)),
    ((10.3, 1.35), (10.8, 1.35)),
    ((5.75, 1.0), (5.75, 0.3)),
    ((6.5, -0.05), (7.0, -0.05)),
    ((7.8, 0.3), (7.8, 1.0)),
)


def draw_way(axis) -> None:
    """The boxes."""
    for x, y, width, text, colour in BOXES:
        style = {"boxstyle": "round,pad=0.02", "fc": colour, "ec": "#555555", "lw": 0.8}
        axis.add_patch(FancyBboxPatch((x, y), width, 0.7, **style))
        axis.text(x + width / 2, y + 0.35, text, ha="center", va="center", fontsize=9)
    for start, end in ARROWS:
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#555555"))
    bend = {"arrowstyle": "-|>", "color": "#555555", "connectionstyle": "arc3,rad=0.12"}
    axis.annotate("", (1.5, 1.85), (9.7, 1.85), arrowprops=bend)
    axis.text(5.6, 2.45, "once per layer", ha="center", fontsize=9, color="#555555")
    landing = "copy lands in the slot,\nits event lets the kernel go"
    axis.text(7.9, 0.65, landing, fontsize=8, color="#555555", va="center")
    axis.set(xlim=(-0.2, 12.2), ylim=(-0.7, 2.7))
    axis.axis("off")


def schedule(prefetch: str) -> list[Span]:
    """Spans of one decoded token, cache warm from the tokens before."""
    device = VirtualDevice(lambda op, buffers: COSTS.get(op, 0.0) * len(buffers.get("wanted", "1")), lambda name: READ)
    with Engine(MODEL, _device=device, cache="50%", policy="lru", prefetch=prefetch, reads_in_flight=2) as engine:
        for token in engine.encode("It is a truth universally acknowledged"):
            engine.decode(token)
        device.synchronize()
        begin, device.spans = device.now, []
        engine.decode(engine.encode(" that")[0])
    return [s._replace(start=s.start - begin, end=s.end - begin) for s in device.spans if s.end > s.start]


def draw_schedule(axis, prefetch: str, width: float) -> float:
    """One time line; returns when the shown layers end."""
    spans = schedule(prefetch)
    attentions = [s.start for s in spans if s.name == "attention"]
    end = attentions[LAYERS_SHOWN]
    lanes = ["compute", "expert-read-0", "expert-read-1"]
    for span in spans:
        if span.start < end and span.lane in lanes:
            kind = "read" if span.lane.startswith("expert-read") else span.name
            axis.barh(-lanes.index(span.lane), min(span.end, end) - span.start, left=span.start, height=0.7,
                      color=COLOURS[kind], edgecolor="white")  # fmt: skip
    for layer, start in enumerate(attentions[:LAYERS_SHOWN]):
        axis.axvline(start, color="#999999", lw=0.6, ls=":")
        axis.text(start + 0.1, 0.55, f"layer {layer}", fontsize=8, color="#555555")
    axis.set_yticks([0, -1, -2], ["compute", "read 1", "read 2"], fontsize=9)
    title = f"--prefetch {prefetch}: {LAYERS_SHOWN} layers take {end:g} units"
    axis.set(xlim=(0, width), ylim=(-2.6, 1.0), title=title)
    axis.title.set_fontsize(10)
    return end


def main() -> None:
    """Write the picture."""
    figure, axes = plt.subplots(3, 1, figsize=(11, 7.5), height_ratios=[1.5, 1, 1], layout="constrained")
    draw_way(axes[0])
    ends = [max(s.start for s in schedule(p) if s.name == "attention") for p in ("none", "next-gate")]
    width = max(ends) * (LAYERS_SHOWN + 1) / 6
    for axis, prefetch in zip(axes[1:], ("none", "next-gate"), strict=True):
        draw_schedule(axis, prefetch, width)
    axes[2].set_xlabel("time (units of the virtual device; gaps in compute are waits for experts)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[k]) for k in ("attention", "experts", "read")]
    axes[0].legend(handles, ["attention", "expert compute", "expert read"], loc="lower left", fontsize=8, frameon=False)
    figure.savefig(ROOT / "docs" / "token.png", dpi=110)


if __name__ == "__main__":
    main()
