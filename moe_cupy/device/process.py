"""Threads belong to the process that began them: a fork has their memory and none of them."""

from __future__ import annotations

import os

from moe_cupy.device.base import DeviceError


class OfOneProcess:
    """What works with threads of its own. A fork that waited for them would wait for ever; it gets a DeviceError."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is the process with the threads."""
        return os.getpid() == self._process

    def check_process(self) -> None:
        """Raises DeviceError in a fork."""
        if not self.is_here:
            raise DeviceError(f"this device was opened by process {self._process}, of which this one is a fork without "
                              "its threads: open a device here")  # fmt: skip
