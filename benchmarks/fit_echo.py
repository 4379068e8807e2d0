"""Fit the weights of the policy echo: python benchmarks/fit_echo.py TRACE … [--without NAME] [--replay 0.1,0.25].

Prints them as moe_cupy/cache/echo.toml holds them. Traces of one model share its weight. ``--without`` leaves out the
traces whose file name begins so, and ``--replay`` then replays these: what a model gets that was never seen.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np

from moe_cupy.cache.echo import LONGEST_REST, WINDOWS, Echo
from moe_cupy.cache.policies import Geometry
from moe_cupy.compiled.echo import CompiledEcho
from moe_cupy.lab.replay import replay, slots_of
from moe_cupy.lab.trace import RouteTrace, read_trace

TOKENS, ROWS, AT_ONCE, RECENT = 2500, 100_000, 16, 4


class Watched(Echo):
    """Shows what the policy bases its q on."""

    def habit_features(self, key: int) -> list[float]:
        """1, log-odds of use in the windows, log of the rest; as ``_learn_habit`` weighs them."""
        share, tokens = min(1 / self._experts, 0.5), self._token + 1
        uses = [(self._used[key] & bits).bit_count() + share for bits in self._windows]
        odds = [math.log(u / (min(w, tokens) + 1 - u)) for u, w in zip(uses, WINDOWS, strict=True)]
        rest = min(self._turn[key // self._experts] - self._last[key], LONGEST_REST)
        return [1.0, *odds, math.log(1 + rest)]

    def mix_features(self, key: int) -> list[float]:
        """1, habit, neighbours, and the same times the way to the layer's turn; as ``_look`` weighs them."""
        layer = key // self._experts
        if not self._found:
            self._find_neighbours()
        bits, total = self._turns[layer <= self._layer]
        self._learn_habit(key, self._turn[layer])
        uses = (self._used[key] & bits).bit_count() + self._prior[key]
        votes = math.log(uses / (total - uses))
        x = self._ahead(layer) / self._layers
        return [1.0, self._odds[key], votes, x, votes * x, self._odds[key] * x]

    def recent(self, key: int) -> bool:
        """Whether it was used in the last few tokens."""
        return self._last[key] >= self._token - RECENT


def rows(trace: RouteTrace, weights: dict[str, list[float]], kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, f] of random experts at random events, half of them recently used, and whether they came [n]."""
    tokens, layers, _ = trace.shape
    policy, rng = Watched(Geometry(1, layers, trace.n_experts), weights), random.Random(seed)
    keys = trace.key_rows()
    wanted = [[set(event) for event in row] for row in keys]
    features, labels = [], []
    for token in range(tokens - 1):
        for layer in range(layers):
            policy.begin(layer, keys[token][layer])
            if token == 0 or rng.random() > ROWS / AT_ONCE / (tokens * layers):
                continue
            for i in range(AT_ONCE):
                key = rng.randrange(trace.pairs)
                for _ in range(20 if i % 2 else 0):
                    if policy.recent(key):
                        break
                    key = rng.randrange(trace.pairs)
                of = key // trace.n_experts
                features.append(getattr(policy, f"{kind}_features")(key))
                labels.append(key in wanted[token + (of <= layer)][of])
    return np.array(features), np.array(labels, float)


def logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray, ridge: float = 0.01) -> np.ndarray:
    """Weights of a logistic regression by Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
        w += np.linalg.solve(hessian, x.T @ (weight * (y - p)) - ridge * w)
    return w


def fit(traces: dict[str, RouteTrace]) -> dict[str, list[float]]:
    """Both sets of weights; the second stage sees what the first gives."""
    models = [name.rpartition("_")[0] for name in traces]
    weights = {"habit": [0.0] * 5, "mix": [0.0] * 6}
    for kind in ("habit", "mix"):
        found = [rows(trace.part(0, min(TOKENS, len(trace.experts))), weights, kind, i)
                 for i, trace in enumerate(traces.values())]  # fmt: skip
        weight = [np.full(len(y), 1 / len(y) / models.count(m)) for (_, y), m in zip(found, models, strict=True)]
        x, y = (np.concatenate(parts) for parts in zip(*found, strict=True))
        weights[kind] = logistic(x, y, np.concatenate(weight) * ROWS).tolist()
    return weights


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("routes", nargs="+", metavar="TRACE")
    parser.add_argument("--without", default="", help="leave out traces whose name begins so")
    parser.add_argument("--replay", default="", help="capacities at which to replay those left out")
    args = parser.parse_args()
    traces = {Path(path).stem: read_trace(path) for path in args.routes}
    left_out = [name for name in traces if args.without and name.startswith(args.without)]
    weights = fit({name: trace for name, trace in traces.items() if name not in left_out})
    for kind, values in weights.items():
        print(f"{kind} = [{', '.join(f'{value:.4f}' for value in values)}]")
    for name in left_out if args.replay else []:
        for share in map(float, args.replay.split(",")):
            trace = traces[name]
            counts = replay(trace, partial(CompiledEcho, weights=weights), slots_of(trace, share))
            print(f"{name} at {share:.0%}: {100 * counts.hit_rate:.2f}% hits", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
