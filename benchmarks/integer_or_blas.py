"""Which is faster for a batch of vectors: the integer kernel, or expanding the matrix to float32 for NumPy's BLAS.

    OPENBLAS_NUM_THREADS=1 python benchmarks/integer_or_blas.py [FORMAT…] [--shapes 768x2048] [--batches 1,8,64]

For one expert's matrix; one thread each; best of several. Integer: rounding the vectors, then products in integers.
BLAS: decoding all rows with compiled code, then a product in float32; the part of it that is the product is shown too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from moe_cupy.device.crew import Crew
from moe_cupy.kernels.host import matmul, products
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.samples import random_matrix

FORMATS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "MXFP4", "Q2_K", "Q3_K", "F16", "BF16")
LEAST_TIME, LEAST_RUNS = 0.15, 3  # seconds and runs that a figure is the best of


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest run."""
    seconds: list[float] = []
    work()
    while sum(seconds) < LEAST_TIME or len(seconds) < LEAST_RUNS:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def decode(w: Matrix, out: np.ndarray) -> None:
    """All rows as float32 [rows, cols]."""
    kind, row_bytes = matmul.layout(w)
    matmul.embed_rows(kind, row_bytes, w.data, np.arange(w.rows, dtype=np.int32), out, 0, w.rows)


def row(w: Matrix, crew: Crew, batch: int) -> str:
    """A line of the table: microseconds of both ways for ``batch`` vectors."""
    x = np.random.default_rng(1).standard_normal((batch, w.cols), np.float32)
    y, expanded = np.empty((batch, w.rows), np.float32), np.empty((w.rows, w.cols), np.float32)
    integer = best(lambda: products.multiply(crew, x, w, y))
    decoding = best(lambda: decode(w, expanded))
    product = best(lambda: np.matmul(x, expanded.T, out=y))
    microseconds = [f"{seconds * 1e6:.0f}" for seconds in (integer, decoding + product, product)]
    speed, ratio = batch * w.rows * w.cols / 1e9 / integer, (decoding + product) / integer
    return f"| {w.type} | {w.rows}x{w.cols} | {batch} | {' | '.join(microseconds)} | {speed:.0f} | {ratio:.2f} |"


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=FORMATS)
    parser.add_argument("--shapes", default="768x2048,2048x768")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128,256,512")
    args = parser.parse_args()
    print("| format | rows x cols | batch | integer, us | decoding and BLAS | BLAS alone | integer, GMAC/s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    crew, rng = Crew(1, "q8"), np.random.default_rng(0)
    for kind in args.formats:
        for shape in args.shapes.split(","):
            rows, cols = map(int, shape.split("x"))
            w = random_matrix(rng, kind, rows, cols)
            for batch in map(int, args.batches.split(",")):
                print(row(w, crew, batch), flush=True)


if __name__ == "__main__":
    main()
