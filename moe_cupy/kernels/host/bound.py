"""Launches of one token made ready: what they need is looked up once, and products of one vector make one list.

The kernels are those of ``ops``, called with the same arguments; only the token's position is still to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numba import njit

from moe_cupy.kernels.host import jobs as j
from moe_cupy.kernels.host import layer, ops, products, routing
from moe_cupy.kernels.host.rounding import new_panel, round_rows

Call = tuple[str, dict[str, Any]]  # op, buffers by name
Step = Callable[[int], None]  # takes the position
POSITIONS = ("position", "n_past")  # what ops call it


@njit("void(i8[::1], i8[:, ::1], f4[:, ::1], i8[::1])", nogil=True, cache=True)
def multiply_token(state, jobs, x, results):
    """Jobs [n, JOB] of matrices that round alike, all times x [1, cols]; products go to the addresses ``results`` [n].

    One vector is rounded sooner by the caller than by anybody who has to be told.
    """
    kind, cols = jobs[0, j.ROUNDING], jobs[0, j.COLS]
    panel = new_panel(kind, 1, cols)
    round_rows(kind, x, cols, np.zeros(1, np.int64), 1, panel, 0)
    for i in range(len(jobs)):
        products.give(jobs[i], panel, 0, results[i:].ctypes.data, 1)
    j.run(state, jobs, (panel, results))


def bind(split: ops.Split, calls: Sequence[Call], run_op: Callable[..., None]) -> Step:
    """All calls as one function; ``run_op(op, **buffers)`` does those that have nothing to be made ready."""
    steps = [_step(split, some, run_op) for some in _together(split, calls)]

    def run(position: int) -> None:
        for step in steps:
            step(position)

    return run


def _rounding(split: ops.Split, call: Call) -> int | None:
    """How a product rounds its vector, if the kernels of ``simd`` do all of it."""
    op, b = call
    act = split.crew.act
    plain = op in ("linear", "linear_add") and b.get("scale", 1.0) == 1.0 and b.get("bias") is None
    if not (plain and len(b["x"]) == 1 and products.takes(b["w"], act)):
        return None
    return int(products.job_of(b["w"], act)[j.ROUNDING])


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


def _step(split: ops.Split, calls: list[Call], run_op: Callable[..., None]) -> Step:
    (op, buffers), *_ = calls
    if _rounding(split, calls[0]) is not None:
        return _products(split, [b for _, b in calls]) if op == "linear" else _added(split, buffers)
    if op in READY:
        kernel, arguments = READY[op](**buffers)
        return lambda position: kernel(*arguments)
    key = next((name for name in POSITIONS if name in buffers), None)
    call = partial(run_op, op, **buffers)
    return (lambda position: call()) if key is None else (lambda position: call(**{key: position}))


def _products(split: ops.Split, several: Sequence[dict[str, Any]]) -> Step:
    """Products of one vector with one or more matrices."""
    crew, x = split.crew, several[0]["x"]
    jobs = np.stack([products.job_of(b["w"], crew.act) for b in several])
    outs = [b["out"] for b in several]
    results = np.array([products.address(out) for out in outs])

    def step(position: int) -> None:
        crew.wake()
        multiply_token(crew.state, jobs, x, results)

    return step


def _added(split: ops.Split, buffers: dict[str, Any]) -> Step:
    """A product that is added to what is there."""
    out = buffers["out"]
    y = np.empty_like(out)
    multiply = _products(split, [buffers | {"out": y}])

    def step(position: int) -> None:
        multiply(position)
        np.add(out, y, out)

    return step


def _rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str, first: int = 0) -> tuple[Any, tuple[Any, ...]]:
    return layer.rope, (x, cos, sin, style == "neox", first)


READY: dict[str, Callable[..., tuple[Callable[..., None], tuple[Any, ...]]]] = {  # op -> kernel and its arguments
    "norm": lambda **b: (layer.norm, ops.norm_arguments(**b)),
    "rope": _rope,
    "route": lambda **b: (routing.route, ops.route_arguments(**b)),
}
