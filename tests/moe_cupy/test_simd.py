"""Products with rounded activations: every format and instruction set, any number of vectors, any number of threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moe_cupy.device.crew import Crew
from moe_cupy.device.host import HostDevice, RowSplitter
from moe_cupy.engine import Engine
from moe_cupy.kernels.host import jobs, ops, products, rounding
from moe_cupy.kernels.host.simd import compiler, isa
from moe_cupy.kernels.host.simd.rows import BLOCKS, FLOATS, FORMATS, row_kernel
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.samples import SCALES_AT, U, random_matrix
from moe_cupy.tools.check import compare_rounded
from moe_ref.quants import BY_NAME, dequantize
from moe_ref.quants.activations import DOT_TYPES, quantize_q8_0, quantize_q8_k, round_for, round_half, round_to
from tests.conftest import SHARED
from tests.models import Shape, tiny_moe

QUANTS = SHARED / "data" / "golden" / "quants"
TRAINED = Path(__file__).resolve().parents[2] / "data" / "moe-40m-Q4_K_M.gguf"
ROWS, COLS = 19, 768


@pytest.fixture(params=isa.SETS)
def instructions(request, monkeypatch):
    """Each instruction set that this CPU has, in turn, for all products."""
    if request.param not in isa.usable():
        pytest.skip(f"this CPU has no {request.param}")
    caches = (isa.chosen, products.template, compiler.rows_address)
    monkeypatch.setenv(isa.VARIABLE, request.param)
    for one in caches:
        one.cache_clear()
    yield request.param
    monkeypatch.undo()
    for one in caches:
        one.cache_clear()


@cache
def matrix(kind: str, cols: int = COLS) -> Matrix:
    return random_matrix(np.random.default_rng(7), kind, ROWS, cols)


def vectors(count: int, seed: int = 1, cols: int = COLS) -> np.ndarray:
    """Numbers of very different sizes, and among them a block of zeros."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(0, 1, (count, cols)) * np.exp(rng.normal(0, 1, (count, cols)))).astype(np.float32)
    x[0, 256:512] = 0
    return x


def product(kind: str, x: np.ndarray, threads: int = 1) -> np.ndarray:
    w, crew = matrix(kind, x.shape[1]), Crew(threads, "q8")
    out = np.full((len(x), ROWS), np.nan, np.float32)
    products.multiply(crew, x, Matrix(w.type, w.rows, w.cols, w.data), out)
    crew.close()
    return out


def parts(w: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Weights as a product with whole numbers and what is added to it, float64 [rows, cols]; of most types, zeros."""
    whole = dequantize(w.data, w.type, (w.rows, w.cols)).astype(np.float64)
    if len(SCALES_AT.get(w.type, ())) < 2:
        return whole, np.zeros_like(whole)
    blocks, at = w.data.copy().reshape(-1, BY_NAME[w.type].block_bytes), SCALES_AT[w.type][0]
    blocks[:, at : at + 2] = 0
    added = dequantize(blocks.reshape(-1), w.type, (w.rows, w.cols)).astype(np.float64)
    return whole - added, added


def expected(kind: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product with rounded x in float64, and how far float32 may be from it.

    A group's sum is exact. Its factor is rounded twice (the products of steps) and the sum is added with at most
    cols / 32 + 3 others in each lane and the lanes; unquantized weights are added one by one.
    """
    w, rounded = matrix(kind, x.shape[1]), round_for(x, kind).astype(np.float64)
    factor, added = parts(w)
    if DOT_TYPES.get(kind) == "Q8_1":  # sums of a block in half precision
        step, q = quantize_q8_0(x)
        sums = round_half(step * q.sum(axis=1, keepdims=True)).astype(np.float64).reshape(len(x), -1)
        base = sums @ added[:, ::32].T
    else:
        base = rounded @ added.T
    size = np.abs(rounded) @ (np.abs(factor) + np.abs(added)).T
    cols = x.shape[1]
    depth = cols + 2 if kind in FLOATS else 2 * (cols // 32 + 3) + 4
    return rounded @ factor.T + base, depth * U * size


@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_those_of_the_rounded_vectors(instructions, kind):
    for count in (1, 2, 3, 8, 15):
        x = vectors(count)
        got, (want, allowed) = product(kind, x), expected(kind, x)
        share = np.abs(got - want) / allowed
        worst = np.unravel_index(np.nanargmax(share), share.shape)
        assert share.max() <= 1, f"{kind}, {instructions}, {count} vectors: {share.max():.2f} of allowed at {worst}"


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("cols", [32, 64, 96, 160, 2880])
def test_rows_of_any_number_of_blocks_of_32(instructions, kind, cols):
    """Behind the last row is no number, so whoever reads there makes one into no number too."""
    w = matrix(kind, cols)
    memory = np.concatenate([w.data, np.full(4 * BY_NAME[kind].block_bytes, 255, np.uint8)])
    for count in (1, 3, 8):
        x, got, crew = vectors(count, cols=cols), np.empty((count, ROWS), np.float32), Crew(1, "q8")
        products.multiply(crew, x, Matrix(kind, ROWS, cols, memory[: w.data.size]), got)
        crew.close()
        want, allowed = expected(kind, x)
        assert (np.abs(got - want) <= allowed).all(), f"{kind}, {count} vectors of {cols}"


@pytest.mark.parametrize("kind", FORMATS)
def test_the_bound_above_catches_a_code_that_is_off_by_one(kind):
    w = matrix(kind)
    wrong = Matrix(kind, ROWS, COLS, w.data.copy())
    middle = wrong.data.reshape(ROWS, -1)[3]
    at = {"F32": 2, "F16": 1, "BF16": 0}.get(kind, BY_NAME[kind].block_bytes // 2)
    middle[at] ^= 1 if kind not in FLOATS else 64
    x, got = vectors(4), np.empty((4, ROWS), np.float32)
    products.multiply(Crew(1, "q8"), x, wrong, got)
    want, allowed = expected(kind, x)
    assert (np.abs(got - want) / allowed)[:, 3].max() > 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_vector_gives_the_same_bits_alone_among_others_and_on_any_number_of_threads(instructions, kind):
    x = vectors(15)
    together = product(kind, x)
    for t in range(15):
        assert np.array_equal(product(kind, x[t : t + 1].copy())[0], together[t]), f"{kind}, vector {t}"
    for threads in (2, 3):
        assert np.array_equal(product(kind, x, threads), together), f"{kind}, {threads} threads"


@pytest.mark.parametrize("kind", FORMATS)
def test_all_sets_of_x86_give_the_same_bits_and_portable_code_what_rounding_allows(kind):
    got, x = {}, vectors(8)
    panel = rounding.new_panel(products.template(kind, ROWS, COLS, "q8")[jobs.ROUNDING], 8, COLS)
    for name in isa.usable():
        one = isa.SETS[name]
        rounding.round_rows(
            products.template(kind, ROWS, COLS, "q8")[jobs.ROUNDING], x, COLS, np.arange(8), one.columns, panel, 0
        )
        out, job = np.full((8, ROWS), np.nan, np.float32), products.template(kind, ROWS, COLS, "q8").copy()
        places = np.array([row.ctypes.data for row in out])
        products.give(job, panel, 0, places.ctypes.data, 8)
        run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 9)(compiler.rows_address(kind, one.columns, one))
        for t in range(0, 8, one.columns):
            where = [job[a] + t * job[b] for a, b in ((jobs.VALUES, jobs.VALUE_BYTES), (jobs.STEPS, jobs.STEP_BYTES),
                                                      (jobs.SUMS, jobs.SUM_BYTES))]  # fmt: skip
            data = matrix(kind).data.ctypes.data
            run(data, job[jobs.ROW_BYTES], job[jobs.BLOCKS], *where, places.ctypes.data + 8 * t, 0, ROWS)
        got[name] = out
    want, allowed = expected(kind, x)
    assert all((np.abs(out - want) <= allowed).all() for out in got.values())
    assert all(np.array_equal(out, got["avx2"]) for name, out in got.items() if name != "portable")


def test_every_format_is_written_for_every_instruction_set():
    assert {*FORMATS} >= {
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4"
    }  # fmt: skip
    marks = {"avx2": "avx2.pmadd", "avx512": "vpdpbusd.512", "avx512vbmi": "vpdpbusd.512", "portable": "x86"}
    for name, mark in marks.items():
        assert (mark in row_kernel("Q4_K", isa.SETS[name], 1)) == (name != "portable")
        assert ("permvar.qi" in row_kernel("MXFP4", isa.SETS[name], 1)) == (name == "avx512vbmi")


def test_an_instruction_set_that_is_not_here_is_refused_by_name(monkeypatch):
    monkeypatch.setenv(isa.VARIABLE, "avx9")
    isa.chosen.cache_clear()
    with pytest.raises(ValueError, match=r"MOE_CUPY_SIMD=avx9: this CPU has portable"):
        isa.chosen()
    isa.chosen.cache_clear()


@pytest.mark.parametrize("kind", ["Q8_K", "F16", "BF16", "F32"])
@pytest.mark.parametrize("most", [1, 4, 8])
def test_vectors_are_rounded_to_the_references_bits(kind, most):
    x = uneven(COLS)
    panel = rounded_panel(rounding.KINDS[kind], x, most)
    values = panel[0] if panel[0].size else panel[1]
    got = untiled(values, len(x), most, 256 if kind == "Q8_K" else 32)
    if kind == "Q8_K":
        step, q = quantize_q8_k(x)
        assert np.array_equal(got.reshape(q.shape), q)
        assert np.array_equal(untiled(panel[2], len(x), most, 1).reshape(step.shape), step)
        whole = q.reshape(-1, 16, 16).sum(2)
        assert np.array_equal(untiled(panel[4], len(x), most, 16).reshape(whole.shape), whole)
    else:
        assert np.array_equal(got.reshape(len(x), COLS), round_to(x, kind))


@pytest.mark.parametrize("kind", ["Q8_0", "Q8_1"])
@pytest.mark.parametrize("most", [1, 4, 8])
@pytest.mark.parametrize("cols", [32, 96, 256, 800])
def test_blocks_of_32_are_rounded_to_the_references_bits_and_lie_four_by_four(kind, most, cols):
    x, fours = uneven(cols), (cols + 127) // 128
    panel = rounded_panel(rounding.KINDS[kind], x, most)
    step, q = quantize_q8_0(x)
    q = zeros_behind(q, len(x), fours, 32).reshape(-1, 4, 2, 16)  # block, half, weight
    values = untiled(panel[0], len(x), most, 128).reshape(-1, 2, 4, 16)
    assert np.array_equal(values, q.transpose(0, 2, 1, 3))
    want = zeros_behind(round_half(step), len(x), fours, 1)
    assert np.array_equal(untiled(panel[2], len(x), most, 4).reshape(want.shape), want)
    if kind == "Q8_1":
        want = zeros_behind(round_half(step * q_sums(x)), len(x), fours, 1)
        assert np.array_equal(untiled(panel[3], len(x), most, 4).reshape(want.shape), want)
    else:
        lanes = q.reshape(-1, 4, 2, 4, 4).sum((2, 4))  # block, half, lane, weight
        assert np.array_equal(untiled(panel[4], len(x), most, 16).reshape(lanes.shape), -16 * lanes)


@pytest.mark.parametrize("kind", range(8))
def test_panels_begin_cache_lines(kind):
    assert all(part.ctypes.data % 64 == 0 for part in rounding.new_panel(kind, 3, 768) if part.size)


def q_sums(x: np.ndarray) -> np.ndarray:
    return quantize_q8_0(x)[1].sum(axis=1, keepdims=True)


def zeros_behind(blocks: np.ndarray, count: int, fours: int, size: int) -> np.ndarray:
    """Blocks of ``count`` vectors [count, 4 * fours, size], with zeros for those that are missing."""
    given = blocks.reshape(count, -1, size)
    return np.pad(given, ((0, 0), (0, 4 * fours - given.shape[1]), (0, 0)))


def uneven(cols: int) -> np.ndarray:
    """13 vectors of numbers of every size, with blocks of zeros and of what rounds to nothing."""
    rng = np.random.default_rng(3)
    x = (rng.normal(0, 1, (13, cols)) * 10.0 ** rng.integers(-9, 6, (13, cols))).astype(np.float32)
    x[1, :256], x[2, 300:] = 0, 1e-30
    x[3, 5] = -np.abs(x[3]).max()
    return x


def rounded_panel(code: int, x: np.ndarray, most: int) -> tuple[np.ndarray, ...]:
    panel = rounding.new_panel(code, *x.shape)
    rounding.round_rows(code, x, x.shape[1], np.arange(len(x)), most, panel, 0)
    return panel


def test_vectors_for_q4_k_are_those_of_the_reference_in_the_order_of_their_kernel():
    x = vectors(3)
    panel = rounded_panel(rounding.Q8_K_BY_HALVES, x, 1)
    step, q = quantize_q8_k(x)
    blocks = q.reshape(-1, 4, 2, 2, 16)  # pair of sub-blocks, low or high bits, half, weight
    assert np.array_equal(panel[0].reshape(-1, 256), blocks.transpose(0, 2, 3, 1, 4).reshape(-1, 256))
    assert np.array_equal(panel[2], step.reshape(-1))
    sums = panel[4].reshape(-1, 8, 2)
    assert np.array_equal(sums[..., 0], blocks.sum((3, 4)).reshape(-1, 8)) and not sums[..., 1].any()


def test_vectors_for_iq4_xs_are_those_of_the_reference_in_the_order_of_their_kernel():
    x = vectors(3)
    panel = rounded_panel(rounding.Q8_K_BY_FOURS, x, 1)
    step, q = quantize_q8_k(x)
    parts = q.reshape(-1, 2, 4, 2, 16)  # four parts, part, half, weight
    assert np.array_equal(panel[0].reshape(-1, 256), parts.transpose(0, 1, 3, 2, 4).reshape(-1, 256))
    assert np.array_equal(panel[2], step.reshape(-1))
    assert np.array_equal(panel[4].reshape(-1), -16 * parts.reshape(-1, 2, 4, 2, 4, 4).sum((3, 5)).reshape(-1))


def untiled(flat: np.ndarray, count: int, most: int, size: int) -> np.ndarray:
    """A panel as [count, blocks, size]."""
    made, t, blocks = [], 0, flat.size // (count * size)
    while t < count:
        columns = next(n for n in (8, 4, 2, 1) if n <= most and n <= count - t)
        tile = flat[t * blocks * size : (t + columns) * blocks * size]
        made.append(tile.reshape(blocks, columns, size).transpose(1, 0, 2))
        t += columns
    return np.concatenate(made)


def test_compiled_code_is_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    text, one = row_kernel("Q4_K", isa.SETS["portable"], 1), isa.SETS["portable"]
    compiler.load(text, one)
    (kept,) = tmp_path.glob("rows-portable-*.o")
    monkeypatch.setattr(compiler, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert compiler.load(text, one) and kept.stat().st_size > 500


def test_helpers_sleep_when_there_is_nothing_to_do_and_wake_for_the_next_list():
    crew, x, w = Crew(3, "q8"), vectors(15), random_matrix(np.random.default_rng(0), "Q4_K", 2048, COLS)
    out = np.empty((15, 2048), np.float32)
    for _ in range(3):
        products.multiply(crew, x, w, out)
        deadline = time.monotonic() + 300
        while crew.state[jobs.ASLEEP] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert crew.state[jobs.ASLEEP] == 2
    crew.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("crew")]


def test_helpers_end_though_an_op_was_broken_off():
    crew = Crew(2, "q8")
    crew.wake()
    time.sleep(0.1)  # awake now, and waiting for a list that does not come
    closing = threading.Thread(target=crew.close, daemon=True)
    closing.start()
    closing.join(300)
    assert not closing.is_alive()


def test_many_lists_in_a_row_are_all_done_however_the_helpers_are_placed():
    """A piece that is lost leaves NaN, one that is done twice at the wrong time leaves the number of another list."""
    rng, crew = np.random.default_rng(0), Crew(4, "q8")
    several = [random_matrix(rng, "Q8_0", rows, 256) for rows in (1, 33, 700, 2000)]
    alone, x = Crew(1, "q8"), rng.normal(0, 1, (3, 256)).astype(np.float32)
    want = [np.empty((3, w.rows), np.float32) for w in several]
    for w, out in zip(several, want, strict=True):
        products.multiply(alone, x, w, out)
    for turn in range(300):
        w, known = several[turn % 4], want[turn % 4]
        out = np.full_like(known, np.nan)
        products.multiply(crew, x, w, out)
        assert np.array_equal(out, known), f"turn {turn}, {w.rows} rows"
    crew.close()


WITH_EXPERTS = """
import hashlib, numpy as np
from moe_cupy.device.crew import Crew
from moe_cupy.kernels.host.experts import run_experts
from moe_cupy.kernels.samples import random_matrix
rng = np.random.default_rng(0)
three = [[random_matrix(rng, "Q4_K", 256, 256) for _ in range(4)] for _ in range(3)]
x, parts = rng.normal(0, 1, (64, 256)).astype(np.float32), np.empty((64, 2, 256), np.float32)
ids = np.argsort(rng.random((64, 4)), axis=1)[:, :2].astype(np.int32)
run_experts(Crew(1, "q8"), x, (ids.copy(), np.arange(4), three), ("silu", None, {}, {}), parts)
print(hashlib.sha256(parts.tobytes()).hexdigest())
"""


def test_no_memory_is_read_that_was_given_back():
    """Jobs hold addresses. glibc overwrites what is given back if asked to: no bit of the result may change."""
    environment = os.environ | {"PYTHONPATH": str(TRAINED.parents[1])}
    seen = set()
    for tunables in ("", "glibc.malloc.perturb=165"):
        run = [sys.executable, "-c", WITH_EXPERTS]
        done = subprocess.run(run, env=environment | {"GLIBC_TUNABLES": tunables}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1


def test_while_cancelled_nothing_is_computed_and_afterwards_all():
    split, x = RowSplitter(2, "q8"), vectors(2)
    out = np.full((2, ROWS), 5, np.float32)
    split.cancelled = True
    ops.linear(split, x, matrix("Q4_K"), out)
    assert (out == 5).all()
    split.cancelled = False
    ops.linear(split, x, matrix("Q4_K"), out)
    assert (out != 5).all()
    split.close()


@pytest.mark.skipif(not QUANTS.is_dir(), reason=f"{QUANTS} is absent")
@pytest.mark.parametrize("kind", "Q4_K_M Q5_K_M Q6_K Q8_0 Q4_0 Q5_0 Q2_K Q3_K_M IQ4_NL IQ4_XS MXFP4_MOE".split())
def test_models_follow_the_reference_that_rounds_as_llama_cpp_does(kind):
    with Engine(QUANTS / f"qwen3moe-256.{kind}.gguf", act="q8") as engine:
        outcome = compare_rounded(engine, np.random.default_rng(0).integers(0, engine.config.vocab_size, 12))
        assert outcome.worst < 0.01, outcome


def test_the_check_of_rounded_models_fails_without_rounding():
    with Engine(TRAINED) as engine:
        assert not compare_rounded(engine, np.arange(40, 52)).passed


def test_rounded_results_do_not_depend_on_chunks_cache_or_threads(tmp_path):
    types = ("Q4_K", "Q5_0", "Q6_K"), ("Q8_0", "Q8_0", "IQ4_XS")
    shape = Shape(width=256, inner=256, experts=8, used=3, expert_types=types)
    path = tiny_moe(tmp_path / "m.gguf", shape)
    tokens = np.random.default_rng(0).integers(0, 96, 40)
    with Engine(path, act="q8", cache="100%", threads=1) as engine:
        want = engine.logits(tokens)
    for options in ({"threads": 2}, {"ubatch_size": 7, "threads": 3}, {"cache": "slots:6", "prefetch": "next-gate"}):
        with Engine(path, act="q8", **options) as engine:
            assert np.array_equal(engine.logits(tokens), want), options
            engine.reset()
            steps = np.stack([engine.decode(int(t)).copy() for t in tokens])
            assert np.array_equal(steps, want), options


def test_the_report_names_rounding_and_instructions():
    device = HostDevice(2, "q8")
    assert device.how == f"2 threads, activations rounded to 8 bits ({isa.chosen().name} instructions)"
    device.close()
