"""What a launch is, and the numbers that stand for names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Pointers:
    """A table of addresses in device memory: of the slots of experts, for example."""

    arrays: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch; ``args`` are arrays, Pointers, None, ints and floats in the kernel's order."""

    kernel: str
    grid: tuple[int, int, int]
    block: int
    args: tuple[Any, ...]
    shared_bytes: int = 0  # below MOST_SHARED_BYTES, so that no kernel has to opt in to more


ACTIVATIONS = {"silu": 0, "gelu": 1, "swiglu_oai": 2}
GATINGS = {"softmax": 0, "sigmoid": 1, "softmax over the selected": 2}
NORMS = {"rms": 0, "layer": 1, "unit": 2}
MAX_VALUE_LENGTH = 512  # of attention's value rows
BEST_BYTES = 8
MOST_SHARED_BYTES = 48 << 10  # of a block, without cudaFuncSetAttribute
MOST_RANKS = 64  # of top_k


def ceil_div(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def is_q8(x: Any) -> bool:
    """Whether x holds Q8 blocks, uint8 [..., cols / 32, 40], rather than float32."""
    return bool(x.dtype == "uint8")


def warp_each(kernel: str, rows: int, y: int, z: int, block: int, args: tuple[Any, ...]) -> Launch:
    """A warp for each row."""
    return Launch(kernel, (ceil_div(rows, block // 32), y, z), block, args)


def thread_each(kernel: str, n: int, block: int, *args: Any) -> Launch:
    """A thread for each of n numbers."""
    return Launch(kernel, (ceil_div(n, block), 1, 1), block, args)
