"""How fast the host's row kernels read weights: GB/s of one core for each format, from the cache and from memory.

    python benchmarks/row_kernels.py [FORMAT…] [--cols 2048,768] [--columns 1] [--simd avx512,avx2]

A kernel multiplies rows of random blocks with ``--columns`` rounded vectors. "cache" goes over 512 KiB again and again,
"memory" over 512 MiB, as decode does. Medians. The cores of a virtual machine may be halves of one: let the other rest.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import statistics
import time

import numpy as np

from moe_cupy.kernels.host.products import rounding
from moe_cupy.kernels.host.rounding import new_panel, round_rows
from moe_cupy.kernels.host.simd.compiler import rows_address
from moe_cupy.kernels.host.simd.isa import SETS, chosen
from moe_cupy.kernels.host.simd.rows import ARGUMENTS
from moe_cupy.kernels.samples import random_matrix
from moe_ref.quants import BY_NAME

CACHED, STREAMED = 512 << 10, 512 << 20  # bytes of weights
ROWS_A_CALL = 4096
ROWS = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(ARGUMENTS))


def weights(kind: str, rows: int, cols: int) -> np.ndarray:
    """Rows of random blocks uint8 [rows * row bytes], on huge pages."""
    pages = mmap.mmap(-1, rows * BY_NAME[kind].row_bytes(cols), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    memory[:] = np.resize(random_matrix(np.random.default_rng(0), kind, 256, cols).data, memory.size)
    return memory


def panel_of(kind: str, cols: int, columns: int) -> list[np.ndarray]:
    """Values, steps and sums of random vectors, as bytes or floats."""
    kept = rounding(kind)
    panel, x = new_panel(kept, columns, cols), np.random.default_rng(1).standard_normal((columns, cols), np.float32)
    round_rows(kept, x, cols, np.arange(columns), columns, panel, 0)
    codes, values, steps, sums, groups = panel
    return [aligned(v) for v in (codes if codes.size else values, steps, groups if groups.size else sums)]


def aligned(v: np.ndarray) -> np.ndarray:
    """A copy that begins a cache line."""
    memory = np.empty(v.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    memory[first : first + v.nbytes] = v.view(np.uint8)
    return memory[first:]


def rates(kind: str, simd: str, cols: int, columns: int, nbytes: int) -> list[float]:
    """Bytes a second, a sample for each pass over ``nbytes`` of weights."""
    kernel, row_bytes = ROWS(rows_address(kind, columns, SETS[simd])), BY_NAME[kind].row_bytes(cols)
    total = nbytes // row_bytes
    step = min(total, ROWS_A_CALL)
    memory, panel = weights(kind, total, cols), panel_of(kind, cols, columns)
    out = np.empty((columns, step), np.float32)
    results = np.array([line.ctypes.data for line in out])
    blocks = cols // max(32, BY_NAME[kind].block_elements)
    given = row_bytes, blocks, *(part.ctypes.data for part in panel), results.ctypes.data, 0
    start, times = memory.ctypes.data, []
    while len(times) < 3 or sum(times) < 0.3:
        begun = time.perf_counter()
        for first in range(0, total, step):
            kernel(start + first * row_bytes, *given, min(step, total - first))
        times.append(time.perf_counter() - begun)
    return [total * row_bytes / t for t in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=["Q4_K", "Q6_K", "Q8_0"], metavar="FORMAT")
    parser.add_argument("--cols", default="2048,768")
    parser.add_argument("--columns", type=int, default=1)
    parser.add_argument("--simd", default=chosen().name)
    args = parser.parse_args()
    print("| format | instructions | row's width | vectors | cache, GB/s | memory, GB/s |\n|---|---|---|---|---|---|")
    for kind in args.formats:
        for simd in args.simd.split(","):
            for cols in map(int, args.cols.split(",")):
                found = [rates(kind, simd, cols, args.columns, size) for size in (CACHED, STREAMED)]
                near, far = (f"{statistics.median(some) / 1e9:.1f}" for some in found)
                print(f"| {kind} | {simd} | {cols} | {args.columns} | {near} | {far} |", flush=True)


if __name__ == "__main__":
    main()
