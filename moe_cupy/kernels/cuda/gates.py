"""What each kernel needs of a multiprocessor, for every architecture; ``python -m moe_cupy.kernels.cuda.gates``.

With ``--write docs/kernels.md`` the table in that page is replaced by what was measured.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from moe_cupy.kernels.cuda import sources
from moe_cupy.kernels.cuda.toolchain import ARCHITECTURES, NVRTC, Resources, assemble, whole_program

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
REGISTERS = 65536  # of a multiprocessor
RESERVED_SHARED = 1024  # bytes of each block, from compute capability 8 on


class Multiprocessor(NamedTuple):
    """Limits of a compute capability (CUDA C++ programming guide, technical specifications)."""

    warps: int
    blocks: int
    shared_bytes: int


LIMITS = {
    75: Multiprocessor(32, 16, 64 << 10), 80: Multiprocessor(64, 32, 164 << 10), 86: Multiprocessor(48, 16, 100 << 10),
    89: Multiprocessor(48, 24, 100 << 10), 90: Multiprocessor(64, 32, 228 << 10),
    100: Multiprocessor(64, 32, 228 << 10), 120: Multiprocessor(48, 24, 100 << 10),
}  # fmt: skip

# (threads, bytes of shared memory) of a block at common sizes: D = 2048, K = V = 128, 128 experts, heads of 128.
BLOCKS: dict[str, tuple[int, int]] = {
    "argmax": (256, 64), "attention_decode": (128, 4 * (128 + 4 * 162)), "attention_combine": (64, 0),
    "attention_prefill": (128, 4 * (4 * 160 + 32 * 129 + 32 * 128)), "delta_recur": (128, 4 * (34 * 128 + 128)),
    "embed": (32, 0), "gemm": (128, 4864), "gemm_mma": (128, 4864),
    "gemm_pipelined": (128, 9728), "gemm_float": (128, 12288), "top_k": (256, 4 * 4096 + 64),
    "group_by_expert": (128, 516), "hadamard": (64, 512), "resolve": (128, 96),
    "resolve_ahead": (128, 96), "resolve_echo": (128, 80), "resolve_echo_ahead": (128, 80),
    "rms_norm": (128, 16), "router": (32, 1036), "fill": (256, 0), "add_scaled": (256, 0), "multiply": (256, 0),
    "activate": (256, 0), "softcap": (256, 0), "clamp": (256, 0), "combine": (256, 0),
}  # fmt: skip
DEFAULT_BLOCK = (128, 0)

Measured = dict[str, dict[int, Resources]]  # kernel -> architecture -> resources


def block_of(kernel: str) -> tuple[int, int]:
    """(threads, shared bytes) of a block of this kernel."""
    return BLOCKS.get(kernel) or BLOCKS.get(sources.kernels()[kernel].unit.stem, DEFAULT_BLOCK)


def occupancy(registers: int, threads: int, shared_bytes: int, architecture: int) -> float:
    """Share of a multiprocessor's warps that can be resident; registers are given to warps 256 at a time."""
    limit = LIMITS[architecture]
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    reserved = shared_bytes + (RESERVED_SHARED if architecture >= 80 else 0)
    by_shared = limit.shared_bytes // reserved if reserved else limit.blocks
    return min(by_registers, by_shared, limit.blocks, limit.warps // warps) * warps / limit.warps


def measure(architectures: tuple[int, ...] = ARCHITECTURES) -> Measured:
    """Compile everything for every architecture; raises ToolchainError."""
    compiler = NVRTC()
    found: Measured = defaultdict(dict)

    def one(job: tuple[int, str]) -> tuple[int, list[Resources]]:
        return job[0], assemble(compiler.ptx(whole_program(job[1]), f"{job[1]}.cu", job[0]), job[0])

    with ThreadPoolExecutor(2) as pool:
        for architecture, rows in pool.map(one, [(a, stem) for a in architectures for stem in sources.stems()]):
            for row in rows:
                found[row.kernel][architecture] = row
    return dict(found)


def cell(kernel: str, architecture: int, needs: Resources) -> str:
    """Registers of a thread and occupancy, as ``40 (75%)``."""
    return f"{needs.registers} ({occupancy(needs.registers, *block_of(kernel), architecture):.0%})"


def version_line(version: tuple[int, int]) -> str:
    """Which compilers the table is of."""
    return f"NVRTC and ptxas {version[0]}.{version[1]}."


def table(measured: Measured) -> Iterator[str]:
    """Markdown rows: registers and occupancy (percent) for each architecture, spills of all together."""
    heads = [f"sm_{a}" for a in ARCHITECTURES]
    yield f"| kernel | threads | shared | {' | '.join(heads)} | spills |"
    yield "|---|--:|--:|" + "--:|" * (len(heads) + 1)
    for kernel, by_architecture in sorted(measured.items()):
        threads, shared = block_of(kernel)
        cells = [cell(kernel, a, r) for a, r in by_architecture.items()]
        spills = sum(r.spill_bytes + r.stack_bytes for r in by_architecture.values())
        yield f"| {kernel} | {threads} | {shared} | {' | '.join(cells)} | {spills} |"


def page(measured: Measured, version: tuple[int, int]) -> str:
    """What stands between the two marks of docs/kernels.md."""
    return "\n".join([BEGIN, version_line(version), "", *table(measured), END])


def committed(text: str) -> tuple[str, dict[str, list[str]]]:
    """(the version line, the cells of each kernel's row) of docs/kernels.md."""
    inside = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside if line.startswith("| ")]
    return inside[0], {row[0]: row[1:] for row in rows[1:]}


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    new = page(measure(), NVRTC().version())
    if arguments.write is None:
        print(new)
        return
    text = arguments.write.read_text("utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    arguments.write.write_text(before + new + after, "utf-8")


if __name__ == "__main__":
    main()
