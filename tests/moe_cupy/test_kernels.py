"""Host kernels are right on every format and at every split, and the check that says so catches planted mistakes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_cupy.device import host
from moe_cupy.device.host import HostDevice, RowSplitter
from moe_cupy.kernels.case import Case
from moe_cupy.kernels.cuda.sources import FORMATS
from moe_cupy.kernels.host import ops
from moe_cupy.kernels.host.matmul import SUPPORTED
from moe_cupy.kernels.layer_cases import attention_case
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.samples import SCALES_AT, random_matrix
from moe_cupy.kernels.table import OPS
from moe_cupy.tools.check import check_ops, compare_logits, error_over_tolerance
from moe_ref.quants import BY_NAME
from tests.arrays import weights

ALONE = RowSplitter(1)


@pytest.fixture(scope="module")
def device() -> Iterator[HostDevice]:
    opened = HostDevice(2)
    yield opened
    opened.close()


def same_bits(got: np.ndarray, want: np.ndarray, context: str) -> None:
    a, b = (np.where(np.isnan(array), np.nan, array).astype(np.float32).view(np.uint32) for array in (got, want))
    wrong = np.argwhere(a != b)
    assert a.shape == b.shape and not len(wrong), (
        f"{context}: {len(wrong)} of {a.size} differ, first at {wrong[:1].tolist()}: "
        f"{a[tuple(wrong[0])]:#010x}, expected {b[tuple(wrong[0])]:#010x}"
    )


@pytest.mark.parametrize("seed", range(6))
def test_every_op_on_every_format_stays_within_its_tolerance(device, seed):
    outcomes = list(check_ops(device, SUPPORTED, seed))
    assert {o.name for o in outcomes} == set(OPS), "an op without a case is not checked"
    for o in outcomes:
        assert o.passed, f"seed {seed}: {o.name} is off by {o.worst} of what is allowed, worst at {o.where}"


def test_the_tolerances_are_not_slack(device):
    """Of what is allowed, the float32 kernels use at least a thousandth somewhere (the exact ops use nothing)."""
    exact = {"embed", "kv_store", "columns", "clamp", "top_k"}
    for o in check_ops(device, SUPPORTED, 0):
        assert o.worst == 0 if o.name in exact else o.worst > 0.001, f"{o.name}: only {o.worst}"


@pytest.mark.parametrize(("off", "passes"), [(0, True), (0.9, True), (1.1, False), (np.nan, False)])
def test_logits_may_be_off_by_a_thousandth_of_their_spread(off, passes):
    want = np.random.default_rng(0).normal(0, 2, (3, 50))
    got = want.copy()
    got[2, 3] += off * 1e-3 * want.std()
    assert compare_logits("one", got, want).passed == passes


def test_logits_must_agree_in_the_first_choice_even_where_it_leads_narrowly():
    want, got = np.array([[0.0, 1.0, 1.0005]]), np.array([[0.0, 1.0006, 1.0005]])
    assert not compare_logits("model", got, want).passed


# Half-precision scales: zeros, denormals, smallest normal, largest, infinities, NaN
ODD_HALVES = np.array([0, 0x8000, 1, 0x83FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7D01], "<u2")


def any_bytes(kind: str, seed: int, rows: int, row_blocks: int) -> Matrix:
    """Rows of any bytes at all, every other block with odd scales."""
    rng, t = np.random.default_rng(seed), BY_NAME[kind]
    raw = rng.integers(0, 256, (rows * row_blocks, t.block_bytes), np.uint8)
    odd = raw[::2]
    for at in SCALES_AT.get(kind, ()):
        odd[:, at : at + 2] = rng.choice(ODD_HALVES, (len(odd), 1)).view(np.uint8)
    return Matrix(kind, rows, row_blocks * t.block_elements, raw.reshape(-1))


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_any_bytes_decode_to_the_references_bits(kind, seed):
    table = any_bytes(kind, seed, 60, 96 if BY_NAME[kind].block_elements == 1 else 5)
    ids = np.random.default_rng(seed).permutation(table.rows).astype(np.int32)
    out = np.full((table.rows, table.cols), -1, np.float32)
    ops.embed(ALONE, table, ids, out)
    want = weights(table)[ids]
    has_odd = np.isnan(want).any() or not SCALES_AT.get(kind, (0,))
    assert has_odd and np.isfinite(want).mean() > 0.3, "the bytes must be odd, but not all"
    same_bits(out, want, f"{kind}, seed {seed}")


@pytest.mark.parametrize(("kind", "dtype"), [("F16", np.float16), ("BF16", None)])
def test_each_of_the_65536_halves_decodes_to_its_value(kind, dtype):
    every = np.arange(65536, dtype="<u2")
    out = np.empty((1, 65536), np.float32)
    ops.embed(ALONE, Matrix(kind, 1, 65536, every.view(np.uint8)), np.zeros(1, np.int32), out)
    want = every.view("<f2").astype(np.float32) if dtype else (every.astype(np.uint32) << 16).view(np.float32)
    same_bits(out[0], want, kind)


def test_host_and_cuda_take_the_same_formats():
    assert set(SUPPORTED) == set(FORMATS) and len(set(SUPPORTED)) == len(SUPPORTED)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_multiplying_by_the_identity_gives_the_weights_themselves(kind):
    w = random_matrix(np.random.default_rng(2), kind, 11, max(64, BY_NAME[kind].block_elements))
    out = np.full((w.cols, w.rows), np.nan, np.float32)
    ops.linear(ALONE, np.eye(w.cols, dtype=np.float32), w, out)
    same_bits(out.T + 0.0, weights(w) + 0.0, kind)  # + 0.0: a sum may end in either zero


@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_product_is_the_same_bits_at_any_split_and_number_of_tokens(monkeypatch, kind):
    monkeypatch.setattr(host, "SPLIT_WORK", 1)
    rng = np.random.default_rng(5)
    w = random_matrix(rng, kind, 37, 3 * max(32, BY_NAME[kind].block_elements))
    x = rng.normal(0, 1, (7, w.cols)).astype(np.float32)
    want = np.empty((7, w.rows), np.float32)
    ops.linear(ALONE, x, w, want)
    for threads in (2, 3):
        split, got = RowSplitter(threads), np.full_like(want, np.nan)
        ops.linear(split, x, w, got)
        split.close()
        same_bits(got, want, f"{kind}, {threads} threads")
    for n in (1, 2, 5):
        got = np.full_like(want[:n], np.nan)
        ops.linear(ALONE, x[7 - n :].copy(), w, got)
        same_bits(got, want[7 - n :], f"{kind}, {n} of 7 tokens")


def test_other_ops_give_a_token_the_same_bits_alone_and_among_others(monkeypatch):
    monkeypatch.setattr(host, "SPLIT_WORK", 1)
    rng, split = np.random.default_rng(6), RowSplitter(3)
    q, k, v = (rng.normal(0, 1, shape).astype(np.float32) for shape in ((7, 6, 40), (30, 2, 40), (30, 2, 24)))
    x, (gate, up, down) = q[:, 0, :32].copy(), [random_matrix(rng, "Q8_0", 32, 32) for _ in range(3)]
    mixed, parts = np.empty((7, 6, 24), np.float32), np.zeros((7, 2, 32), np.float32)
    ops.attention(split, q, k, v, 23, 0.1, mixed)
    ids, wanted = np.tile(np.array([3, 5], np.int32), (7, 1)), np.array([5])
    ops.experts(split, x, ids, wanted, [gate], [up], [down], parts=parts)
    for t in range(7):
        alone, part = np.empty((1, 6, 24), np.float32), np.zeros((1, 2, 32), np.float32)
        ops.attention(ALONE, q[t : t + 1], k, v, 23 + t, 0.1, alone)
        ops.experts(ALONE, x[t : t + 1], ids[:1], wanted, [gate], [up], [down], parts=part)
        same_bits(alone[0], mixed[t], f"attention, token {t}")
        same_bits(part[0], parts[t], f"experts, token {t}")
    split.close()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_rows_are_split_without_gap_or_overlap(threads):
    split, lock = RowSplitter(threads), threading.Lock()
    for rows in (0, 1, 2, 3, 10, 1000):
        for work in (1, 1 << 10, 1 << 20):
            pieces: list[tuple[int, int]] = []

            def kernel(a: int, b: int, pieces: list[tuple[int, int]] = pieces) -> None:
                with lock:
                    pieces.append((a, b))

            split(kernel, rows, work)
            assert sorted(r for a, b in pieces for r in range(a, b)) == list(range(rows)), f"{rows} x {work}: {pieces}"
            assert len(pieces) >= min(threads, rows) or work < 1 << 20, f"{rows} x {work}: {pieces}"
            assert len(pieces) <= threads or rows * work > host.CALL_WORK, f"{rows} x {work}: {pieces}"
    split.close()


def test_norm_may_write_where_it_reads():
    rng = np.random.default_rng(3)
    x, gain = rng.normal(0, 1, (5, 3, 77)).astype(np.float32), rng.normal(1, 1, 77).astype(np.float32)
    apart = np.empty_like(x)
    ops.norm(ALONE, x, gain, 1e-5, apart)
    ops.norm(ALONE, x, gain, 1e-5, x)
    same_bits(x, apart, "in place")


def test_rope_turns_its_argument_by_the_angle_and_leaves_the_rest():
    """A quarter turn takes (a, b) to (-b, a); features behind the rotated ones stay."""
    cos, sin = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    for style, want in (("neox", [-3, -4, 1, 2, 5]), ("norm", [-2, 1, -4, 3, 5])):
        x = np.array([[[1, 2, 3, 4, 5]]], np.float32)
        ops.rope(ALONE, x, cos, sin, style)
        assert x.tolist() == [[want]], style


def routed(logits: np.ndarray, used: int, renormalise: bool = True) -> tuple[np.ndarray, np.ndarray]:
    ids, chosen = np.full((len(logits), used), -1, np.int32), np.full((len(logits), used), np.nan, np.float32)
    ops.route(ALONE, np.ascontiguousarray(logits, np.float32), 1.0, renormalise, ids, chosen)
    return ids, chosen


def test_route_ties_go_to_the_lowest_id():
    ids, chosen = routed(np.array([[1, 3, 3, 0, 3], [2, 2, 2, 2, 2], [0, 0, 1, 0, 1]]), 4)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [2, 4, 0, 1]]
    assert chosen[1].tolist() == [0.25] * 4


ODD_LOGITS = st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0.0, 1.0, -1.0])


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(4, 12)), elements=ODD_LOGITS), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_route_keeps_ids_in_range_and_distinct_whatever_the_logits(logits, used):
    ids, chosen = routed(logits, used)
    for row in ids.tolist():
        assert len(set(row)) == used and min(row) >= 0 and max(row) < logits.shape[1], row
    for row, weight in zip(logits, chosen, strict=True):
        if np.isfinite(row).all():
            assert np.isfinite(weight).all() and abs(weight.sum() - 1) < 1e-5, (row, weight)


def halved(case: Case) -> Case:
    caches = {name: case.buffers[name].astype(np.float16) for name in "kv"}
    return replace(case, buffers=case.buffers | caches, allowed=lambda: {"out": 1.01 * case.allowed()["out"]})


@pytest.mark.parametrize(("shape", "n_past"), [((1, 8, 4, 32, 32), 40), ((7, 6, 2, 48, 20), 3), ((1, 1, 1, 16, 16), 0)])
def test_attention_reads_half_precision_caches_as_the_values_they_hold(device, shape, n_past):
    case = attention_case(np.random.default_rng(4), shape, n_past)
    assert error_over_tolerance(halved(case), device) <= 1
    exact = {name: case.buffers[name].copy() for name in ("q", "k", "v", "out")}
    OPS["attention"].reference(**(case.buffers | {"out": exact["out"]}))
    got = case.buffers["out"].copy()
    ops.attention(ALONE, **(halved(case).buffers | {"out": got}))
    assert np.abs(got - exact["out"]).max() > case.allowed()["out"], "the caches' rounding must show"
