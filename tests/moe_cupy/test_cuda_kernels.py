"""The CUDA kernels, compiled for the CPU, are right at every block size and in any order of lanes."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from moe_cupy.kernels.cuda import launches, sources
from moe_cupy.kernels.cuda.cases import Case, Output, quantized
from moe_cupy.kernels.cuda.check import all_cases
from moe_cupy.kernels.cuda.emulation import build as building
from moe_cupy.kernels.cuda.emulation.build import FAST, BuildError, Flavour, build, compiler
from moe_cupy.kernels.cuda.emulation.library import LaunchError, Library, emulated
from moe_cupy.kernels.cuda.emulation.sketch import Sketch
from moe_cupy.kernels.cuda.launches import Launch, Pointers
from moe_cupy.kernels.kept import CACHES
from moe_cupy.kernels.reference import expand
from moe_cupy.kernels.samples import normal, random_matrix, unset
from moe_ref.quants import FORMATS as DECODERS
from moe_ref.quants import dequantize

EXACT = {
    "argmax",
    "clamp",
    "group_by_expert",
    "hadamard",
    "kv_store",
    "kv_store_q4_0",
    "kv_store_q8_0",
    "quantize_q8",
    "top_k",
}
CHAINS = ("delta_recur", "gemv_naive")  # one long sum a thread: its bound is far above what random errors add up to


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))
    return emulated()


def label(case: Case, block: int, seed: int) -> str:
    return f"{case.label}, blocks of {block}, lane order {seed}"


def run_cases(block: int, order: int, formats: tuple[str, ...]) -> dict[str, float]:
    """The worst share of its tolerance that each kernel used."""
    shuffled, worst = Library(build(), order), defaultdict[str, float](float)
    for case in all_cases(block, formats, seed=block + order):
        share = case.run(shuffled.launch)
        assert share <= 1, f"{label(case, block, order)}: off by {share} of what is allowed"
        for one in case.launches:
            worst[one.kernel] = max(worst[one.kernel], share)
    return worst


# Every other block size and order of lanes with a few formats of each kind here, with all of them in the slow test.
OTHERS = [(32, 0), (128, 0), (256, 0), (64, 1), (128, 2)]


@pytest.mark.parametrize(("block", "order"), OTHERS)
def test_kernels_are_right_at_any_block_size_and_order_of_lanes(library, block, order):
    run_cases(block, order, ("F16", "Q8_0", "Q5_K", "IQ3_S", "TQ1_0"))


@pytest.mark.slow
@pytest.mark.parametrize(("block", "order"), OTHERS)
def test_all_formats_are_right_at_any_block_size_and_order_of_lanes(library, block, order):
    run_cases(block, order, sources.FORMATS)


def test_every_kernel_stays_within_its_tolerance(library):
    worst = run_cases(64, 0, sources.FORMATS)
    uncased = {"resolve", "resolve_ahead", "resolve_echo", "resolve_echo_ahead", "fill"}
    assert set(worst) | uncased == set(sources.kernels()), "a kernel without a case is not checked"
    for kernel, share in worst.items():
        exact = kernel in EXACT or kernel.startswith("embed")
        floor = 0.0 if exact else 1e-5 if kernel.startswith(CHAINS) else 0.001
        assert share >= floor, f"{kernel}: used only {share} of its tolerance, which is slack"


def test_results_do_not_depend_on_the_order_of_lanes(library):
    """To the bit: no kernel adds in an order that the scheduler chooses."""
    for one, other in zip(all_cases(64, ("Q4_K",)), all_cases(64, ("Q4_K",)), strict=True):
        one.run(library.launch)
        other.run(Library(build(), 99).launch)
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert a.got.tobytes() == b.got.tobytes(), one.label


@pytest.mark.parametrize("kind", sources.BLOCK_FORMATS)
def test_decoding_is_exact_on_any_bytes(library, kind):
    """Infinite and NaN scales too; the expectation is moe_ref's decoder, which equals gguf's."""
    rng, matrix = np.random.default_rng(3), random_matrix(np.random.default_rng(3), kind, 40, 512)
    data = rng.integers(0, 256, matrix.nbytes, dtype=np.uint8)
    out = unset(40, 512)
    library.launch(launches.embed(out, replace(matrix, data=data)))
    want = dequantize(data, kind, (40, 512))
    numbers = ~np.isnan(want)
    assert np.array_equal(np.isnan(out), ~numbers)
    assert np.array_equal(out[numbers].view(np.uint32), want[numbers].view(np.uint32))


def test_rounding_activations_costs_what_it_should(library):
    """Q8 blocks are off by at most half a step of each group, and they are off: the two ways are two."""
    rng = np.random.default_rng(5)
    w, x = random_matrix(rng, "Q4_K", 20, 512), normal(rng, 3, 512)
    blocks, exact, rounded = np.zeros((3, 16, 40), np.uint8), unset(3, 20), unset(3, 20)
    for one in (launches.quantize_q8(blocks, x), launches.gemv(exact, w, x), launches.gemv(rounded, w, blocks)):
        library.launch(one)
    step = np.repeat(np.abs(x.reshape(3, 16, 32)).max(-1) / 127, 32, axis=-1)
    bound = (step / 2 * (1 + 1e-5)) @ np.abs(expand(w)).T + 1e-5
    assert np.all(np.abs(rounded - exact) <= bound)
    assert np.abs(rounded - exact).max() > 0.01 * bound.max()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_cache_of_blocks_holds_what_gguf_makes_of_the_rows(library, kind):
    gguf = pytest.importorskip("gguf")
    x, rows = normal(np.random.default_rng(8), 3, 160), np.array([4, 0, 2], np.int32)
    x[1, 32:64] = 0
    x[2, :3] = 127, 2.5, -0.5  # halves go away from zero
    x[2, 3:32] = 0
    items, name, _, size = CACHES[kind]
    cache = np.full((5, 6 * size), 0xCD, np.uint8)
    library.launch(launches.kv_store(cache.view(items), x, rows, column=32, width=128, block=64))
    want = gguf.quants.quantize(x[:, :128], gguf.GGMLQuantizationType[name])
    assert np.array_equal(cache[rows, size : 5 * size], want)
    assert np.all(cache[[1, 3]] == 0xCD) and np.all(cache[:, :size] == 0xCD) and np.all(cache[:, 5 * size :] == 0xCD)


def test_the_formats_are_those_that_moe_ref_decodes():
    assert set(sources.FORMATS) < set(DECODERS)


# ---------------------------------------------------------------------------------------------------------
# slots


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("n", [0, 5, 16, 1000])
def test_fill_copies_any_number_of_bytes_at_any_address(library, n, shift):
    source, target = np.arange(1100, dtype=np.uint8), np.full(1100, 0xEE, np.uint8)
    loads, there, here = np.array([1, 0, 0, 0], np.int32), source[shift : shift + n], target[shift : shift + n]
    library.launch(launches.fill(Pointers([here]), Pointers([there]), loads, n, late=True, blocks=3, block=64))
    assert np.all(target == 0xEE) or n == 0, "a load that does not wait"
    library.launch(launches.fill(Pointers([here]), Pointers([there]), loads, n, blocks=3, block=64))
    assert np.array_equal(target[shift : shift + n], source[shift : shift + n])
    assert np.all(np.delete(target, np.s_[shift : shift + n]) == 0xEE)


# ---------------------------------------------------------------------------------------------------------
# launching


def good_launch() -> Launch:
    return launches.argmax(np.zeros(1, np.float32), np.zeros(1, np.int32), np.zeros((1, 8), np.float32), 32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(kernel="no_such"), "no such kernel; there are"),
        (dict(block=48), "48 threads; a block is a multiple of 32 up to 256"),
        (dict(block=512), "512 threads"),
        (dict(grid=(1, 0, 1)), "all three must be at least 1"),
        (dict(args=(None, None)), "2 arguments; it takes 4"),
        (dict(args=(None, None, 3, 8)), "argument logits is a int; the kernel takes a pointer"),
        (dict(args=(None, None, np.zeros((8, 2))[:, 0], 8)), "argument logits is not contiguous"),
        (dict(args=(None, None, None, 2**31)), "argument n = 2147483648 does not fit in 32 bits"),
        (dict(args=(None, None, None, None)), "argument n is a NoneType; the kernel takes a int"),
    ],
)
def test_a_wrong_launch_is_refused_before_it_runs(library, change, says):
    with pytest.raises(LaunchError, match=says):
        library.launch(replace(good_launch(), **change))


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"apt-get install g\+\+"):
        build()


def test_a_source_that_does_not_compile_is_an_error_and_leaves_nothing(library, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_CUPY_CACHE", str(tmp_path / "cache"))
    for path in [*sources.HERE.glob("*.cuh"), sources.HERE / "argmax.cu"]:
        shutil.copy(path, tmp_path)
    (tmp_path / "argmax.cu").write_text(sources.text_of("argmax") + "int broken = no_such_name;\n")
    with pytest.raises(BuildError, match="no_such_name"):
        build(FAST, ("argmax",), tmp_path)
    assert not list((tmp_path / "cache").rglob("argmax*.o*"))


def test_what_is_built_is_built_once_and_the_portable_switch_does_the_same(library, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_CUPY_CACHE", str(tmp_path))
    portable = Flavour("portable", ("-O1", "-DEMULATION_UCONTEXT"))
    path = build(portable, ("argmax", "router"))
    monkeypatch.setattr(building.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert build(portable, ("argmax", "router")) == path
    cases = [c for c in all_cases(128, ()) if {one.kernel for one in c.launches} <= {"argmax", "router"}]
    assert len(cases) > 5
    for case in cases:
        assert case.run(Library(path, 7).launch) <= 1, case.label


def test_q8_blocks_have_the_layout_of_the_header():
    blocks, values = quantized(np.array([[127.0, *[0.0] * 15, -3.0, *[0.0] * 15]], np.float32))
    assert blocks.tobytes() == np.float32(1).tobytes() + bytes([127, 0, 253, 255, 127, *[0] * 15, 253, *[0] * 15])
    assert values[0, 0] == 127 and values[0, 16] == -3


def test_an_output_compares_as_it_says():
    got = np.array([1.0, np.nan, 2.0])
    assert Output(got, np.array([1.5, np.nan, 2.0]), 0.25).ratio() == 2
    assert Output(got, np.array([1.0, 0.0, 2.0]), 1.0).ratio() == np.inf
    assert Output(got[:1], np.array([1.0]), 0.0).ratio() == 0


# ---------------------------------------------------------------------------------------------------------
# sketches

DOUBLE = """KERNEL(twice)(float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i %s n) x[i] *= 2.f;
}"""
SWAP = """KERNEL(turn)(float* x) {
    SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    BARRIER
    x[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}"""


def test_a_sketch_runs_and_is_watched(library):
    x = np.arange(40, dtype=np.float32)
    Sketch(DOUBLE % "<")(2, 32, x, 40)
    assert np.array_equal(x, 2 * np.arange(40))
    assert not Sketch(DOUBLE % "<").bounds(2, 32, x, 40)
    assert "heap-buffer-overflow" in Sketch(DOUBLE % "<=").bounds(2, 32, x, 40)
    right, wrong = (Sketch(SWAP.replace("BARRIER", barrier)) for barrier in ("__syncthreads();", ""))
    for seed in (0, 3):
        y = np.arange(64, dtype=np.float32)
        right(1, 64, y, shared_bytes=256, seed=seed)
        assert np.array_equal(y, np.arange(63, -1, -1))
    assert not right.races(1, 64, y, shared_bytes=256)
    assert "data race" in wrong.races(1, 64, y, shared_bytes=256)


MULTIPLY = """KERNEL(multiply)(int* c, const int8_t* a, const int8_t* b) {
    int r = lane_id() / 4, t = lane_id() % 4, *upper = c + 8 * r + 2 * t, *lower = upper + 64;
    int sums[4] = {upper[0], upper[1], lower[0], lower[1]}, rows[2];
    for (int m = 0; m < 2; m++) rows[m] = (int)load32((const uint8_t*)a + 16 * (r + 8 * m) + 4 * t);
    mma_16x8x16(sums, rows, (int)load32((const uint8_t*)b + 16 * r + 4 * t));
    for (int i = 0; i < 2; i++) upper[i] = sums[i], lower[i] = sums[2 + i];
}"""


def test_the_tensor_cores_product_is_a_matrix_product_in_the_layout_of_the_instruction_set(library):
    """PTX ISA, m16n8k16 of signed bytes: lane 4r + t has a[r, 4t:4t+4], b[4t:4t+4, r], c[r, 2t:2t+2], and row r + 8."""
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-128, 128, (rows, 16), dtype=np.int8) for rows in (16, 8))  # b by columns
    c = rng.integers(-1000, 1000, (16, 8), dtype=np.int32)
    want = c + a.astype(np.int32) @ b.T.astype(np.int32)
    Sketch(MULTIPLY)(1, 32, c, a, b, seed=4)
    assert np.array_equal(c, want)


def test_a_text_that_is_no_sketch_is_refused(library):
    with pytest.raises(BuildError, match="this text has 0"):
        Sketch("int x;")
    with pytest.raises(LaunchError, match="2 arguments; it takes 1"):
        Sketch(SWAP.replace("BARRIER", ""))(1, 32, None, 2)
