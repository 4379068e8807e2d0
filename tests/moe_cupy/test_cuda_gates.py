"""Every kernel compiles for every architecture and needs no more registers than docs/kernels.md says. No GPU needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_cupy.kernels.cuda import gates, sources
from moe_cupy.kernels.cuda.gates import Measured
from moe_cupy.kernels.cuda.toolchain import ARCHITECTURES, NVRTC, ToolchainError, assemble, ptxas_path, whole_program

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text("utf-8")


@pytest.fixture(scope="module")
def compiler() -> NVRTC:
    try:
        ptxas_path()
        return NVRTC()
    except ToolchainError as error:
        pytest.skip(str(error))


def spills(measured: Measured) -> dict[str, tuple[int, int]]:
    """'kernel sm_75' -> bytes of (spills, stack), of those that have any."""
    return {
        f"{kernel} sm_{a}": (r.spill_bytes, r.stack_bytes)
        for kernel, by_architecture in measured.items()
        for a, r in by_architecture.items()
        if r.spill_bytes or r.stack_bytes
    }


def changed_cells(measured: Measured, architecture: int) -> dict[str, tuple[str | None, str]]:
    """Kernel -> (the committed page's cell of an architecture, the one measured now), where they differ."""
    column = 2 + ARCHITECTURES.index(architecture)
    old = {kernel: row[column] for kernel, row in gates.committed(PAGE)[1].items()}
    new = {kernel: gates.cell(kernel, architecture, found[architecture]) for kernel, found in measured.items()}
    return {kernel: (old.get(kernel), cell) for kernel, cell in new.items() if old.get(kernel) != cell}


@pytest.mark.slow(seconds=140)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_every_kernel_compiles_does_not_spill_and_needs_what_the_committed_table_says(compiler, architecture):
    measured = gates.measure((architecture,))
    assert set(measured) == set(sources.kernels())
    assert not spills(measured), "bytes of (spills, stack)"
    version, _ = gates.committed(PAGE)
    if version != gates.version_line(compiler.version()):
        pytest.skip(f"compiled, no spills; but docs/kernels.md is of another compiler: {version}")
    changed = changed_cells(measured, architecture)
    assert not changed, f"(committed, now): {changed}; if that is meant: sh scripts/cuda_gates.sh --write"


def test_the_committed_table_has_all_kernels_and_no_spills():
    version, rows = gates.committed(PAGE)
    assert re.fullmatch(r"NVRTC and ptxas \d+\.\d+\.", version)
    assert set(rows) == set(sources.kernels())
    assert all(row[-1] == "0" and len(row) == 3 + len(ARCHITECTURES) for row in rows.values())


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "architecture", "expected"),
    [
        (32, 256, 0, 75, 1.0),  # 8 warps of 1024 registers: 8 blocks, but 32 warps are all
        (40, 128, 0, 90, 0.75),  # 4 warps of 1280: 12 blocks
        (255, 256, 0, 80, 0.125),
        (32, 128, 35456, 86, 2 * 4 / 48),  # shared memory: 2 blocks of 36480 bytes in 102400
        (16, 32, 0, 120, 24 / 48),  # blocks
    ],
)
def test_occupancy_is_what_the_limits_give(registers, threads, shared, architecture, expected):
    assert gates.occupancy(registers, threads, shared, architecture) == expected


def test_dot_products_are_dp4a(compiler):
    ptx = compiler.ptx(whole_program("quantize_q8"), "quantize_q8.cu", 75)
    assert ".visible .entry quantize_q8(" in ptx
    q8 = compiler.ptx(sources.program(sources.Unit("gemv", "Q4_K")), "gemv.cu", 75)
    entries = q8.split(".visible .entry ")[1:]
    assert [("dp4a" in entry, entry.split("(")[0]) for entry in entries] == [
        (False, "gemv_Q4_K"), (True, "gemv_q8_Q4_K"),
    ]  # fmt: skip


def test_the_tensor_cores_are_asked_on_every_architecture(compiler):
    text = sources.program(sources.Unit("gemm_mma", "Q8_0"))
    for architecture in ARCHITECTURES:
        shape = "m8n8k16" if architecture < 80 else "m16n8k16"
        assert f"mma.sync.aligned.{shape}.row.col.s32.s8.s8.s32" in compiler.ptx(text, "gemm_mma.cu", architecture)


def test_the_gate_can_fail(compiler):
    text = 'extern "C" __global__ void many(float* x) { float a[300]; for (int i = 0; i < 300; i++) a[i] = x[i];\n'
    text += "for (int j = 0; j < 9; j++) for (int i = 0; i < 300; i++) x[i] += a[(i * j) % 300]; }"
    (row,) = assemble(compiler.ptx(text, "many.cu", 75), 75)
    assert row.stack_bytes > 0
    assert spills({"many": {75: row}}) == {"many sm_75": (row.spill_bytes, row.stack_bytes)}
    assert changed_cells({"argmax": {75: row}}, 75).keys() == {"argmax"}
    with pytest.raises(ToolchainError, match=r"wrong.cu for compute_75: .*undefined"):
        compiler.ptx('extern "C" __global__ void wrong() { no_such(); }', "wrong.cu", 75)
