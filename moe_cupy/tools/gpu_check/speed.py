"""Bytes per second of the kernels that read most, beside what a plain copy reaches, and what their heads expect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_cupy.kernels.cuda import launches, sources
from moe_cupy.kernels.cuda.launches import CacheRows, Launch, Pointers, Sight, Slots
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.samples import normal, random_matrix
from moe_cupy.tools.gpu_check.workbench import Workbench

FORMATS = ("F16", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "IQ2_XS")
EXPERT_FORMATS = ("Q4_K", "MXFP4")
USED = 8
SAMPLE_ROWS = 64  # random rows, repeated

Group = tuple[list[Launch], float]  # launches of one kernel on different bytes, and how many bytes each must read


def expectation(kernel: str) -> str:
    """What the head of the kernel's file says is expected of it."""
    text = sources.text_of(sources.kernels()[kernel].unit.stem)
    head = " ".join(line[3:] for line in text.splitlines() if line.startswith("// "))
    found = re.search(r"[Ee]xpected at ([^.;:(,]+)", head)
    return found.group(1).strip() if found else ""


def matrices(bench: Workbench, kind: str, rows: int, cols: int, count: int = 0) -> list[Matrix]:
    """Random weights on the device, as many matrices as ``copy_bytes`` holds unless ``count`` says."""
    w = random_matrix(np.random.default_rng(1), kind, SAMPLE_ROWS, cols)
    one = Matrix(kind, rows, cols, None).nbytes
    count = count or max(1, bench.sizes.copy_bytes // one)
    data = bench.send(np.tile(w.data, -(-rows * count // SAMPLE_ROWS))[: one * count])
    return [Matrix(kind, rows, cols, data[i * one : (i + 1) * one]) for i in range(count)]


def rounded(bench: Workbench, x: np.ndarray) -> Any:
    """Q8 blocks of x on the device."""
    blocks = bench.unset(*x.shape[:-1], x.shape[-1] // 32, 40, dtype=np.uint8)
    bench.device.run(launches.quantize_q8(blocks, bench.send(x)), bench.stream)
    bench.finish()
    return blocks


def gemv_groups(bench: Workbench, kind: str) -> Iterator[Group]:
    """A square matrix times a vector, with activations as they are and rounded."""
    n, x = bench.sizes.columns, normal(np.random.default_rng(0), 1, bench.sizes.columns)
    weights, out = matrices(bench, kind, n, n), bench.unset(1, n)
    given = [bench.send(x), *([rounded(bench, x)] if kind in sources.BLOCK_FORMATS else [])]
    for vector in given:
        yield [launches.gemv(out, w, vector) for w in weights], weights[0].nbytes


def expert_groups(bench: Workbench, kind: str) -> Iterator[Group]:
    """Both halves of the chosen experts of one token, each time others."""
    d, f, experts = bench.sizes.columns // 2, max(256, bench.sizes.columns // 4), bench.sizes.experts
    d, used, rng = max(256, d), min(USED, experts), np.random.default_rng(0)
    gates, ups, downs = (matrices(bench, kind, *shape, experts) for shape in ((f, d), (f, d), (d, f)))
    choices = [bench.send(np.arange(e, e + used, dtype=np.int32)[None]) for e in range(0, experts - used + 1, used)]
    h, out = bench.unset(1, used, f), bench.unset(1, d)
    x, y = (rounded(bench, normal(rng, *shape)) for shape in ((1, d), (1, used, f)))
    weights = bench.send(np.full((1, used), 1 / used, np.float32))

    def slots(chosen: Any, *held: list[Matrix]) -> Slots:
        return Slots(tuple(Pointers([m.data for m in each]) for each in held), chosen, chosen)

    first = [launches.expert_gate_up(h, x, slots(c, gates, ups), gates[0]) for c in choices]
    yield first, used * 2 * gates[0].nbytes
    yield [launches.expert_down(out, y, slots(c, downs), downs[0], weights) for c in choices], used * downs[0].nbytes


def attention_groups(bench: Workbench) -> Iterator[Group]:
    """32 heads on 8 of keys and values in half precision, one query; the cache of a layer after the other."""
    rng, seen, heads, groups, width = np.random.default_rng(0), bench.sizes.positions, 32, 8, 128
    layers = max(1, bench.sizes.copy_bytes // (seen * groups * width * 4))
    rows = normal(rng, seen, groups * width).astype(np.float16)
    caches = [CacheRows(bench.send(rows), bench.send(rows), groups) for _ in range(layers)]
    at, sight = bench.send(np.array([seen - 1], np.int32)), Sight(width**-0.5)
    q, parts = bench.send(normal(rng, 1, heads, width)), bench.unset(1, heads, 32, width + 2)
    yield [launches.attention_decode(parts, q, cache, at, sight) for cache in caches], 2 * rows.nbytes


def norm_groups(bench: Workbench) -> Iterator[Group]:
    """The residual stream's norm, for so many tokens that it is not the launch that is measured."""
    x, out = (bench.send(np.ones((bench.sizes.prompt * 8, bench.sizes.columns), np.float32)) for _ in range(2))
    yield [launches.rms_norm(out, x, block=256)], 2 * x.nbytes


def all_groups(bench: Workbench) -> Iterator[Group]:
    """What one decoded token reads, most of all; made as it is asked for, so that memory is given back."""
    for kind in FORMATS:
        yield from gemv_groups(bench, kind)
    for kind in EXPERT_FORMATS:
        yield from expert_groups(bench, kind)
    yield from attention_groups(bench)
    yield from norm_groups(bench)


def products(bench: Workbench) -> Iterator[dict[str, Any]]:
    """A prompt's matrix products, in 10^12 operations per second."""
    n, tokens = bench.sizes.columns, bench.sizes.prompt
    x, out = normal(np.random.default_rng(0), tokens, n), bench.unset(tokens, n)
    for kind in ("F16", "Q8_0", "Q4_K"):
        (w,) = matrices(bench, kind, n, n, 1)
        ways = [launches.gemm(out, Pointers([w.data]), w, bench.send(x))]
        if kind in sources.BLOCK_FORMATS:
            given = rounded(bench, x)
            ways += [launches.gemm(out, Pointers([w.data]), w, given, variant=v) for v in ("", "pipelined", "mma")]
        for launch in ways:
            seconds = bench.launch_seconds([bench.ready(launch)])
            yield {"name": launch.kernel, "us": 1e6 * seconds, "10^12 op/s": 2e-12 * tokens * n * n / seconds,
                   "expected": expectation(launch.kernel)}  # fmt: skip


def speed(bench: Workbench) -> Iterator[dict[str, Any]]:
    """The decode kernels' bytes per second and their share of the copy bandwidth; then the products."""
    a, b = (bench.device.alloc(bench.sizes.copy_bytes) for _ in range(2))
    copy = 2 * bench.copy_gbps(b, a)
    yield {"name": "copy within device memory", "GB/s": copy}
    for group, nbytes in all_groups(bench):
        seconds = bench.launch_seconds([bench.ready(launch) for launch in group])
        rate, kernel = nbytes / seconds / 1e9, group[0].kernel
        yield {"name": kernel, "us": 1e6 * seconds, "GB/s": rate, "of copy": rate / copy,
               "expected": expectation(kernel)}  # fmt: skip
    yield from products(bench)
