"""The kernel sources: which files there are, for which tensor formats, and what each kernel takes.

A file defines its kernels by ``KERNEL(name)(parameters)``, or by ``FORMAT_KERNEL(name)``, which makes one
kernel ``name_FORMAT`` for each tensor format that the file is compiled for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from moe_cupy.kernels.cuda.codebooks import tables

HERE = Path(__file__).parent
# Prepended to every source, in this order.
HEADERS = tuple(
    f"{name}.cuh" for name in "prelude formats kformats gridformats rows tiles activation attention".split()
)

# Prepended besides to some files.
HEADERS_OF = {"resolve": ("pool.cuh",), "resolve_echo": ("pool.cuh", "echo.cuh")}

PLAIN_FORMATS = ("F32", "F16", "BF16")
GRID_FORMATS = tuple("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S TQ1_0 TQ2_0".split())  # gridformats.cuh
BLOCK_FORMATS = (
    *"Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 NVFP4".split(), *GRID_FORMATS,
)  # fmt: skip
FORMATS = (*PLAIN_FORMATS, *BLOCK_FORMATS)
CACHE_FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")  # of the KV cache

GRIDS = "gridformats.cuh"

# Files that are compiled once for each of some formats; all other files once.
PER_FORMAT: dict[str, tuple[str, ...]] = {
    "gemv": FORMATS,
    "gemv_naive": ("F32", "Q8_0", "Q4_K"),
    "embed": FORMATS,
    "expert_gate_up": FORMATS,
    "expert_down": FORMATS,
    "gemm": BLOCK_FORMATS,
    "gemm_float": FORMATS,
    "gemm_pipelined": ("Q8_0", "Q4_K", "MXFP4"),
    "gemm_mma": BLOCK_FORMATS,
    "attention_decode": CACHE_FORMATS,
    "attention_prefill": CACHE_FORMATS,
}

_KERNEL = re.compile(r"^(FORMAT_)?KERNEL\((\w+)\)\(([^)]*)\)", re.MULTILINE)


class Unit(NamedTuple):
    """What is compiled as one: a file, for one format or (empty) for none."""

    stem: str
    format: str = ""

    @property
    def defines(self) -> dict[str, str]:
        """Preprocessor definitions that the file needs."""
        if not self.format:
            return {}
        return {"FORMAT": self.format} | ({"QUANTIZED": "1"} if self.format in BLOCK_FORMATS else {})


class Kernel(NamedTuple):
    """A kernel: where it comes from, and the kind of each parameter: "pointer", "int", "long long" or "float"."""

    name: str
    unit: Unit
    parameters: tuple[tuple[str, str], ...]  # (name, kind)


def stems() -> tuple[str, ...]:
    """The names of all kernel files, without ``.cu``."""
    return tuple(sorted(path.stem for path in HERE.glob("*.cu")))


def units(stem: str) -> tuple[Unit, ...]:
    """What a file is compiled for."""
    return tuple(Unit(stem, kind) for kind in PER_FORMAT.get(stem, ("",)))


def text_of(stem: str, folder: Path = HERE) -> str:
    """The source file alone."""
    return (folder / f"{stem}.cu").read_text("utf-8")


def headers(stem: str, formats: Iterable[str], folder: Path = HERE) -> Iterator[tuple[Path, str]]:
    """(header, text that goes before it) of all that a file's units of these formats need; codebooks are text alone."""
    with_grids = not set(GRID_FORMATS).isdisjoint(formats)
    for name in (*HEADERS, *HEADERS_OF.get(stem, ())):
        if name != GRIDS:
            yield folder / name, ""
        elif with_grids:
            yield folder / name, tables()


def program(unit: Unit, folder: Path = HERE) -> str:
    """All the text that a compiler needs for one unit, headers first; no file is included."""
    before = [text + path.read_text("utf-8") for path, text in headers(unit.stem, [unit.format], folder)]
    defines = [f"#define {name} {value}" for name, value in unit.defines.items()]
    return "\n".join([*before, *defines, text_of(unit.stem, folder)])


def _parameter(text: str) -> tuple[str, str]:
    kind, _, name = text.strip().replace("*", "* ").rpartition(" ")
    kind = kind.removeprefix("const ").strip()
    return name, "pointer" if "*" in kind else kind


def kernels_of(unit: Unit, text: str) -> tuple[Kernel, ...]:
    """The kernels that a unit defines."""
    found = []
    for per_format, name, parameters in _KERNEL.findall(without_branches(text, unit)):
        full = f"{name}_{unit.format}" if per_format else name
        found.append(Kernel(full, unit, tuple(_parameter(p) for p in parameters.split(","))))
    return tuple(found)


def without_branches(text: str, unit: Unit) -> str:
    """``text`` less what stands between ``#ifdef QUANTIZED`` and ``#endif``, if the unit's format is a plain one."""
    if "QUANTIZED" in unit.defines:
        return text
    return re.sub(r"^#ifdef QUANTIZED\n.*?^#endif", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def kernels() -> dict[str, Kernel]:
    """All kernels by name."""
    every = (k for stem in stems() for unit in units(stem) for k in kernels_of(unit, text_of(stem)))
    return {kernel.name: kernel for kernel in every}
