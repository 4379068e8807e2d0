"""Hit rate as a function of cache size: a fitted curve, or the points that a replay of a route trace gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_cupy.plan.shapes import Model
from moe_cupy.plan.tables import table


@dataclass(frozen=True, slots=True)
class Curve:
    """h(f) = 1 - (1 - f^a)^b, or straight lines through ``points`` (share, hit rate) where there are some."""

    a: float
    b: float
    source: str
    points: tuple[tuple[float, float], ...] = ()

    def __call__(self, share: float) -> float:
        share = min(max(share, 0.0), 1.0)
        if not self.points:
            return 1 - (1 - share**self.a) ** self.b
        known = [(0.0, 0.0), *self.points]
        for (x0, y0), (x1, y1) in zip(known, known[1:], strict=False):
            if share <= x1:
                return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
        return known[-1][1]

    def formula(self, share: float) -> str:
        if self.points:
            return f"replay at {share:.1%} of all experts: {self.source}"
        return f"1 - (1 - {share:.4g}^{self.a})^{self.b}: {self.source}"


def curve_of(model: Model) -> Curve:
    """The model's own curve, otherwise the one whose experts are used most like its own."""
    rows = table("hits")
    if model.name in rows:
        row = rows[model.name]
        return Curve(row["a"], row["b"], row["source"])
    if not model.experts:
        return Curve(1.0, 1.0, "no experts")
    ratio = math.log(model.expert_count / model.expert_used_count)
    name = min(rows, key=lambda n: abs(math.log(rows[n]["experts"] / rows[n]["used"]) - ratio))
    return Curve(rows[name]["a"], rows[name]["b"], f"as {name}'s ({rows[name]['source']})")


def replayed(points: Sequence[tuple[float, float]], source: str) -> Curve:
    """A curve through what replays of a trace gave at some shares."""
    return Curve(1.0, 1.0, source, tuple(sorted(points)))


def spread_of(model: Model) -> float:
    """How unevenly a model's experts are used by the tokens of one batch: the shape of a gamma distribution."""
    rows = table("used")
    return float(rows.get(model.name, rows["default"])["shape"])
