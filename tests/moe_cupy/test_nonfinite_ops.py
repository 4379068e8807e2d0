"""No op makes an ordinary number of one that is not finite: whatever is poisoned in its inputs shows in its outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moe_cupy.device import open_device
from moe_cupy.device.base import DeviceError
from moe_cupy.kernels.case import Case
from moe_cupy.kernels.cases import all_cases
from moe_cupy.kernels.kept import numbers_of
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.samples import SCALES_AT
from moe_cupy.kernels.table import OPS
from moe_cupy.tools.check import launch_on
from moe_ref.quants import BY_NAME

QUIET, LONGEST, NEGATIVE = 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF  # NaNs: what arithmetic makes, and all bits set
VALUES = [np.uint32(bits).view(np.float32) for bits in (QUIET, LONGEST, NEGATIVE, 0x7F800001, 0x7F800000, 0xFF800000)]
HALVES = (0x7E00, 0x7FFF, 0x7C00, 0xFC00)


@pytest.fixture(scope="module", params=["host f32", "host q8", "emulated f32", "emulated q8"])
def device(request) -> Iterator[Any]:
    name, act = request.param.split()
    try:
        opened, _ = open_device(name, 2, act)
    except DeviceError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def poisoned_matrix(w: Matrix, row: int, rng: np.random.Generator) -> Matrix:
    """One row of the matrix has a number, or a block's half-precision scale, that is not finite."""
    data, kind = w.data.copy().reshape(w.rows, -1), BY_NAME[w.type]
    if w.type in ("F32", "F16", "BF16"):
        width = data.shape[1] // w.cols
        bits = {"F32": 0x7FC00000, "F16": 0x7C00, "BF16": 0x7FFF}[w.type]
        at = width * rng.integers(w.cols)
        data[row, at : at + width] = np.frombuffer(int(bits).to_bytes(width, "little"), np.uint8)
    else:
        at = kind.block_bytes * rng.integers(data.shape[1] // kind.block_bytes) + rng.choice(SCALES_AT[w.type])
        data[row, at : at + 2] = np.array([rng.choice(HALVES)], np.uint16).view(np.uint8)
    return Matrix(w.type, w.rows, w.cols, data.reshape(-1))


def places(case: Case) -> list[str]:
    """Inputs of float32 that are read, or matrices; outputs that are read too count."""
    read = {"linear_add": ("out",), "add": ("out",), "combine": ("out",) if case.buffers.get("add") else ()}
    only_written = set(OPS[case.op].writes) - set(read.get(case.op, ())) - {"x", "gate"}
    found = [n for n, value in case.buffers.items() if n not in only_written and _is_poisonable(value)]
    nested = [f"{n}/{key}" for n in ("scales", "biases") for key in (case.buffers.get(n) or {}) if case.op == "experts"]
    return [name for name in found if not (case.op == "norm" and name == "out")] + nested


def _is_poisonable(value: Any) -> bool:
    if isinstance(value, list):
        return _is_poisonable(value[0])
    if isinstance(value, Matrix):
        return value.type in ("F32", "F16", "BF16") or bool(SCALES_AT.get(value.type))
    return isinstance(value, np.ndarray) and value.dtype == np.float32 and value.size > 0


def seen_part(case: Case, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of an input of which every number counts."""
    b = case.buffers
    whole = [slice(0, n) for n in shape]
    if case.op == "columns":
        whole[1] = slice(b["first"], b["first"] + b["count"])
    if case.op == "norm" and b["weight"] is not None:
        whole[-1] = slice(0, len(b["weight"]) if name == "x" else None)
    if case.op == "linear_heads" and name == "x":
        whole[-1] = slice(0, b["w"].cols)
    if case.op == "attention" and name in ("k", "v"):
        end = b["n_past"] + len(b["q"])
        whole[0] = slice(end - 1, end)  # what the last query sees in any case
        whole[-1] = slice(0, b["out"].shape[-1] if name == "v" else None)
    if case.op == "experts":
        token, rank, _ = wanted_pair(b)
        whole[0] = slice(token, token + 1)
        if name == "weights":
            whole[1] = slice(rank, rank + 1)
    return tuple(whole)


def wanted_pair(b: dict[str, Any]) -> tuple[int, int, int]:
    """A token, and rank and index among those wanted of one of its experts."""
    token, rank = np.argwhere(np.isin(b["ids"], b["wanted"]))[0].tolist()
    return token, rank, int(np.flatnonzero(b["wanted"] == b["ids"][token, rank])[0])


def poison(case: Case, name: str, rng: np.random.Generator) -> dict[str, Any]:
    buffers = copy.deepcopy(case.buffers)
    if case.op == "experts" and (name in ("gate", "up", "down") or "/" in name):
        token, rank, i = wanted_pair(buffers)
        if "/" in name:
            kind, matrix = name.split("/")
            buffers[kind][matrix][buffers["ids"][token, rank]] = VALUES[rng.integers(len(VALUES))]
        else:
            buffers[name][i] = poisoned_matrix(buffers[name][i], int(rng.integers(buffers[name][i].rows)), rng)
        return buffers
    value = buffers[name]
    if isinstance(value, Matrix):
        row = int(buffers["ids"][0]) if case.op == "embed" else int(rng.integers(value.rows))
        buffers[name] = poisoned_matrix(value, row, rng)
        return buffers
    part = value[seen_part(case, name, value.shape)]
    at = tuple(rng.integers(n) for n in part.shape)
    part[at] = VALUES[rng.integers(len(VALUES))]
    if case.op == "attention" and name == "k" and buffers["v"] is case.buffers["k"]:
        buffers["v"] = buffers["k"]
    return buffers


def bad_count(op: str, buffers: dict[str, Any]) -> int:
    """Numbers among an op's results that are not finite."""
    count = 0
    for name in OPS[op].writes:
        value = buffers[name]
        if op == "kv_store":
            value = numbers_of(value)
        count += int(np.count_nonzero(~np.isfinite(value))) if value.dtype.kind == "f" else 0
    return count


def hidden(device: Any, case: Case, rng: np.random.Generator) -> Iterator[str | None]:
    """For each place of a case that can be poisoned: what is wrong, None if the results show it."""
    clean = copy.deepcopy(case.buffers)
    launch_on(device, case.op, clean, case.outputs)
    before = bad_count(case.op, clean)
    for name in places(case):
        buffers = poison(case, name, rng)
        with np.errstate(all="ignore"):
            launch_on(device, case.op, buffers, case.outputs)
            yield None if bad_count(case.op, buffers) > before else f"{case.op}, {case.label}: {name}"


FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K", "Q2_K", "IQ4_NL", "IQ4_XS")


def test_what_is_not_finite_in_an_input_shows_in_the_results(device):
    formats, rng = [f for f in FORMATS if f in device.formats], np.random.default_rng(7)
    cases = list(all_cases(tuple(formats), 3))
    assert {case.op for case in cases} == set(OPS)
    found = [wrong for case in cases for wrong in hidden(device, case, rng)]
    assert len(found) > 300
    assert not list(filter(None, found)), "poisoned, and nothing shows"


def test_the_table_says_what_an_op_writes():
    for case in all_cases(("F32", "Q8_0"), 0):
        assert case.outputs == OPS[case.op].writes, case.op


@pytest.mark.slow
def test_what_is_not_finite_shows_in_every_format(device):
    rng = np.random.default_rng(11)
    cases = [
        case for case in all_cases(tuple(device.formats), 5) if any(_holds_matrix(v) for v in case.buffers.values())
    ]
    found = [wrong for case in cases for wrong in hidden(device, case, rng)]
    assert not list(filter(None, found)), "poisoned, and nothing shows"


def _holds_matrix(value: Any) -> bool:
    return isinstance(value, Matrix) or (isinstance(value, list) and isinstance(value[0], Matrix))
