"""The check of the op table can fail: a mistake of each kind, planted in each op, is caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from moe_cupy.device.host import HostDevice, RowSplitter
from moe_cupy.kernels.cases import all_cases
from moe_cupy.kernels.host import ops
from moe_cupy.kernels.table import OPS
from moe_cupy.tools.check import error_over_tolerance
from moe_ref.quants import BY_NAME
from tests.arrays import halves, weights

ALONE = RowSplitter(1)


@pytest.fixture(scope="module")
def device() -> Iterator[HostDevice]:
    opened = HostDevice(2)
    yield opened
    opened.close()


def skip_last_block(x: Any, w: Any, out: Any, **options: Any) -> None:
    x = x.copy()
    x[:, -BY_NAME[w.type].block_elements :] = 0
    ops.linear(ALONE, x, w, out, **options)


def add_up_in_half(x: Any, w: Any, out: Any, **_: Any) -> None:
    products = (x[:, None, :] * weights(w)).astype(np.float16)  # [T, rows, cols]
    out[...] = np.add.accumulate(products, axis=-1, dtype=np.float16)[..., -1]


def round_between(x: Any, ids: Any, wanted: Any, gate: Any, up: Any, down: Any, parts: Any, **_: Any) -> None:
    for i, e in enumerate(wanted):
        chosen = np.nonzero(ids == e)
        g, u = (x[chosen[0]].astype(np.float64) @ weights(w[i]).T for w in (gate, up))
        parts[chosen] = (g / (1 + np.exp(-g)) * u).astype(np.float16) @ weights(down[i]).T.astype(np.float64)


def fill_others(ids: Any, wanted: Any, parts: Any, **_: Any) -> None:
    parts[~np.isin(ids, wanted)] = 1


def next_rank(x: Any, parts: Any, **buffers: Any) -> None:
    ops.experts(ALONE, x=x, parts=parts, **buffers)
    parts[...] = np.roll(parts, 1, 1)


def instead_of_adding(op: str) -> Callable[..., None]:
    return lambda out, **buffers: (out.fill(0), getattr(ops, op)(ALONE, out=out, **buffers))


def change(op: str, **changes: Callable[..., Any]) -> Callable[..., None]:
    """The op with some buffers changed: each change is a function of all buffers."""

    return lambda **b: getattr(ops, op)(ALONE, **(b | {name: f(**b) for name, f in changes.items()}))


def always(value: Any, /, **_: Any) -> Any:
    return value


def then(op: str, spoil: Callable[..., None]) -> Callable[..., None]:
    """The op, and something done to its buffers afterwards."""

    return lambda **buffers: (getattr(ops, op)(ALONE, **buffers), spoil(**buffers))


def see_the_future(q: Any, k: Any, v: Any, n_past: int, scale: float, out: Any, **options: Any) -> None:
    options.pop("temperature", None)
    for t in range(len(q)):
        ops.attention(ALONE, q[t : t + 1], k, v, n_past + len(q) - 1, scale, out[t : t + 1], **options)


def ties_to_the_higher_id(logits: Any, ids: Any, **buffers: Any) -> None:
    ops.route(ALONE, logits=np.ascontiguousarray(logits[:, ::-1]), ids=ids, **buffers)
    ids[...] = logits.shape[1] - 1 - ids


def top_ties_to_the_higher_id(logits: Any, values: Any, ids: Any) -> None:
    ops.top_k(ALONE, np.ascontiguousarray(logits[:, ::-1]), values, ids)
    ids[...] = logits.shape[1] - 1 - ids


def swap_last(values: Any, ids: Any, **_: Any) -> None:
    for array in (values, ids):
        array[:, -2:] = array[:, : -3 if array.shape[1] > 2 else None : -1].copy()


def cut_to_half(new: np.ndarray, cache: np.ndarray, **_: Any) -> np.ndarray:
    cut = new.astype(cache.dtype)
    return np.where(np.abs(cut.astype(np.float32)) > np.abs(new), np.nextafter(cut, cut.dtype.type(0)), cut)


def ones_like(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else np.ones_like(x)


def other_heads(x: np.ndarray, out: np.ndarray, **buffers: Any) -> None:
    ops.linear_heads(ALONE, x=np.ascontiguousarray(x[:, ::-1]), out=out, **buffers)


def swap_ranks(ids: Any, weights: Any, **_: Any) -> None:
    for array in (ids, weights):
        array[:, :2] = array[:, 1::-1].copy()


MISTAKES: list[tuple[str, str, Callable[..., None]]] = [
    ("linear", "the last row is dropped", then("linear", lambda out, **_: out[:, -1:].fill(0))),
    ("linear", "the last block is skipped", skip_last_block),
    ("linear", "sums are kept in half precision", add_up_in_half),
    ("linear", "activations are rounded to half precision", change("linear", x=lambda x, **_: halves(x))),
    ("linear", "rows are off by one",
     change("linear", w=lambda w, **_: replace(w, data=np.roll(w.data, w.nbytes // w.rows)))),
    ("linear", "one element is NaN", then("linear", lambda out, **_: out[-1:, -1].fill(np.nan))),
    ("linear", "nothing is written", lambda **_: None),
    ("linear", "the input is overwritten", then("linear", lambda x, **_: x[:1, 0].fill(1))),
    ("linear_add", "the old value is lost", instead_of_adding("linear_add")),
    ("embed", "ids are off by one", change("embed", ids=lambda ids, table, **_: (ids + 1) % table.rows)),
    ("embed", "the last element is off by one ulp",
     then("embed", lambda out, **_: np.nextafter(out[:, -1], np.inf, out=out[:, -1]))),
    ("linear", "the bias is forgotten", change("linear", bias=lambda **_: None)),
    ("linear_add", "the scale is forgotten", change("linear_add", scale=lambda **_: 1.0)),
    ("linear_heads", "heads take each other's matrices", other_heads),
    ("linear_heads", "the bias is forgotten", change("linear_heads", bias=lambda **_: None)),
    ("linear_heads", "the scales are forgotten", change("linear_heads", scale=lambda **_: 1.0)),
    ("linear_heads", "what stands behind is written", then("linear_heads", lambda out, **_: out[..., -1:].fill(0))),
    ("norm", "the gain is forgotten", change("norm", weight=lambda weight, **_: ones_like(weight))),
    ("norm", "epsilon is forgotten", change("norm", epsilon=lambda **_: 0.0)),
    ("norm", "the sum is divided by width + 1",
     then("norm", lambda out, **_: np.multiply(out, np.float32(97 / 96) ** 0.5, out=out))),
    ("norm", "the bias is forgotten", change("norm", bias=lambda **_: None)),
    ("norm", "the mean is not taken out", change("norm", centred=lambda **_: False)),
    ("norm", "what stands behind is written", then("norm", lambda out, **_: out[..., -1:].fill(0))),
    ("columns", "the first is off by one", change("columns", first=lambda first, **_: first + 1)),
    ("columns", "the last is left out", change("columns", count=lambda count, **_: count - 1)),
    ("scale", "nothing is scaled", change("scale", factor=lambda **_: 1.0)),
    ("add", "the factor is forgotten", change("add", factor=lambda **_: 1.0)),
    ("add", "the old value is lost", instead_of_adding("add")),
    ("clamp", "low values are let through", lambda x, limit: np.minimum(x, limit, out=x)),
    ("softcap", "it is clamped", lambda x, limit: np.clip(x, -limit, limit, out=x)),
    *(("activate", f"{kind} instead of all", change("activate", kind=partial(always, kind)))
      for kind in ("silu", "gelu", "swiglu_oai")),
    ("sigmoid_gate", "the gate is multiplied with", lambda x, gate: np.multiply(x, gate, out=x)),
    ("sigmoid_gate", "rows share the first gate", change("sigmoid_gate", gate=lambda gate, **_: gate[:, :1].copy())),
    ("rope", "features before the first are turned", change("rope", first=lambda **_: 0)),
    ("hadamard", "nothing is rotated", lambda **_: None),
    ("hadamard", "runs are half as long as asked", change("hadamard", count=lambda count, **_: count // 2)),
    ("top_k", "ties go to the higher id", top_ties_to_the_higher_id),
    ("top_k", "the last two are exchanged", then("top_k", swap_last)),
    ("top_k", "values are those of other ids", then("top_k", lambda values, **_: np.add(values, 1, out=values))),
    ("attention", "the window is one too wide",
     change("attention", window=lambda window=0, **_: window + bool(window))),
    ("attention", "chunks slide", change("attention", chunked=lambda **_: False)),
    ("attention", "sinks are forgotten", change("attention", sinks=lambda **_: None)),
    ("attention", "the temperature is forgotten", change("attention", temperature=lambda **_: None)),
    ("convolve", "the kernel is reversed",
     change("convolve", kernel=lambda kernel, **_: np.ascontiguousarray(kernel[:, ::-1]))),
    ("convolve", "earlier inputs are forgotten", change("convolve", before=lambda before, **_: np.zeros_like(before))),
    ("convolve", "the state is not written", then("convolve", lambda before, after, **_: np.copyto(after, before))),
    ("delta_gates", "alpha and beta are exchanged",
     change("delta_gates", alpha=lambda beta, **_: beta, beta=lambda alpha, **_: alpha)),
    ("delta_gates", "the bias is forgotten", change("delta_gates", dt=lambda dt, **_: np.zeros_like(dt))),
    ("delta_rule", "heads are repeated instead of tiled", change("delta_rule", tiled=lambda **_: False)),
    ("delta_rule", "heads are tiled instead of repeated", change("delta_rule", tiled=lambda **_: True)),
    ("delta_rule", "nothing fades", change("delta_rule", fade=lambda fade, **_: np.ones_like(fade))),
    ("delta_rule", "all is corrected", change("delta_rule", share=lambda share, **_: np.ones_like(share))),
    ("delta_rule", "it begins afresh", change("delta_rule", before=lambda before, **_: np.zeros_like(before))),
    ("delta_rule", "the state is not written", then("delta_rule", lambda before, after, **_: np.copyto(after, before))),
    ("delta_rule", "the state is changed in place", then("delta_rule", lambda before, **_: before.fill(0))),
    ("route", "the selection bias is forgotten", change("route", bias=lambda **_: None)),
    ("route", "groups are forgotten", change("route", groups=lambda **_: 1)),
    ("route", "one group too many is used",
     change("route", groups_used=lambda groups=1, groups_used=1, **_: min(groups, groups_used + 1))),
    ("route", "logits choose", change("route", by_logit=lambda **_: True)),
    ("route", "softmax instead of all", change("route", gating=lambda **_: "softmax")),
    ("route", "sigmoid instead of all", change("route", gating=lambda **_: "sigmoid")),
    ("experts", "the scales are forgotten", change("experts", scales=lambda **_: None)),
    ("experts", "the biases are forgotten", change("experts", biases=lambda **_: None)),
    ("experts", "the input is not weighed", change("experts", weights=lambda **_: None)),
    ("experts", "silu instead of all", change("experts", activation=lambda **_: "silu")),
    ("combine", "the old value is kept", change("combine", add=lambda **_: True)),
    ("rope", "pairs are those of the other style",
     change("rope", style=lambda style, **_: {"neox": "norm", "norm": "neox"}[style])),
    ("rope", "it turns the other way", change("rope", sin=lambda sin, **_: -sin)),
    ("rope", "positions are off by one", change("rope", cos=lambda cos, **_: np.roll(cos, 1, 0))),
    ("kv_store", "the position is off by one", change("kv_store", position=lambda position, **_: position + 1)),
    ("kv_store", "the last token is lost", change("kv_store", new=lambda new, **_: new[:-1])),
    ("kv_store", "half precision is cut, not rounded", change("kv_store", new=cut_to_half)),
    ("attention", "the newest position is not seen",
     change("attention", k=lambda k, **_: np.roll(k, 1, 0), v=lambda v, **_: np.roll(v, 1, 0))),
    ("attention", "the position is off by one", change("attention", n_past=lambda n_past, **_: n_past + 1)),
    ("attention", "later tokens are seen", see_the_future),
    ("attention", "the scale is forgotten", change("attention", scale=lambda **_: 1.0)),
    ("attention", "heads meet the wrong keys", change("attention", k=lambda k, **_: np.ascontiguousarray(k[:, ::-1]))),
    ("attention", "keys are rounded to half precision", change("attention", k=lambda k, **_: halves(k))),
    ("attention", "values are rounded to half precision", change("attention", v=lambda v, **_: halves(v))),
    ("route", "ranks are swapped", then("route", swap_ranks)),
    ("route", "renormalisation is forgotten", change("route", renormalise=lambda **_: False)),
    ("route", "all weights are renormalised", change("route", renormalise=lambda **_: True)),
    ("route", "the scale is forgotten", change("route", scale=lambda **_: 1.0)),
    ("route", "ties go to the higher id", ties_to_the_higher_id),
    ("experts", "gate and up are exchanged", change("experts", gate=lambda up, **_: up, up=lambda gate, **_: gate)),
    ("experts", "the middle is rounded to half precision", round_between),
    ("experts", "results go to the next rank", next_rank),
    ("experts", "experts are exchanged", change("experts", wanted=lambda wanted, **_: wanted[::-1].copy())),
    ("experts", "only the first is computed", change("experts", wanted=lambda wanted, **_: np.array([wanted[0], 0]))),
    ("experts", "tokens that did not choose it are written", then("experts", fill_others)),
    ("combine", "the old value is lost", instead_of_adding("combine")),
    ("combine", "the last rank is lost",
     change("combine", parts=lambda parts, **_: np.ascontiguousarray(parts[:, :-1]),
            weights=lambda weights, **_: None if weights is None else np.ascontiguousarray(weights[:, :-1]))),
    ("combine", "weights are ignored", change("combine", weights=lambda **_: None)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "what", "wrong"), MISTAKES, ids=[f"{op}: {what}" for op, what, _ in MISTAKES])
def test_a_planted_mistake_is_caught(device, monkeypatch, op, what, wrong):
    assert {planted for planted, *_ in MISTAKES} == set(OPS)
    cases = [case for case in all_cases(("Q4_0", "Q6_K", "F32"), 1) if case.op == op]
    device.recover()
    honest = max(error_over_tolerance(case, device) for case in cases)
    monkeypatch.setitem(OPS, op, OPS[op]._replace(host=lambda split, **buffers: wrong(**buffers)))
    assert max(error_over_tolerance(case, device) for case in cases) > 1 >= honest, f"{op}: {what}"
