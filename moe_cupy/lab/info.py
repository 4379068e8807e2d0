"""What a trace looks like: skew, reuse, overlap with the token before, entropy; and its pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_cupy.lab.trace import RouteTrace

NEVER = -1


def one_hot(trace: RouteTrace) -> np.ndarray:
    """Which experts were used: bool [T, L, E]."""
    used = np.zeros((*trace.shape[:2], trace.n_experts), bool)
    np.put_along_axis(used, trace.experts.astype(np.int64), True, axis=2)
    return used


def uses(trace: RouteTrace) -> np.ndarray:
    """How many tokens used each expert: int [L, E]."""
    return one_hot(trace).sum(axis=0)


def overlap(trace: RouteTrace) -> np.ndarray:
    """Mean share of a token's experts that the token before used too, inside a sequence: float [L]."""
    used = one_hot(trace)
    both = (used[1:] & used[:-1]).sum(axis=2) / trace.shape[2]  # [T-1, L]
    inside = np.ones(len(both), bool)
    inside[trace.starts[1:] - 1] = False
    return both[inside].mean(axis=0) if inside.any() else np.zeros(trace.shape[1])


def entropy_bits(trace: RouteTrace) -> np.ndarray:
    """Entropy of each layer's use counts in bits, at most log2(E): float [L]."""
    share = uses(trace) / uses(trace).sum(axis=1, keepdims=True)
    return -(share * np.log2(share, out=np.zeros_like(share, float), where=share > 0)).sum(axis=1)


def skew(trace: RouteTrace, share: float = 0.1) -> float:
    """Share of all accesses that the most used ``share`` of all (layer, expert) pairs take."""
    counts = np.sort(uses(trace).ravel())[::-1]
    return float(counts[: max(1, round(share * len(counts)))].sum() / counts.sum())


def reuse_tokens(trace: RouteTrace) -> np.ndarray:
    """Tokens since the last use of the same (layer, expert), for every access that has one: int [n]."""
    gaps = []
    for layer in one_hot(trace).transpose(1, 2, 0):  # [E, T]
        for row in layer:
            gaps.append(np.diff(np.flatnonzero(row)))
    return np.concatenate(gaps)


def union_growth(trace: RouteTrace, windows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)) -> dict[int, float]:
    """Mean number of distinct experts that ``j`` consecutive tokens of a sequence use in a layer."""
    used, grown = one_hot(trace), {}
    for j in windows:
        pieces = [used[i : i + j].any(axis=0).sum(axis=1) for a, b in trace.sequences() for i in range(a, b - j + 1, j)]
        if pieces:
            grown[j] = float(np.mean(pieces))
    return grown


def describe(trace: RouteTrace) -> dict[str, Any]:
    """The figures, ready for JSON."""
    tokens, layers, k = trace.shape
    gaps = reuse_tokens(trace)
    return {
        "tokens": tokens,
        "sequences": len(trace.starts),
        "layers": layers,
        "experts": trace.n_experts,
        "top_k": k,
        "touched": float((uses(trace) > 0).mean()),
        "top_10_percent_of_experts_take": skew(trace),
        "overlap_with_previous_token": float(overlap(trace).mean()),
        "overlap_of_uniform_choices": k / trace.n_experts,
        "entropy_bits": float(entropy_bits(trace).mean()),
        "entropy_bits_at_most": float(np.log2(trace.n_experts)),
        "reuse_tokens_median": float(np.median(gaps)) if len(gaps) else None,
        "reuse_tokens_90_percent": float(np.quantile(gaps, 0.9)) if len(gaps) else None,
        "distinct_in_tokens": {str(j): round(n, 3) for j, n in union_growth(trace).items()},
        "entropy_bits_by_layer": [round(float(x), 3) for x in entropy_bits(trace)],
        "overlap_by_layer": [round(float(x), 3) for x in overlap(trace)],
        "has": [n for n in ("weights", "router", "ahead", "phase") if getattr(trace, n) is not None],
    }


def text(facts: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    return "\n".join(f"{name.replace('_', ' '):32} {_shown(value)}" for name, value in facts.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " ".join(str(x) for x in value) or "-"
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def plot(trace: RouteTrace, title: str) -> Any:
    """Four pictures in one figure: use of every expert, skew, reuse distance, overlap and entropy by layer."""
    from moe_cupy.lab.report import pyplot

    plt = pyplot()
    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    counts = uses(trace)
    image = a.imshow(counts / len(trace.experts), aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=a, label="share of tokens")
    a.set(title="Who is used", xlabel="expert", ylabel="layer")
    ordered = np.sort(counts.ravel())[::-1]
    b.plot(np.arange(1, len(ordered) + 1) / len(ordered) * 100, np.cumsum(ordered) / ordered.sum() * 100)
    b.plot([0, 100], [0, 100], ":", color="grey", label="uniform")
    b.set(title="Skew", xlabel="most used experts (%)", ylabel="of all accesses (%)")
    b.legend()
    gaps = np.sort(reuse_tokens(trace))
    c.step(gaps, np.arange(1, len(gaps) + 1) / max(1, len(gaps)) * 100)
    c.set(title="Tokens until an expert is used again", xlabel="tokens", ylabel="of accesses (%)", xscale="log")
    layers = np.arange(trace.shape[1])
    d.plot(layers, 100 * overlap(trace), label="same as for the token before (%)")
    d.plot(layers, 100 * entropy_bits(trace) / np.log2(max(2, trace.n_experts)), label="entropy, of its maximum (%)")
    d.axhline(100 * trace.shape[2] / trace.n_experts, ls=":", color="grey", label="overlap of uniform choices (%)")
    d.set(title="Layer by layer", xlabel="layer", ylim=(0, 105))
    d.legend()
    figure.suptitle(title)
    return figure
