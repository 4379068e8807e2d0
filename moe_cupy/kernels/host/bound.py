"""Launches of one token made ready: written once as ``steps``, products of one vector as one list.

What no step can do is launched as ever, between two runs of steps. Only the token's position is still to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from moe_cupy.kernels.host import jobs as j
from moe_cupy.kernels.host import layer, ops, products
from moe_cupy.kernels.host import steps as s
from moe_cupy.kernels.matrix import Matrix

Call = tuple[str, dict[str, Any]]  # op, buffers by name
Run = Callable[[int], None]  # takes the position
POSITIONS = ("position", "n_past")  # what ops call it


class Step(NamedTuple):
    """A row of ``steps``: numbers by field, and the arrays whose addresses are among them."""

    op: int
    fields: dict[int, int]
    held: tuple[Any, ...]


class Bound:
    """Calls made ready, as a function of the position. ``rows`` are its steps, if it is nothing but steps."""

    def __init__(self, runs: Sequence[Run], rows: np.ndarray | None, held: Any):
        self.rows, self._runs, self._held = rows, runs, held

    def __call__(self, position: int) -> None:
        for run in self._runs:
            run(position)


def bind(split: ops.Split, calls: Sequence[Call], run_op: Callable[..., None]) -> Bound:
    """All calls as one function; ``run_op(op, **buffers)`` does those that no step can do."""
    parts: list[Any] = []
    for together in _together(split, calls):
        parts += _steps(split, together) or [_launch(run_op, *together[0])]
    runs: list[Run] = []
    for is_step, several in groupby(parts, lambda part: isinstance(part, Step)):
        some = list(several)
        runs += [_program(split.crew, _rows(some))] if is_step else some
    all_steps = all(isinstance(part, Step) for part in parts)
    held = [part.held for part in parts if isinstance(part, Step)]
    return Bound(runs, _rows(parts) if all_steps else None, held)


def _rows(steps: Sequence[Any]) -> np.ndarray:
    """Steps as int64 [n, STEP]."""
    rows = np.zeros((len(steps), s.STEP), np.int64)
    for row, step in zip(rows, steps, strict=True):
        row[s.OP] = step.op
        row[list(step.fields)] = list(step.fields.values())
    return rows


def _program(crew: products.Crew, rows: np.ndarray) -> Run:
    """Steps in one call."""
    state, shared = crew.state, bool(np.isin(rows[:, s.OP], (s.MULTIPLY, s.ATTEND)).any())

    def run(position: int) -> None:
        if shared:
            crew.wake()
        s.run_steps(state, rows, position)

    return run


def _launch(run_op: Callable[..., None], op: str, buffers: dict[str, Any]) -> Run:
    key = next((name for name in POSITIONS if name in buffers), None)
    call = partial(run_op, op, **buffers)
    return (lambda position: call()) if key is None else (lambda position: call(**{key: position}))


def _rounding(split: ops.Split, call: Call) -> int | None:
    """How a product rounds its vector, if the kernels of ``simd`` do all of it."""
    op, b = call
    if op not in ("linear", "linear_add") or len(b["x"]) != 1 or not products.takes(b["w"], split.crew.act):
        return None
    return int(products.job_of(b["w"], split.crew.act)[j.ROUNDING])


def _together(split: ops.Split, calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Calls one by one, but neighbours that multiply the same rounded vector as one list."""
    group: list[Call] = []
    for call in calls:
        kind = _rounding(split, call)
        same = group and call[0] == group[0][0] == "linear" and call[1]["x"] is group[0][1]["x"]
        if same and kind is not None and kind == _rounding(split, group[0]):
            group.append(call)
            continue
        if group:
            yield group
        group = [call]
    if group:
        yield group


def _steps(split: ops.Split, calls: list[Call]) -> list[Any]:
    """The steps of a call, or of products of one vector; none if there is no step for it."""
    (op, buffers), *_ = calls
    if not all(_is_whole(array) for _, b in calls for array in b.values()):
        return []
    if _rounding(split, calls[0]) is not None:
        several = [b for _, b in calls]
        return _products(split.crew, several) if op == "linear" else _added(split.crew, buffers)
    step = READY[op](**buffers) if op in READY else None
    return [] if step is None else [step]


def _is_whole(array: Any) -> bool:
    """Whether its numbers stand side by side, if it is an array."""
    return not isinstance(array, np.ndarray) or array.flags.c_contiguous


def bits(x: float) -> int:
    """Those of a float32."""
    return int(np.float32(x).view(np.int32))


def _made(op: int, arrays: dict[int, Any], **numbers: int) -> Step:
    """A step from arrays by the field of their address (None: there is none), and numbers by the field's name."""
    fields = {getattr(s, name): int(number) for name, number in numbers.items()}
    for field, array in arrays.items():
        fields[field] = 0 if array is None else products.address(array)
    return Step(op, fields, tuple(arrays.values()))


def _size(x: np.ndarray | None) -> int:
    return 0 if x is None else x.size


def _products(crew: products.Crew, several: Sequence[dict[str, Any]]) -> list[Step]:
    """Products of one vector with one or more matrices, then scales and biases."""
    x, jobs = several[0]["x"], np.stack([products.job_of(b["w"], crew.act) for b in several])
    results = np.array([products.address(b["out"]) for b in several])
    matrices = tuple(b["w"].data for b in several if isinstance(b["w"], Matrix))
    product = _made(s.MULTIPLY, {s.X: x, s.JOBS: jobs, s.RESULTS: results}, N=len(jobs), WIDTH=x.shape[-1])
    steps = [product._replace(held=(*product.held, *matrices, *(b["out"] for b in several)))]
    for b in several:
        scale, bias = b.get("scale", 1.0), b.get("bias")
        if scale != 1.0 or bias is not None:
            arrays = {s.X: b["out"], s.BIAS: bias}
            steps.append(_made(s.ADJUST, arrays, N=b["out"].size, FACTOR=bits(scale), BIASES=_size(bias)))
    return steps


def _added(crew: products.Crew, buffers: dict[str, Any]) -> list[Step]:
    """A product that is added to what is there."""
    y = np.empty_like(buffers["out"])
    return [*_products(crew, [buffers | {"out": y}]), _add(y, 1.0, buffers["out"])]


def _add(x: np.ndarray, factor: float, out: np.ndarray) -> Step:
    return _made(s.ADD, {s.X: x, s.OUT: out}, N=x.size, FACTOR=bits(factor))


def _scale(x: np.ndarray, factor: float) -> Step:
    return _made(s.ADJUST, {s.X: x}, N=x.size, FACTOR=bits(factor), BIASES=0)


def _norm(**buffers: Any) -> Step:
    x, counted, weight, bias, epsilon, centred, out = ops.norm_arguments(**buffers)
    return _made(
        s.NORM, {s.X: x, s.OUT: out, s.WEIGHT: weight, s.BIAS: bias}, ROWS=len(x), N=x.shape[1], WIDTH=counted,
        WEIGHTS=weight.size, BIASES=bias.size, EPSILON=bits(epsilon), CENTRED=centred,
    )  # fmt: skip


def _rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str, first: int = 0) -> Step | None:
    if len(x) != 1:
        return None
    arrays, neox = {s.X: x, s.COS: cos, s.SIN: sin}, style == "neox"
    return _made(s.ROPE, arrays, ROWS=x.shape[1], N=x.shape[2], HALF=cos.shape[1], NEOX=neox, FIRST=first)


def _kv_store(cache: np.ndarray, new: np.ndarray, position: int) -> Step | None:
    if len(new) != 1 or cache.dtype not in ops.NATIVE:
        return None
    return _made(s.STORE, {s.X: new, s.OUT: cache}, N=new.size, HALVES=ops.NATIVE[cache.dtype])


def _attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, n_past: int, scale: float, out: np.ndarray, *, window: int = 0,
    chunked: bool = False, sinks: Any = None, temperature: Any = None,
) -> Step | None:  # fmt: skip
    if len(q) != 1 or temperature is not None or not {k.dtype, v.dtype} <= ops.NATIVE.keys():
        return None
    arrays = {s.X: q, s.KEYS: k, s.VALUES: v, s.OUT: out, s.SCALE: np.full(1, scale, np.float32), s.SINKS: sinks}
    return _made(
        s.ATTEND, arrays, N=q.shape[1], GROUPS=k.shape[1], KEY=q.shape[2], KEPT=v.shape[2], VALUE=out.shape[2],
        SINK=_size(sinks), WINDOW=window, CHUNKED=chunked, KEY_TYPE=ops.NATIVE[k.dtype], VALUE_TYPE=ops.NATIVE[v.dtype],
    )  # fmt: skip


def _route(**buffers: Any) -> Step | None:
    logits, bias, (gating, by_logit, groups, used, renormalise), scale, ids, weights = ops.route_arguments(**buffers)
    if len(logits) != 1:
        return None
    return _made(
        s.ROUTE, {s.X: logits, s.OUT: weights, s.BIAS: bias, s.CHOICE: ids}, N=logits.shape[1], CHOSEN=ids.shape[1],
        BIASES=bias.size, GATING=gating, BY_LOGIT=by_logit, OF=groups, USED=used, RENORMALISE=renormalise,
        BY=bits(scale),
    )  # fmt: skip


def _combine(parts: np.ndarray, weights: np.ndarray | None, out: np.ndarray, add: bool = True) -> Step | None:
    if len(parts) != 1:
        return None
    _, chosen, width = parts.shape
    return _made(s.COMBINE, {s.X: parts, s.SHARES: weights, s.OUT: out}, CHOSEN=chosen, N=width, ADDS=add)


def _activate(gate: np.ndarray, up: np.ndarray, kind: str) -> Step | None:
    known = len(gate) == 1
    return _made(s.ACTIVATE, {s.X: gate, s.OUT: up}, N=gate.size, KIND=layer.ACTIVATIONS[kind]) if known else None


def _sigmoid_gate(x: np.ndarray, gate: np.ndarray) -> Step | None:
    return _made(s.GATE, {s.X: x, s.OUT: gate}, N=x.size, WIDE=gate.size) if len(x) == 1 else None


READY: dict[str, Callable[..., Step | None]] = {  # op -> its step; None where it has none for these buffers
    "norm": _norm, "rope": _rope, "kv_store": _kv_store, "attention": _attention, "route": _route, "add": _add,
    "scale": _scale, "combine": _combine, "activate": _activate, "sigmoid_gate": _sigmoid_gate,
}  # fmt: skip
