"""What tests of rounded activations share: a device that says what it launched, and the reference in its blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_cupy.device.emulated import EmulatedDevice
from moe_cupy.kernels.cuda import sources
from moe_cupy.kernels.cuda.cases import quantized
from moe_cupy.kernels.cuda.sources import BLOCK_FORMATS
from moe_ref.weights import Weights


class RecordingDevice(EmulatedDevice):
    """Keeps the names of the kernels that it launched, in order."""

    def __init__(self, act: str = "q8", capability: tuple[int, int] = (12, 0)) -> None:
        self.launched: list[str] = []
        super().__init__(act, capability)

    def run(self, launch: Any, stream: Any) -> None:
        self.launched.append(launch.kernel)
        super().run(launch, stream)

    def bases(self) -> set[str]:
        """The kernels launched so far, without the tensor types that they were compiled for."""
        return {base_of(name) for name in self.launched}


def base_of(kernel: str) -> str:
    """gemm_mma_Q4_K -> gemm_mma; that of the cache's type stays, attention_decode_F16."""
    unit = sources.kernels()[kernel].unit
    return kernel if unit.stem.startswith("attention") else kernel.removesuffix("_" + unit.format)


def product_in_blocks_of_32(exact: Any) -> Any:
    """``Weights.product`` of activations rounded in blocks of 32, whatever the matrix's block format."""

    def product(self: Weights, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        if self.views[name].stored.type in BLOCK_FORMATS:
            x = quantized(np.ascontiguousarray(x, np.float32))[1].astype(x.dtype)
        return exact(self, x, name, index)

    return product
