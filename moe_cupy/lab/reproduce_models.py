"""Published claims that need gate weights, hidden states or a model's own routing; or only arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from moe_cupy.cache.policies import LRU, Geometry
from moe_cupy.cache.published import HIGH_PRECISION_UP_TO
from moe_cupy.lab.replay import Cache
from moe_cupy.lab.trace import RouteTrace
from moe_ref import feed_forward
from moe_ref.model import Model
from moe_ref.norm import rms_norm
from moe_ref.routing import route, top_k

SKIP_ABOVE = 0.9  # HOBBIT's T2


def hobbit(trace: RouteTrace) -> Iterator[str]:
    """Claim: T1 = 0.6, T2 = 0.9 load 67% of Mixtral's experts in high precision, 30% in low, and skip 3%."""
    if trace.weights is None:
        yield "this trace holds no gate weights"
        return
    gates = -np.sort(-trace.weights.astype(np.float64), axis=2)
    gates /= gates.sum(axis=2, keepdims=True)
    before = np.cumsum(gates, axis=2) - gates
    high, skipped = (before <= HIGH_PRECISION_UP_TO).mean(), (before > SKIP_ABOVE).mean()
    yield f"high {100 * high:.1f}%, low {100 * (1 - high - skipped):.1f}%, skipped {100 * skipped:.1f}%"
    for k in (2, 4, 8):
        uniform = np.arange(k) / k
        yield f"  uniform gates, k={k}: {(uniform <= HIGH_PRECISION_UP_TO).sum()} high of {k}"


def thresholds(trace: RouteTrace | None = None) -> Iterator[str]:
    """Claims: fiddler's CPU takes up to n = 9; a batch is worth copying from 32 E/k tokens; q = 0.92 m, 0.51 m."""
    cpu, gpu = 7, 70  # fiddler's constants: a token on the CPU, an expert copied to the GPU
    best = max(n for n in range(1, 100) if cpu * n < gpu)
    yield f"fiddler: an absent expert of n tokens costs {cpu} n on the CPU, {gpu} on the GPU: CPU up to n = {best}"
    for name, experts, used in (("DeepSeek-V3", 256, 8), ("Qwen3-235B", 128, 8), ("DeepSeek-V2-Lite", 64, 6)):
        yield f"ik_llama.cpp: {name} ({experts}/{used}): copies from {math.floor(32 * experts / used)} tokens"
    for link, host, kind in ((57, 62, "each alone"), (38, 37, "measured together")):
        q = link / host if kind == "each alone" else link / (link + host)
        yield f"FreeToken: {link} and {host} GB/s, {kind}: fetch {q:.2f} of the misses, compute the others on the CPU"


def gate_reuse(model: Model, ids: Sequence[int]) -> Iterator[str]:
    """Claim: a later router on this layer's residual stream names about 90% one layer ahead, falling with distance.

    Layer l's residual stream (after its experts) goes through the norm and router of layer l + d. "own norm" takes
    layer l's gains instead: what the norm fix repairs.
    """
    seen: dict[str, np.ndarray] = {}
    model.observe = seen.__setitem__
    model.logits(ids)
    c, used = model.config, model.config.expert_used_count
    for distance in range(1, c.block_count):
        shares: dict[str, list[float]] = {"fixed": [], "own": []}
        for layer in range(c.block_count - distance):
            target, actual = layer + distance, seen[f"ffn_moe_topk-{layer + distance}"]
            for kind, gains in (("fixed", target), ("own", layer)):
                x = rms_norm(seen[f"l_out-{layer}"], model.weights[f"blk.{gains}.ffn_norm.weight"], c.norm_epsilon)
                guess = top_k(x @ model.weights[f"blk.{target}.ffn_gate_inp.weight"].T, used)
                both = [len(set(a) & set(b)) / used for a, b in zip(guess, actual, strict=True)]
                shares[kind].append(float(np.mean(both)))
        chance = used / c.expert_count
        yield (
            f"  {distance} layers ahead: recall {np.mean(shares['fixed']):.3f}, "
            f"with the wrong norm {np.mean(shares['own']):.3f} (chance {chance:.3f})"
        )


@contextmanager
def prior(strength: float, keep: int, slots: int, count: dict[str, int]) -> Iterator[None]:
    """Cache-Prior routing inside: logits of residents (and of the best ``keep``) are raised before the choice.

    z' = z + strength x range x resident; weights come from the original logits; a layer's LRU pool has ``slots``.
    """
    caches: dict[int, tuple[Cache, float, int]] = {}
    layer = 0

    def chosen(logits: np.ndarray, config: object, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        nonlocal layer
        k, experts = config.expert_used_count, logits.shape[1]  # type: ignore[attr-defined]
        cache, spread, seen = caches.get(layer) or (Cache(slots, LRU(Geometry(slots, 1, experts))), 0.0, 0)
        moved = np.full_like(logits, -np.inf)
        for row, out in zip(logits, moved, strict=True):
            seen, spread = seen + 1, spread + float(row.max() - row.min())
            raised = row.copy()
            favoured = {*cache.resident, *top_k(row[None], keep)[0].tolist()}
            raised[sorted(favoured)] += strength * spread / seen
            ids = top_k(raised[None], k)[0].tolist()
            out[ids] = row[ids]
            count["misses"] += len(cache.access(0, ids, None)[0])
            count["uses"] += k
        caches[layer] = cache, spread, seen
        layer = (layer + 1) % config.block_count  # type: ignore[attr-defined]
        return route(moved, config, bias)  # type: ignore[arg-type]

    feed_forward.route = chosen
    try:
        yield
    finally:
        feed_forward.route = route


def cache_prior(model: Model, ids: Sequence[int]) -> Iterator[str]:
    """Claim: misses halve with 25-50% of the experts resident, for at most 3% of perplexity (it changes the result)."""
    for share in (0.25, 0.5):
        slots = max(model.config.expert_used_count, int(share * model.config.expert_count))
        for strength in (0.0, 0.1, 0.2, 0.4):
            count = {"misses": 0, "uses": 0}
            nll = []
            with prior(strength, 1 if model.config.expert_used_count <= 2 else 2, slots, count):
                for at in range(0, len(ids) - 1, 256):
                    part = np.asarray(ids[at : at + 256])
                    logits = model.logits(part)[:-1].astype(np.float64)
                    top = logits.max(axis=1)
                    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
                    nll += (log_sum - logits[np.arange(len(part) - 1), part[1:]]).tolist()
            yield (
                f"  {share:.0%} resident, strength {strength}: {100 * count['misses'] / count['uses']:.1f}% misses, "
                f"perplexity {math.exp(np.mean(nll)):.3f}"
            )


ON_GATES: dict[str, Callable[[RouteTrace], Iterator[str]]] = {"hobbit": hobbit, "thresholds": thresholds}
ON_MODEL: dict[str, Callable[[Model, Sequence[int]], Iterator[str]]] = {
    "gate-reuse": gate_reuse,
    "cache-prior": cache_prior,
}
