"""Devices whose memory is the host's: small arrays are sent and fetched by being there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_cupy.device.base import DeviceError


class Unified(ABC):
    """A subclass has ``alloc`` and ``copy_async``; see ``Device``."""

    binds = False

    @abstractmethod
    def alloc(self, nbytes: int) -> np.ndarray:
        """Uninitialised uint8 [nbytes]."""

    @abstractmethod
    def copy_async(self, dst: Any, src: Any, stream: Any) -> None:
        """Copy src into dst in stream order."""

    def upload(self, host: np.ndarray) -> np.ndarray:
        memory = self.alloc(host.nbytes)
        memory[...] = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        return memory

    def put(self, dst: Any, values: np.ndarray, stream: Any) -> None:
        self.copy_async(dst, values.copy(), stream)

    def fetch(self, name: str, src: Any, stream: Any) -> np.ndarray:
        return src

    def bind(self, calls: Any, stream: Any) -> Callable[[int], None]:
        """Raises DeviceError: here no function is sooner done than its launches (``binds`` is False)."""
        raise DeviceError("this device makes no function of launches; ask `binds` first, and launch them one by one")

    def bind_experts(self, three: Any, stream: Any, **buffers: Any) -> Callable[..., None]:
        """Raises DeviceError, as ``bind`` does."""
        return self.bind((), stream)

    def bind_token(self, parts: Any, places: Any) -> Any:
        """Raises DeviceError, as ``bind`` does."""
        return self.bind((), None)
