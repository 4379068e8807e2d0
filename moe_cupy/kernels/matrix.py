"""A weight matrix in the block format of its file, wherever its bytes lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe_ref.quants import BY_NAME


@dataclass(frozen=True, slots=True)
class Matrix:
    """``rows`` x ``cols`` weights of GGUF type ``type``; ``data`` is a uint8 [nbytes] device array."""

    type: str
    rows: int
    cols: int
    data: Any
    prepared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what a device keeps about it

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * BY_NAME[self.type].row_bytes(self.cols)
